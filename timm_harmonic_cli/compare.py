"""Plain against harmonic on a user's own images: `timm-harmonic compare`."""

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from timm_harmonic.common import InputError
from timm_harmonic.common.device import usable_device
from timm_harmonic.common.files import write_whole
from timm_harmonic.common.progress import progress
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.small_data.protocol import (
    INNER_SHARE,
    INNER_SPLITS,
    RANGES,
    Protocol,
    Store,
    curve_epochs,
    fingerprint,
    setting,
)
from timm_harmonic.small_data.results import draw_comparison, environment, summarise, table
from timm_harmonic.small_data.tasks import Folder, read_folder, stratified
from timm_harmonic.small_data.training import ZOOM, Images, Network, Recipe, network

MODELS = ('harm0', 'harm', 'smooth')
_TEST_SHARE = 0.25  # of a folder without splits
_EXTRAS = dict(matplotlib='matplotlib', scipy='scipy', tifffile='tifffile')


def compare(
    folder: Path,
    out: Path,
    models: Sequence[str] = MODELS,
    *,
    trials: int = 8,
    seeds: int = 5,
    epochs: int = 60,
    batch_size: int = 32,
    augment: str = 'shift',
    flip: bool = True,
    opt: str = 'adamw',
    img_size: int | None = None,
    time_limit: float | None = None,
    device: str = 'cpu',
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Searches settings and trains every network on the images of a folder, prints a table, writes JSON and a picture.

    Options are those of `timm-harmonic compare`. Returns what results.json holds. Raises InputError if the images are
    not fit for it, InputError if it cannot be made in the time or `out` has another comparison, ValueError if a
    network is unknown.
    """
    missing = [package for module, package in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f'missing packages: pip install {" ".join(missing)}')
    networks = [network(text) for text in dict.fromkeys(models)]
    place = usable_device(device)
    images = read_folder(folder, img_size, skip_bad, but=out)
    for net in networks:
        net.check(len(images.classes), images.channels, images.size)
    train, test, validation, mean, std = _prepare(images)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, opt=opt, augment=augment, flip=flip)
    settings: dict[str, Any] = dict(
        recipe=dataclasses.asdict(recipe), networks={n.name: [n.model, n.options] for n in networks}
    )
    settings |= dict(images=[fingerprint(images) for images in (train, test, validation) if images is not None])
    store = Store(out / 'runs.jsonl', settings)
    with progress(unit='epoch', smoothing=0.05) as bar:
        protocol = Protocol(
            lambda seed: (train, test),
            networks,
            images.classes,
            recipe,
            trials,
            seeds,
            store,
            place,
            validation=validation,
            describe=bar.set_description,
            after_epoch=lambda epoch: bar.update(),
        )
        if time_limit is not None:
            protocol.fit_into(60 * time_limit)
        bar.reset(_epochs_left(protocol))
        runs = protocol.run_all()
    baseline = _baseline(networks, len(images.classes), images.channels)
    found = {net.name: dict(summarise(runs[net.name], runs[baseline]), **_chosen(protocol, net)) for net in networks}
    results = dict(
        note='Measured by this run on this machine; accuracies are percentages of the test images.',
        folder=str(folder),
        recipe=dataclasses.asdict(recipe),
        search=_search(protocol, trials, seeds),
        environment=environment(),
        data=_data(images, train, test, mean, std),
        baseline=baseline,
        curve_epochs=curve_epochs(epochs),
        networks=found,
    )
    results['command'] = _command(folder, images, results, {net.name: net for net in networks})
    write_whole(out / 'results.json', lambda path: path.write_text(json.dumps(results, indent=1) + '\n'))
    write_whole(out / 'compare.png', lambda path: draw_comparison(results, path))
    _print(results, out)
    return results


def _prepare(images: Folder) -> tuple[Images, Images, Images | None, list[float], list[float]]:
    """Training, test and validation images, normalised by the training images, with mean and deviation of these."""
    splits = dict(images.splits)
    if 'test' not in splits and 'validation' in splits:
        splits['test'] = splits.pop('validation')
    if 'test' not in splits:
        pixels, labels = splits['train']
        kept, out = stratified(labels, _TEST_SHARE, 0, images.classes)
        splits = dict(train=(pixels[kept], labels[kept]), test=(pixels[out], labels[out]))
    wide = splits['train'][0].double()  # sums of large values leave float32
    mean, std = (of(wide, dim=(0, 2, 3), keepdim=True).float() for of in (torch.mean, torch.std))
    if (std == 0).any():
        raise InputError(f'channel {int((std == 0).flatten().nonzero()[0])} is the same everywhere: leave it out.')

    def normalised(pixels: Tensor, labels: Tensor) -> Images:
        return Images((pixels - mean) / std, labels)

    ready = {split: normalised(*of) for split, of in splits.items()}
    if 'validation' not in ready:
        stratified(ready['train'].labels, INNER_SHARE, 0, images.classes)  # raises before anything is trained
    return ready['train'], ready['test'], ready.get('validation'), mean.flatten().tolist(), std.flatten().tolist()


def _epochs_left(protocol: Protocol) -> int:
    """Epochs that are still to be trained."""
    done = sum(key.startswith(('search', 'final')) for key in protocol.store.results)
    runs = len(protocol.networks) * (protocol.trials * protocol.splits + protocol.seeds)
    return max(0, runs - done) * protocol.recipe.epochs


def _baseline(networks: Sequence[Network], num_classes: int, channels: int) -> str:
    """The first network without a harmonic layer, else the first."""
    for net in networks:
        if not harmonic_layers(net.build(num_classes, channels, 0)):
            return net.name
    return networks[0].name


def _chosen(protocol: Protocol, net: Network) -> dict[str, Any]:
    best = protocol.best(net) if protocol.trials else 0
    recipe = setting(protocol.recipe, best)
    tried = [(setting(protocol.recipe, trial), protocol.trial(net, trial)[0]) for trial in range(protocol.trials)]
    searched = [dict(lr=of.lr, weight_decay=of.weight_decay, accuracy=judged) for of, judged in tried]
    return dict(model=net.model, options=net.options, lr=recipe.lr, weight_decay=recipe.weight_decay, trials=searched)


def _search(protocol: Protocol, trials: int, seeds: int) -> dict[str, Any]:
    (lr, weight_decay) = RANGES[protocol.recipe.opt]
    judged = 'validation/' if protocol.validation is not None else f'{INNER_SPLITS} inner splits of the training images'
    left_out = dict(trials=trials - protocol.trials, seeds=seeds - protocol.seeds)
    counts = dict(trials=protocol.trials, seeds=protocol.seeds, left_out=left_out)
    return dict(lr=lr, weight_decay=weight_decay, judged_by=judged, **counts)


def _data(images: Folder, train: Images, test: Images, mean: list[float], std: list[float]) -> dict[str, Any]:
    counts = dict(train=len(train), test=len(test), channels=images.channels, img_size=images.size)
    about = dict(classes=images.classes, mean=mean, std=std, skipped=images.skipped, splits=images.names)
    return dict(counts, chance=100 * max(torch.bincount(test.labels).tolist()) / len(test), **about)


def _command(folder: Path, images: Folder, results: dict[str, Any], networks: dict[str, Network]) -> str:
    """timm's train.py with the best network at 224 pixels; empty if its loader cannot read the images.

    train.py does not shift images. Crops as small as what a shift leaves visible stand in for that.
    """
    if not images.plain_files:
        return ''
    name, of = max(results['networks'].items(), key=lambda item: item[1]['accuracy_mean'])
    recipe, net = results['recipe'], networks[name]
    options = [f'{key}={str(value).replace(" ", "")}' for key, value in net.options.items()]
    words = ['python', 'train.py', '--data-dir', str(folder)]
    for option, split in (('train', images.names.get('train')), ('val', _judging(images))):
        words += [f'--{option}-split', split] if split not in (None, 'train', 'validation') else []
    words += ['--device-modules', 'timm_harmonic', '--model', net.model]
    words += ['--model-kwargs', *options] if options else []
    words += f'--num-classes {len(images.classes)} --in-chans {images.channels}'.split()
    words += f'--input-size {images.channels} 224 224'.split()
    for key in ('mean', 'std'):
        words += [f'--{key}', *(f'{value / 255:.4f}' for value in results['data'][key])]
    words += f'--opt {recipe["opt"]} --lr {of["lr"]:.2g} --weight-decay {of["weight_decay"]:.2g}'.split()
    words += f'--sched cosine --epochs {recipe["epochs"]} --batch-size {recipe["batch_size"]}'.split()
    words += f'--warmup-epochs {round(recipe["warmup_share"] * recipe["epochs"])} --smoothing 0'.split()
    words += f'--color-jitter 0 --hflip {0.5 if recipe["flip"] else 0} --train-interpolation bicubic'.split()
    scale = dict(shift=f'{(1 - 1 / 8) ** 2:.2f} 1 --ratio 1 1', zoom=' '.join(map(str, ZOOM)), none='1 1 --ratio 1 1')
    words += f'--scale {scale[recipe["augment"]]}'.split()
    return shlex.join(words)


def _judging(images: Folder) -> str | None:
    """Name of the folder that train.py is to validate on."""
    return images.names.get('validation', images.names.get('test'))


def _print(results: dict[str, Any], out: Path) -> None:
    data, search = results['data'], results['search']
    console = Console(markup=False, emoji=False)
    if data['skipped']:
        console.print(f'{len(data["skipped"])} files were left out: {", ".join(data["skipped"][:5])}', highlight=False)
    title = (
        f'Measured here: {search["seeds"]} seeds, {data["train"]} training and {data["test"]} test images, '
        f'{len(data["classes"])} classes, the largest has {data["chance"]:.1f} %'
    )
    caption = (
        f'mean ± standard deviation; difference to {results["baseline"]}, paired by seed, with its 95 % interval; '
        f'learning rate and weight decay are the best of {search["trials"]} for each network'
    )
    console.print(table(results['networks'], results['baseline'], title, caption, fused=False))
    if any(search['left_out'].values()):
        left = search['left_out']
        console.print(f'Left out for the time limit: {left["trials"]} trials and {left["seeds"]} seeds a network.')
    if results['command']:
        print(f"The best network at 224 pixels, by timm's train.py:\n{results['command']}")
        if not results['data']['splits']:
            print(
                'Without train/ and validation/ it validates on the images that it trains on: split the folder first.'
            )
    else:
        print(
            "timm's train.py does not read these files: its loader takes .png, .jpg and .jpeg of one or three channels "
            'and 8 bits.'
        )
    print(f'Wrote {out / "results.json"} and {out / "compare.png"}.')
