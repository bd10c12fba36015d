"""The quickstart: the same small ResNet, plain and harmonic, on few natural images."""

import importlib.util
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.models import reparameterize_model
from timm.utils import random_seed
from tqdm import tqdm

from .figure import draw, energy_by_frequency
from .photographs import PATCH_SIZE, TEST_PER_CLASS, QuickstartError, export_patches, load_photographs
from .training import NETWORK, RECIPE, accuracy_on, fit, loader, reasonable_threads

# What makes each model: options of harm_resnet18 on top of NETWORK.
MODELS: dict[str, dict[str, Any]] = {
    'harm0': dict(harmonic_stem=False, harmonic_blocks=False),
    'harm1': dict(harmonic_blocks=False),
    'harm': {},
    'harm_ortho': dict(normalization='ortho'),
}
# Packages that only the quickstart needs, by the name of their module.
_EXTRAS = dict(matplotlib='matplotlib', skimage='scikit-image', sklearn='scikit-learn')
_EVALUATIONS = 15  # points of a learning curve


def _check_extras() -> None:
    missing = [package for module, package in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise QuickstartError(f'missing packages: pip install {" ".join(missing)}')


def export(folder: Path, train_per_class: int) -> None:
    """Writes the patches of the first seed as an image folder, and prints a command of timm's train.py for it."""
    _check_extras()
    photographs = load_photographs()
    counts = export_patches(folder, photographs, train_per_class)
    layers, channels = (f'{name}={str(NETWORK[name]).replace(" ", "")}' for name in ('layers', 'channels'))
    print(
        f'Wrote {counts["train"]} training and {counts["validation"]} test patches to {folder}. Train on them:\n'
        f'python train.py --data-dir "{folder}" --device-modules timm_harmonic --model harm_resnet18 '
        f'--model-kwargs "{layers}" "{channels}" stem_pool={NETWORK["stem_pool"]} '
        f'--num-classes {len(photographs)} --in-chans 1 --input-size 1 {PATCH_SIZE} {PATCH_SIZE} '
        f'--mean {RECIPE["mean"][0]} --std {RECIPE["std"][0]} --crop-pct 1 --batch-size {RECIPE["batch_size"]} '
        f'--opt {RECIPE["opt"]} --lr {RECIPE["lr"]} --weight-decay {RECIPE["weight_decay"]} '
        f'--sched {RECIPE["sched"]} --epochs 30 --warmup-epochs 3 --smoothing {RECIPE["smoothing"]} '
        f'--scale 1 1 --ratio 1 1 --color-jitter 0 --workers 2 --device cpu'
    )


def quickstart(
    seeds: int,
    epochs: int,
    train_per_class: int,
    models: Sequence[str],
    out: Path | str,
    photographs: dict[str, np.ndarray] | None = None,
    test_per_class: int = TEST_PER_CLASS,
) -> dict[str, Any]:
    """Trains every model with every seed, prints a table, writes results.json and quickstart.png.

    Everything random follows from the seed: the training patches, the initialisation, the order and the crops. The
    models see the same patches in the same order. Options are those of `timm-harmonic quickstart`; photographs are gray
    pictures (H, W) by class name. Returns what results.json holds. Raises QuickstartError if a package or a picture is
    missing, a picture has too few patches, or the folder cannot be written.
    """
    _check_extras()
    models = list(dict.fromkeys(models))
    photographs = load_photographs() if photographs is None else photographs
    if train_per_class * len(photographs) < 2:
        raise QuickstartError('at least two training patches are needed.')
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuickstartError(f'cannot write results: {error}') from error
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    with reasonable_threads() as threads, tqdm(total=seeds * len(models) * epochs, unit='epoch') as bar:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                export_patches(folder, photographs, train_per_class, test_per_class, seed)
                for name in models:
                    bar.set_description(f'seed {seed + 1}/{seeds} {name}')
                    runs[name].append(_train(name, seed, epochs, folder, len(photographs), bar))
    counts = dict(train_patches=train_per_class * len(photographs), test_patches=test_per_class * len(photographs))
    results = dict(
        note='Measured by this run on this machine; accuracies are percentages of the test patches.',
        options=dict(seeds=seeds, epochs=epochs, train_per_class=train_per_class, models=models),
        network=NETWORK,
        recipe=RECIPE,
        environment=_environment(threads),
        data=dict(classes=list(photographs), patch_size=PATCH_SIZE, **counts, chance=100 / len(photographs)),
        curve_epochs=_evaluated_epochs(epochs),
        models={name: _summary(of_model, runs.get('harm0', [])) for name, of_model in runs.items()},
    )
    stems = {name: of_model[0]['stem'] for name, of_model in runs.items()}
    _write_whole(out / 'results.json', lambda path: path.write_text(json.dumps(results, indent=1) + '\n'))
    _write_whole(out / 'quickstart.png', lambda path: draw(results, stems, path))
    _print_table(results)
    print(f'Wrote {out / "results.json"} and {out / "quickstart.png"}.')
    return results


def _evaluated_epochs(epochs: int) -> list[int]:
    """Epochs after which the test accuracy is measured, the last one included."""
    return sorted({max(1, round(epochs * i / _EVALUATIONS)) for i in range(1, _EVALUATIONS + 1)})


def _train(name: str, seed: int, epochs: int, folder: str, num_classes: int, bar: tqdm) -> dict[str, Any]:
    """One training of one model: its accuracies in percent of the test patches, and the filters of the fused stem."""
    random_seed(seed)
    model = timm.create_model('harm_resnet18', num_classes=num_classes, **NETWORK, **MODELS[name])
    train, (test,) = loader(folder, 'train'), list(loader(folder, 'validation'))
    curve: list[float] = []

    def after(epoch: int) -> None:
        if epoch in _evaluated_epochs(epochs):
            curve.append(accuracy_on(model, *test))
            bar.set_postfix_str(f'accuracy {curve[-1]:.1f} %')
        bar.update()

    seconds = fit(model, train, seed, epochs, after_epoch=after)
    fused = reparameterize_model(model)
    return dict(
        curve=curve,
        accuracy=curve[-1],
        fused_accuracy=accuracy_on(fused, *test),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
        stem=fused.conv1.weight.detach(),
    )


def _environment(threads: int) -> dict[str, Any]:
    packages = ('timm_harmonic', 'timm', 'scikit_image', 'scikit_learn')
    versions = dict({name: version(name) for name in packages}, torch=torch.__version__)
    here = dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count())
    return dict(versions, **here, threads=threads)


def _deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; a single value has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def _summary(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy, fused = ([run[key] for run in runs] for key in ('accuracy', 'fused_accuracy'))
    return dict(
        accuracy_mean=statistics.mean(accuracy),
        accuracy_deviation=_deviation(accuracy),
        accuracy=accuracy,
        fused_accuracy_mean=statistics.mean(fused),
        fused_accuracy=fused,
        gain_over_harm0=[run['accuracy'] - other['accuracy'] for run, other in zip(runs, plain, strict=False)],
        parameters=runs[0]['parameters'],
        seconds=statistics.mean(run['seconds'] for run in runs),
        curves=[run['curve'] for run in runs],
        stem_energy=energy_by_frequency(torch.cat([run['stem'] for run in runs])).tolist(),
    )


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file under another name, then renames it: an interruption leaves no half of a file."""
    partial = path.with_name(f'.{path.name}.partial')
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _print_table(results: dict[str, Any]) -> None:
    def mean(values: list[float], form: str = '.1f') -> str:
        deviation = _deviation(values)
        return f'{statistics.mean(values):{form}}' + ('' if deviation is None else f' ± {deviation:.1f}')

    seeds, data = results['options']['seeds'], results['data']
    table = Table(
        title=f'Measured here: {seeds} seed{"s" if seeds > 1 else ""}, {data["train_patches"]} training and '
        f'{data["test_patches"]} test patches, chance {data["chance"]:.1f} %',
        caption='mean ± standard deviation over seeds; every model sees the same patches' if seeds > 1 else 'one seed',
    )
    table.add_column('model', no_wrap=True)
    for title in ('test accuracy, %', 'after fusing, %', 'minus harm0', 'parameters', 'seconds a run'):
        table.add_column(title, justify='right')
    for name, model in results['models'].items():
        gain = model['gain_over_harm0'] if name != 'harm0' else []
        accuracies = mean(model['accuracy']), mean(model['fused_accuracy']), mean(gain, '+.1f') if gain else ''
        table.add_row(name, *accuracies, f'{model["parameters"]:,}', f'{model["seconds"]:.1f}')
    Console().print(table)
