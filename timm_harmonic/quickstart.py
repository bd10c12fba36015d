"""The main job in one command: the same small ResNet, plain and harmonic, on few natural images."""

import importlib.util
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import reparameterize_model
from timm.utils import random_seed
from torch import Tensor

from .photographs import PATCH_SIZE, TEST_PER_CLASS, QuickstartError, export_patches, load_photographs
from .quickstart_figure import draw, energy_by_frequency
from .training import NETWORK, RECIPE, accuracy_on, fit, loader, reasonable_threads

__all__ = ['MODELS', 'export', 'quickstart']

# What makes each model: options of harm_resnet18 on top of NETWORK.
MODELS: dict[str, dict[str, Any]] = {
    'harm0': dict(harmonic_stem=False, harmonic_blocks=False),
    'harm1': dict(harmonic_blocks=False),
    'harm': {},
    'harm_ortho': dict(normalization='ortho'),
}
_EXTRAS = ('matplotlib', 'rich', 'skimage', 'sklearn', 'tqdm')
_EVALUATIONS = 15  # points of a learning curve


@dataclass
class Run:
    """What one training of one model gave. Accuracies are percentages of the test patches."""

    curve: list[float]
    accuracy: float
    fused_accuracy: float
    parameters: int
    seconds: float
    root: Tensor  # filters (O, 1, k, k) of the fused root layer


def check_extras() -> None:
    """Refuses to start without the packages that only this command needs.

    Raises:
        QuickstartError: If one is missing, naming it and what to install.
    """
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise QuickstartError(f'missing packages: {", ".join(missing)}. pip install "timm-harmonic[quickstart]"')


def export(folder: Path, train_per_class: int) -> None:
    """Writes the patches of the first seed as an image folder, and prints how timm's train.py trains on it.

    Args:
        folder: Where to write, new or empty.
        train_per_class: Training patches of each photograph.

    Raises:
        QuickstartError: If a package or picture is missing, or the folder is not empty.
    """
    check_extras()
    photographs = load_photographs()
    counts = export_patches(folder, photographs, train_per_class)
    print(f'Wrote {counts["train"]} training and {counts["validation"]} test patches to {folder}. Try on it:')
    print(f'python train.py {_train_py_options(folder, len(photographs))}')


def _train_py_options(folder: Path, num_classes: int) -> str:
    kwargs = ' '.join(f'{name}={str(NETWORK[name]).replace(" ", "")}' for name in ('layers', 'channels'))
    return (
        f'--data-dir "{folder}" --device-modules timm_harmonic --model harm_resnet18 '
        f'--model-kwargs "{kwargs.split()[0]}" "{kwargs.split()[1]}" stem_pool={NETWORK["stem_pool"]} '
        f'--num-classes {num_classes} --in-chans 1 --input-size 1 {PATCH_SIZE} {PATCH_SIZE} '
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

    Everything random is derived from the seed: the training patches, the initialisation, the order and the crops.
    The models see the same patches in the same order.

    Args:
        seeds: Number of runs per model; the seeds are 0, 1, ...
        epochs: Passes over the training patches.
        train_per_class: Training patches of each photograph.
        models: Names out of `MODELS`.
        out: Folder for the two files.
        photographs: Gray pictures (H, W) by class name; None for those of `load_photographs`.
        test_per_class: Test patches of each photograph.

    Returns:
        What results.json holds.

    Raises:
        QuickstartError: If a package or a picture is missing, a picture has too few patches, or out cannot be
            written.
    """
    check_extras()
    from tqdm import tqdm

    models = list(dict.fromkeys(models))
    photographs = load_photographs() if photographs is None else photographs
    if train_per_class * len(photographs) < 2:
        raise QuickstartError('at least two training patches are needed.')
    out = _make_folder(out)
    runs: dict[str, list[Run]] = {name: [] for name in models}
    with reasonable_threads() as threads, tqdm(total=seeds * len(models) * epochs, unit='epoch') as bar:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                export_patches(folder, photographs, train_per_class, test_per_class, seed)
                for name in models:
                    bar.set_description(f'seed {seed + 1}/{seeds} {name}')
                    runs[name].append(_train(name, seed, epochs, folder, len(photographs), bar))
    options = dict(seeds=seeds, epochs=epochs, train_per_class=train_per_class, models=models)
    results = dict(
        note='Measured by this run on this machine; accuracies are percentages of the test patches.',
        options=options,
        network=NETWORK,
        recipe=RECIPE,
        environment=_environment(threads),
        data=dict(
            classes=list(photographs),
            patch_size=PATCH_SIZE,
            train_patches=train_per_class * len(photographs),
            test_patches=test_per_class * len(photographs),
            chance=100 / len(photographs),
        ),
        curve_epochs=_evaluated_epochs(epochs),
        models={name: _summary(name, runs) for name in models},
    )
    _write_whole(out / 'results.json', lambda path: path.write_text(json.dumps(results, indent=1) + '\n'))
    _write_whole(out / 'quickstart.png', lambda path: draw(results, {n: r[0].root for n, r in runs.items()}, path))
    _print_table(results)
    print(f'Wrote {out / "results.json"} and {out / "quickstart.png"}.')
    return results


def _evaluated_epochs(epochs: int) -> list[int]:
    """Epochs after which the test accuracy is measured, the last one included."""
    return sorted({max(1, round(epochs * i / _EVALUATIONS)) for i in range(1, _EVALUATIONS + 1)})


def _train(name: str, seed: int, epochs: int, folder: str, num_classes: int, bar: Any) -> Run:
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
    return Run(
        curve=curve,
        accuracy=curve[-1],
        fused_accuracy=accuracy_on(fused, *test),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
        root=fused.conv1.weight.detach(),
    )


def _environment(threads: int) -> dict[str, Any]:
    return dict(
        timm_harmonic=version('timm-harmonic'),
        torch=torch.__version__,
        timm=timm.__version__,
        scikit_image=version('scikit-image'),
        scikit_learn=version('scikit-learn'),
        python=platform.python_version(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        threads=threads,
    )


def _deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for a single value, which has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def _summary(name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    accuracy = [run.accuracy for run in runs[name]]
    fused = [run.fused_accuracy for run in runs[name]]
    gain = [run.accuracy - plain.accuracy for run, plain in zip(runs[name], runs.get('harm0', []), strict=False)]
    return dict(
        accuracy_mean=statistics.mean(accuracy),
        accuracy_deviation=_deviation(accuracy),
        accuracy=accuracy,
        fused_accuracy_mean=statistics.mean(fused),
        fused_accuracy=fused,
        gain_over_harm0=gain,
        parameters=runs[name][0].parameters,
        seconds=statistics.mean(run.seconds for run in runs[name]),
        curves=[run.curve for run in runs[name]],
        root_energy=energy_by_frequency(torch.cat([run.root for run in runs[name]])).tolist(),
    )


def _make_folder(path: Path | str) -> Path:
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuickstartError(f'cannot write results: {error}') from error
    return path


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file under another name and renames it: an interruption leaves no half of a file."""
    partial = path.with_name(f'.{path.name}.partial')
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _with_deviation(mean: float, deviation: float | None, form: str = '.1f') -> str:
    return f'{mean:{form}}' if deviation is None else f'{mean:{form}} ± {deviation:.1f}'


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

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
        gain = model['gain_over_harm0']
        table.add_row(
            name,
            _with_deviation(model['accuracy_mean'], model['accuracy_deviation']),
            _with_deviation(model['fused_accuracy_mean'], _deviation(model['fused_accuracy'])),
            '' if name == 'harm0' or not gain else _with_deviation(statistics.mean(gain), _deviation(gain), '+.1f'),
            f'{model["parameters"]:,}',
            f'{model["seconds"]:.1f}',
        )
    Console().print(table)
