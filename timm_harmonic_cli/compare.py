"""Compare plain and harmonic networks on your own images.

Every network gets the same images, the same number of epochs and the same search: the optimizer's usual
learning rate and weight decay, then a fixed sequence that covers their ranges (adamw: 0.0002 to 0.05 and
0.005 to 50; momentum: 0.002 to 0.5 and 0.00005 to 0.5), are tried on splits of the training images; for
auto, with smoothness 0.5, 1 and 0. Then each network is trained --seeds times on all training images
with its best setting. Batch-norm statistics are re-estimated on training images before every test. Test
images choose nothing: they are those of test/, else of validation/, which judges the settings if there are
both. Without these, each seed holds out its own quarter of each class, and has a search of its own: twice
the time. Reads whatever Pillow opens, TIFF with any bands or pages, and .npy (H, W, C). The same command
continues after an interruption, and with other --models adds networks to those in --out. Examples:

  timm-harmonic compare images/ --augment zoom --keep FOLDER
  timm-harmonic compare images/ --models resnet18 harm_resnet18:smoothness=0.5 --img-size 96
"""

import argparse
from pathlib import Path
from typing import Any

from . import add_models, add_shared, positive, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    folder = 'image folder: train/ and validation/ or test/, or class folders alone'
    add('folder', type=Path, metavar='DIR', help=folder)
    add_models(parser, 'harm0', 'harm', 'smooth')
    add('--out', type=Path, default=Path('compare'), metavar='DIR', help='folder for results (default: compare)')
    add('--trials', type=positive, default=8, metavar='N', help='settings tried for each network (default: 8)')
    add('--seeds', type=positive, default=5, metavar='N', help='runs of each network with its best one (default: 5)')
    add('--epochs', type=positive, default=60, metavar='N', help='epochs per run (default: 60)')
    add_shared(parser, '--batch-size', '--scale', '--skip-bad')
    augment = (
        'shift by an eighth, zoom (crops of 40 to 100 %% of the area), none, or strong: both, with light, cutout, '
        'mixup and label smoothing, for 150 --epochs or more (default: shift)'
    )
    add('--augment', choices=('shift', 'zoom', 'none', 'strong'), default='shift', help=augment)
    add('--no-flip', dest='flip', action='store_false', help='do not mirror images (digits, text)')
    add('--opt', choices=('adamw', 'momentum'), default='adamw', help="optimizer, by timm's name (default: adamw)")
    add('--img-size', type=positive, metavar='N', help="side of the images (default: the images' own, at most 64)")
    keep = 'folder to write the best network to, new or empty; test images have no part in the choice'
    add('--keep', type=Path, metavar='FOLDER', help=keep)
    add('--device', default='cpu', help='device to train on (default: cpu)')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Searches settings, trains every network, prints a table, and returns what results.json holds."""
    import dataclasses
    from functools import lru_cache

    from timm_harmonic.common import require
    from timm_harmonic.common.device import usable_device
    from timm_harmonic.common.files import check_new
    from timm_harmonic.common.progress import progress
    from timm_harmonic.export.folder import STEPS, Provenance, write_folder
    from timm_harmonic.small_data import protocol, results, tasks, training

    require(matplotlib='matplotlib', scipy='scipy')
    given = [training.network(text) for text in dict.fromkeys(args.models)]
    place = usable_device(args.device)
    if args.keep is not None:
        check_new(args.keep)
    task = tasks.read_folder(args.folder, args.img_size, args.skip_bad, args.out, args.scale)
    channels, size = task.train.pixels.shape[1], task.train.pixels.shape[-1]
    draw, nested = lru_cache(1)(task.draw), task.test is None
    train, test = draw(0)
    own = {key: getattr(args, key) for key in ('epochs', 'batch_size', 'opt', 'augment', 'flip')}
    recipe = training.Recipe(**own, **protocol.USUAL[args.opt])
    settings = dict(
        recipe=dataclasses.asdict(recipe),
        search=protocol.RANGES[args.opt],
        images=[protocol.fingerprint(of) for of in (task.train, task.test, task.validation) if of is not None],
    )
    store = protocol.Store(args.out / 'runs.json', settings, given)
    networks = [training.network(text) for text in store.networks]
    baseline = training.baseline(networks, len(task.classes), channels, size)
    results.open_folder(args.out)
    with progress(unit='epoch', smoothing=0.05) as bar:
        how: Any = dict(trials=args.trials, seeds=args.seeds, store=store, device=place, bar=bar)
        how |= dict(validation=task.validation, nested=nested)
        comparison = protocol.Protocol(draw, networks, task.classes, recipe, **how)
        bar.reset(comparison.epochs_left + (args.epochs if args.keep is not None else 0))
        runs = comparison.run_all()
        kept = None if args.keep is None else comparison.keep(task.train)
    covers = 'training noise; the one over images covers the choice of test images (paired bootstrap)'
    if nested:
        covers = 'training noise and the choice of images: each seed has its own split (Nadeau and Bengio 2003)'
    data = {key: task.config[key] for key in ('mean', 'std', 'scale')}
    data |= dict(img_size=size, notes=task.notes, skipped=task.skipped)
    found = results.report(comparison, runs, baseline, covers, same_test=not nested, **data)
    found['folder'] = str(args.folder)
    found['search'] = dict(ranges=protocol.RANGES[args.opt], trials=args.trials, seeds=args.seeds)
    if task.skipped:
        print(f'{len(task.skipped)} files were left out: {", ".join(task.skipped[:5])}')
    about = f'{len(train)} training and {len(test)} test images of {len(task.classes)} classes'
    show(results.table(found, about))
    mean, std = (' '.join(f'{value:.4g}' for value in data[key]) for key in ('mean', 'std'))
    scale = '' if data['scale'] is None else f' --scale {data["scale"]:g}'
    print(f'Images: --img-size {size} --mean {mean} --std {std}{scale}.', *task.notes, *results.advice(found), sep='\n')
    results.write_results(args.out, 'compare.png', found, about)
    if kept is not None:
        name, network = kept
        source = Provenance(base=f'{name}, trained on {len(task.train)} images by timm-harmonic compare')
        with progress(total=3, **STEPS) as steps:
            write_folder(network.cpu(), args.keep, source, steps, class_names=task.classes, data_config=task.config)
        print(f'Wrote {name}, which the search judged best, to {args.keep}. To use it:')
        print(f'timm-harmonic predict {args.keep} IMAGES')
    return found
