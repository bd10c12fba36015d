"""The quickstart: the same small ResNet, plain and harmonic, on few natural images."""

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from timm_harmonic.common import InputError
from timm_harmonic.common.files import write_whole
from timm_harmonic.common.progress import progress
from timm_harmonic.small_data.protocol import curve_epochs, run
from timm_harmonic.small_data.results import draw_quickstart, energy_by_frequency, environment, summarise, table
from timm_harmonic.small_data.tasks import (
    PATCH_SIZE,
    TEST_PER_CLASS,
    cut,
    draw_patches,
    export_patches,
    load_photographs,
)
from timm_harmonic.small_data.training import MEANINGS, NAMED, Images, Recipe, network, one_thread

MODELS = tuple(MEANINGS)
# One recipe for all, the same for plain and harmonic networks. `timm-harmonic compare` searches it for each.
RECIPE = Recipe()
_BASELINE = 'harm0'
# Packages that only the quickstart needs, by the name of their module.
_EXTRAS = dict(matplotlib='matplotlib', skimage='scikit-image', sklearn='scikit-learn')
# How timm's train.py prepares the patches: about their mean and deviation, of 255.
_MEAN, _STD = 0.449, 0.226


def _check_extras() -> None:
    missing = [package for module, package in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f'missing packages: pip install {" ".join(missing)}')


def export(folder: Path, train_per_class: int) -> None:
    """Writes the patches of the first seed as an image folder, and prints a command of timm's train.py for it."""
    _check_extras()
    photographs = load_photographs()
    counts = export_patches(folder, photographs, train_per_class)
    options = [f'"{key}={str(value).replace(" ", "")}"' for key, value in NAMED['smooth'].items()]
    print(
        f'Wrote {counts["train"]} training and {counts["validation"]} test patches to {folder}. Train on them:\n'
        f'python train.py --data-dir "{folder}" --device-modules timm_harmonic --model harm_resnet18 '
        f'--model-kwargs {" ".join(options)} '
        f'--num-classes {len(photographs)} --in-chans 1 --input-size 1 {PATCH_SIZE} {PATCH_SIZE} '
        f'--mean {_MEAN} --std {_STD} --crop-pct 1 --batch-size {RECIPE.batch_size} '
        f'--opt {RECIPE.opt} --lr {RECIPE.lr} --weight-decay {RECIPE.weight_decay} '
        f'--sched cosine --epochs {RECIPE.epochs} --warmup-epochs {RECIPE.epochs // 10} --smoothing 0 '
        f'--scale 1 1 --ratio 1 1 --color-jitter 0 --workers 2 --device cpu'
    )


def patches(photographs: dict[str, np.ndarray], count: int, seed: int, test_count: int) -> tuple[Images, Images]:
    """Training patches of a seed, `count` of each picture, and the test patches: normalised by the training patches."""
    splits = dict(train=(count, seed), validation=(test_count, 0))
    found = []
    for split, (number, of_seed) in splits.items():
        corners = draw_patches(photographs, split, number, of_seed)
        cuts = [cut(photographs[name], corner) for name, of in corners.items() for corner in of]
        labels = [label for label, of in enumerate(corners.values()) for _ in of]
        found.append((torch.from_numpy(np.stack(cuts)).float().unsqueeze(1), torch.tensor(labels)))
    mean, std = found[0][0].mean(), found[0][0].std()
    train, test = (Images((pixels - mean) / std, labels) for pixels, labels in found)
    return train, test


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

    Everything random follows from the seed: the training patches, the initialisation, the order and the shifts. The
    models see the same patches in the same order. Options are those of `timm-harmonic quickstart`; photographs are gray
    pictures (H, W) by class name. Returns what results.json holds. Raises InputError if a package or a picture is
    missing, a picture has too few patches, or the folder cannot be written.
    """
    _check_extras()
    networks = [network(name) for name in dict.fromkeys(models)]
    photographs = load_photographs() if photographs is None else photographs
    if train_per_class * len(photographs) < 2:
        raise InputError('at least two training patches are needed.')
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # before the training, not after it
    except OSError as error:
        raise InputError(f'cannot write results: {error}') from error
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    runs: dict[str, list[dict[str, Any]]] = {net.name: [] for net in networks}
    stems: dict[str, list[Tensor]] = {net.name: [] for net in networks}
    with one_thread(), progress(total=seeds * len(networks) * epochs, unit='epoch') as bar:
        for seed in range(seeds):
            images = patches(photographs, train_per_class, seed, test_per_class)
            for net in networks:
                bar.set_description(f'seed {seed + 1}/{seeds} {net.name}')
                measured, fused = run(net, *images, len(photographs), recipe, seed, lambda epoch: bar.update())
                runs[net.name].append(measured)
                stems[net.name].append(fused.conv1.weight.detach())
        about = environment()
    counts = dict(train_patches=train_per_class * len(photographs), test_patches=test_per_class * len(photographs))
    found = {}
    for name, of_network in runs.items():
        energy = energy_by_frequency(torch.cat(stems[name])).tolist()
        found[name] = dict(summarise(of_network, runs.get(_BASELINE)), stem_energy=energy)
    results = dict(
        note='Measured by this run on this machine; accuracies are percentages of the test patches.',
        options=dict(
            seeds=seeds, epochs=epochs, train_per_class=train_per_class, models=[net.name for net in networks]
        ),
        recipe=dataclasses.asdict(recipe),
        environment=about,
        data=dict(classes=list(photographs), patch_size=PATCH_SIZE, **counts, chance=100 / len(photographs)),
        curve_epochs=curve_epochs(epochs),
        networks=found,
    )
    first = {name: of[0] for name, of in stems.items()}
    write_whole(out / 'results.json', lambda path: path.write_text(json.dumps(results, indent=1) + '\n'))
    write_whole(out / 'quickstart.png', lambda path: draw_quickstart(results, first, path))
    title = (
        f'Measured here: {seeds} seed{"s" if seeds > 1 else ""}, {counts["train_patches"]} training and '
        f'{counts["test_patches"]} test patches, chance {100 / len(photographs):.1f} %'
    )
    caption = 'mean ± standard deviation; differences are paired by seed, with their 95 % interval'
    Console().print(table(found, _BASELINE, title, caption if seeds > 1 else 'one seed'))
    print(f'Wrote {out / "results.json"} and {out / "quickstart.png"}.')
    return results
