"""Compare small plain and harmonic networks on photographs.

Trains the same small ResNet as harm0 (nothing is harmonic), harm1 (only the stem is), harm (every
k x k convolution is) and smooth (harm with smoothness 0.5) to tell which photograph a patch of 48 x 48
gray pixels is from. The photographs come with scikit-image and scikit-learn: nothing is downloaded.
Training patches are from the left half of each photograph, test patches from the right half. Every seed
draws new patches, initial weights and order, the same for all networks. Batch-norm statistics are
re-estimated on training patches before every test. Takes two minutes on two CPU cores. Examples:

  timm-harmonic quickstart
  timm-harmonic quickstart --export patches
"""

import argparse
from pathlib import Path
from typing import Any

from . import add_models, positive, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--seeds', type=positive, default=3, metavar='N', help='runs per network (default: 3)')
    add('--epochs', type=positive, default=20, metavar='N', help='epochs per run (default: 20)')
    per_class = 'training patches from each photograph (default: 10, at most 24)'
    add('--train-per-class', type=positive, default=10, metavar='N', help=per_class)
    add_models(parser, 'harm0', 'harm1', 'harm', 'smooth')
    out = 'folder for results.json and quickstart.png, which are overwritten (default: quickstart)'
    add('--out', type=Path, default=Path('quickstart'), metavar='DIR', help=out)
    export = (
        'only write the patches of the first seed as an image folder, new or empty, and print a command that trains on '
        "them with timm's train.py"
    )
    add('--export', type=Path, metavar='DIR', help=export)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains every network with every seed, prints a table, and returns what results.json holds."""
    if args.export is not None:
        export(args.export, args.train_per_class)
        return None

    from functools import cache

    from timm_harmonic.common import InputError, require
    from timm_harmonic.common.progress import progress
    from timm_harmonic.small_data import protocol, results, tasks, training

    require(matplotlib='matplotlib', scipy='scipy', skimage='scikit-image', sklearn='scikit-learn')
    networks = [training.network(name) for name in dict.fromkeys(args.models)]
    if searched := [net.name for net in networks if net.auto]:
        raise InputError(f'{searched[0]} needs a search, which the quickstart does not make: use compare.')
    photographs = tasks.load_photographs()
    recipe = training.Recipe(epochs=args.epochs)
    draw = cache(lambda seed: tasks.patches(photographs, args.train_per_class, seed))
    train, test = draw(0)
    covers = 'training noise and the choice of patches, not of photographs'
    with training.one_thread(), progress(total=args.seeds * len(networks) * args.epochs, unit='epoch') as bar:
        baseline = training.baseline(networks, len(photographs), 1, tasks.PATCH_SIZE)
        results.open_folder(args.out)
        comparison = protocol.Protocol(draw, networks, list(photographs), recipe, 0, args.seeds, bar=bar)
        found = results.report(comparison, comparison.run_all(), baseline, covers)
    about = f'{len(train)} training and {len(test)} test patches'
    show(results.table(found, about))
    results.write_results(args.out, 'quickstart.png', found, about)
    return found


def export(folder: Path, train_per_class: int) -> None:
    """Writes the patches of the first seed as an image folder, and prints a train.py command for it."""
    from timm_harmonic.small_data.tasks import PATCH_SIZE, export_patches, load_photographs

    photographs = load_photographs()
    counts = export_patches(folder, photographs, train_per_class)
    print(
        f'Wrote {counts["train"]} training and {counts["validation"]} test patches to {folder}. Train on them, in a '
        f'clone of timm-harmonic with train.py of timm:\n'
        f'python train.py -c train_configs/small_data.yaml --data-dir "{folder}" --num-classes {len(photographs)} '
        f'--in-chans 1 --input-size 1 {PATCH_SIZE} {PATCH_SIZE} --mean 0.449 --std 0.226 --device cpu'
    )
