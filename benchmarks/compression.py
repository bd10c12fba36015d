"""What truncation costs in accuracy, on the quickstart's patches: against pruned channels and narrower networks.

    python -m benchmarks.compression --out benchmarks/results

A plain and a smooth network are trained by the quickstart's recipe. Then they are cut to shares of their parameters and
of their multiply-adds, in several ways. Each result is measured as cut, after some more epochs at a lower rate, and in
8-bit integers. Batch-norm statistics are re-estimated before every test. Seeds that are done are kept in --work.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from timm.models import reparameterize_model
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from timm_harmonic import deploy, export_onnx, harmonize, truncate
from timm_harmonic.conversion.costs import count_macs
from timm_harmonic.conversion.timing import times_of
from timm_harmonic.export.onnx import logits_of
from timm_harmonic.small_data.tasks import Images, load_photographs, patches
from timm_harmonic.small_data.training import Recipe, batches, evaluate, fit, one_thread, settled

from .environment import environment
from .files import write
from .smaller import narrower, network, pruned, with_statistics

# What is cut, and to which shares.
CUTS = (('parameters', 0.36), ('parameters', 0.2), ('macs', 0.4))
AXES = dict(parameters='parameters', macs='multiply-adds', time='time')
EPOCHS, MORE, MORE_LR = 30, 15, 1e-3
TRAIN, TEST = 10, 24  # patches of each photograph
SMOOTHNESS = 0.5
# What each method is called in tables, in their order.
METHODS = {
    'filters': 'levels by energy of the filters',
    'data': 'levels by error on training patches',
    'refit': 'refitted',
    'channels': 'functions of each channel, refitted',
    'smooth': f'smoothness {SMOOTHNESS}, refitted',
    'magnitude': 'pruned by magnitude',
    'group': 'pruned by group norm',
    'narrower': 'narrower, trained from scratch',
}
_OURS = tuple(METHODS)[:5]
_LOOKS = dict(
    filters=('#E69F00', 'v'),
    data=('#D55E00', 'o'),
    refit=('#0072B2', 's'),
    channels=('#CC79A7', '*'),
    smooth=('#56B4E9', '^'),
    magnitude=('#404040', 'x'),
    group=('#999999', 'P'),
    narrower=('#009E73', 'D'),
)


@dataclasses.dataclass(frozen=True)
class Sized:
    """A network, and its parameters, multiply-adds for one image, and time by that of the plain network."""

    model: nn.Module
    parameters: int
    macs: int
    time: float


def sized(models: list[nn.Module], deployed: list[nn.Module], plain: nn.Module, images: Tensor) -> list[Sized]:
    """Networks with their sizes. Multiply-adds and time are those of what is deployed, in turns with the plain one."""
    runs: dict[str, nn.Module] = dict(plain=plain, **{str(i): small for i, small in enumerate(deployed)})
    times = times_of(runs, images)
    found = []
    for i, (model, small) in enumerate(zip(models, deployed, strict=True)):
        ratio = statistics.median(a / b for a, b in zip(times[str(i)], times['plain'], strict=True))
        parameters = sum(p.numel() for p in model.parameters())
        found.append(Sized(model, parameters, count_macs(small, images), ratio))
    return found


def largest(candidates: list[Sized], axis: str, most: float) -> Sized:
    """The one that keeps most of the parameters of those that cost no more."""
    fitting = [of for of in candidates if getattr(of, axis) <= most]
    if not fitting:
        raise ValueError(f'no network costs at most {most} {axis}')
    return max(fitting, key=lambda of: of.parameters)


def ours(method: str, network: nn.Module, axis: str, share: float, images: Tensor, data: list[Tensor]) -> nn.Module:
    """A trained network, truncated by one of our methods."""
    options: dict[str, Any] = dict(ratio=share, cost=axis, images=None if axis == 'parameters' else images)
    if method != 'filters':
        options.update(data=data, refit=method != 'data', per='channel' if method == 'channels' else 'layer')
    return truncate(network, **options)


def one_seed(seed: int, normalization: str) -> list[dict[str, Any]]:
    """Every method at every cut, from one trained network and its smooth twin."""
    photographs = load_photographs()
    train, test = patches(photographs, TRAIN, seed, TEST)
    images, classes = train.pixels[:1], len(photographs)
    trained = {}
    for name, options in dict(
        plain=dict(), smooth=dict(harmonic_stem=True, harmonic_blocks=True, smoothness=SMOOTHNESS)
    ).items():
        random_seed(seed)
        trained[name] = network(classes, **options)
        trained[name] = fitted(trained[name], train, EPOCHS, seed)
    plain, smooth = trained['plain'], trained['smooth']
    harmonic = harmonize(plain, normalization=normalization)
    data = [pixels for pixels, _ in batches(train, Recipe(), seed, epoch=0)]
    random_seed(seed)
    others = {name: pruned(plain, images, name == 'group') for name in ('magnitude', 'group')}
    others['narrower'] = narrower(classes)
    candidates = {name: sized(models, models, plain, images) for name, models in others.items()}
    whole = sized([harmonic], [plain], plain, images)[0]
    rows = []

    def note(method: str, axis: str | None, share: float | None, of: Sized, deployed: nn.Module) -> None:
        from_start = method == 'narrower'
        model = copy.deepcopy(of.model)
        epochs, lr = (EPOCHS + MORE, Recipe.lr) if from_start else (MORE, MORE_LR)
        row = dict(seed=seed, method=method, axis=axis, share=share, time=of.time)
        row.update(parameters=of.parameters / whole.parameters, macs=of.macs / whole.macs)
        row['before'] = None if from_start else accuracy_on(model, test)
        model = fitted(model, train, epochs, seed, lr)
        row['after'] = accuracy_on(model, test)
        row['int8'] = accuracy_in_int8(model if from_start else deployed, data, test)
        rows.append(row)

    note('none', None, None, whole, plain)
    dense = deploy(smooth, form='dense')
    note('smooth', None, None, sized([smooth], [dense], plain, images)[0], dense)
    for axis, share in CUTS:
        for method in METHODS:
            if method in _OURS:
                small = ours(method, smooth if method == 'smooth' else harmonic, axis, share, images, data)
                deployed = reparameterize_model(small) if axis == 'macs' else deploy(small, images)
                of = sized([small], [deployed], plain, images)[0]
            else:
                of = largest(candidates[method], axis, share * getattr(whole, axis))
                if method != 'narrower':
                    of = dataclasses.replace(of, model=with_statistics(copy.deepcopy(of.model), data))
                deployed = of.model
            note(method, axis, share, of, deployed)
    return rows


def fitted(model: nn.Module, train: Images, epochs: int, seed: int, lr: float = Recipe.lr) -> nn.Module:
    """Trains a network. Returns it for evaluation, with statistics that are re-estimated."""
    recipe = Recipe(epochs=epochs, lr=lr)
    fit(model, train, recipe, seed)
    return settled(model, train, recipe, seed).eval()


def accuracy_on(model: nn.Module, test: Images) -> float:
    """Percentage of the test patches."""
    return evaluate(model, test)[0]


def accuracy_in_int8(model: nn.Module, data: list[Tensor], test: Images) -> float:
    """Percentage of the test patches, in ONNX Runtime in 8-bit integers."""
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, data[0], file := Path(folder, 'int8.onnx'), int8=data)
        predicted = logits_of(file, test.pixels).argmax(1)
    return 100 * (predicted == test.labels).float().mean().item()


def kept(seed: int, options: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """Rows of a seed: measured, or as they were kept."""
    path = work / f'compression-{seed}.json'
    if path.exists() and (saved := json.loads(path.read_text()))['options'] == options:
        return saved['rows']
    with one_thread():
        rows = one_seed(seed, options['normalization'])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(options=options, rows=rows)))
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method at each cut."""
    found = []
    for axis, share, method in dict.fromkeys((row['axis'], row['share'], row['method']) for row in rows):
        of = [row for row in rows if (row['axis'], row['share'], row['method']) == (axis, share, method)]
        entry = dict(axis=axis, share=share, method=method)
        entry.update({size: statistics.mean(row[size] for row in of) for size in AXES})
        for when in ('before', 'after', 'int8'):
            values = [row[when] for row in of if row[when] is not None]
            entry[when] = statistics.mean(values) if values else None
            entry[f'{when}_deviation'] = statistics.stdev(values) if len(values) > 1 else None
        found.append(entry)
    return found


def cell(mean: float | None, deviation: float | None) -> str:
    """A figure with its deviation, as in the tables."""
    return '' if mean is None else f'{mean:.1f}' + ('' if deviation is None else f' ± {deviation:.1f}')


def title_of(row: dict[str, Any]) -> str:
    """What a row's method is called."""
    uncut = dict(none='nothing cut', smooth=f'smoothness {SMOOTHNESS}, nothing cut')
    return uncut[row['method']] if row['axis'] is None else METHODS[row['method']]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env, options = report['environment'], report['options']
    lines = [
        '# Truncation against pruned channels, narrower networks and 8-bit integers',
        '',
        f'Measured on {env["processor"]}, torch {env["torch"]}, timm {env["timm"]}, {env["date"]}, two seeds at a time '
        f'with one thread each: {options["seeds"]} seeds, each with its own training patches ({TRAIN} of each of '
        f'{options["classes"]} photographs), the same {TEST * options["classes"]} test patches. The network is that of '
        f'the quickstart at twice its width. It is trained for {EPOCHS} epochs, then cut, then trained for {MORE} more '
        f'epochs at a rate of {MORE_LR}. Batch-norm statistics are re-estimated on training patches before every test. '
        f'Basis of what is truncated: {options["normalization"]}. Test accuracy in percent, mean ± standard deviation '
        'over seeds. Sizes are in percent of the plain network. Time is in torch, batch 1, of the deployed network.',
        '',
        'No way of cutting sees a label. Levels by error, refitting, the statistics of batch normalisation (refitted '
        'and pruned networks) and the ranges of 8-bit integers come from the training patches. Pruned: by '
        'Torch-Pruning, the same share of the channels in each layer. Narrower: all stages with fewer channels, '
        f'trained from the start for as many epochs as the others together, {EPOCHS + MORE}. In int8: by ONNX Runtime, '
        'static, the network as cut, and the narrower one as trained.',
        '',
        '| cut | method | parameters | multiply-adds | time | as cut | after fine-tuning | int8 |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for row in report['summary']:
        cut = '' if row['axis'] is None else f'{100 * row["share"]:.0f} % of the {AXES[row["axis"]]}'
        sizes = ' | '.join(f'{100 * row[size]:.0f} %' for size in AXES)
        figures = ' | '.join(cell(row[when], row[f'{when}_deviation']) for when in ('before', 'after', 'int8'))
        lines.append(f'| {cut} | {title_of(row)} | {sizes} | {figures} |')
    return '\n'.join(lines) + '\n'


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws accuracy against parameters and time, as cut and after fine-tuning, of networks cut by parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout='constrained')
    whole, *rows = report['summary']
    rows = [row for row in rows if row['axis'] == 'parameters']
    moments = dict(before='as cut', after='after fine-tuning')
    for of_moment, (when, title) in zip(figure.subplots(2, 2, sharey='row'), moments.items(), strict=True):
        for axes, size in zip(of_moment, ('parameters', 'time'), strict=True):
            axes.axhline(whole[when], color='0.5', linestyle=':', linewidth=1, label='plain network, nothing cut')
            for method, (colour, marker) in _LOOKS.items():
                line = sorted(
                    (100 * row[size], row[when]) for row in rows if row['method'] == method and row[when] is not None
                )
                if line:
                    axes.plot(
                        *zip(*line, strict=True), color=colour, marker=marker, linewidth=1.2, label=METHODS[method]
                    )
            axes.set(xlabel=f'{size}, % of the plain network', xlim=(0, 100), title=title)
            axes.grid(color='0.92')
            axes.set_axisbelow(True)
            axes.spines[['top', 'right']].set_visible(False)
        of_moment[0].set_ylabel('test accuracy, %')
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False, fontsize=9)
    title = (
        f'Networks cut to 36 and 20 % of their parameters, means of {report["options"]["seeds"]} seeds: '
        'left and high is better. Mind the scales of accuracy.'
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format='png', dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.compression', description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', type=int, default=8, metavar='N')
    parser.add_argument('--normalization', default='ortho', choices=('l1', 'ortho'), help='of the truncated networks')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='seeds at a time, a thread each')
    parser.add_argument(
        '--work', type=Path, default=Path('build/compression'), metavar='DIR', help='seeds that are done'
    )
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for compression.json, .md and .png')
    show = 'print the table of a saved run, write it and the picture to --out, run nothing'
    parser.add_argument('--show', type=Path, metavar='JSON', help=show)
    args = parser.parse_args()
    if args.show:
        write(json.loads(args.show.read_text()), table, args.out, 'compression', plot)
        return
    of_seed = dict(normalization=args.normalization, cuts=list(map(list, CUTS)), epochs=[EPOCHS, MORE])
    options = dict(of_seed, seeds=args.seeds, classes=len(load_photographs()))
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) if args.jobs > 1 else nullcontext() as pool:
        found = (pool.map if pool else map)(partial(kept, options=of_seed, work=args.work), range(args.seeds))
        rows = [row for of in tqdm(found, total=args.seeds, unit='seed') for row in of]
    report: dict[str, Any] = dict(environment=environment(), options=options, rows=rows, summary=summary(rows))
    write(report, table, args.out, 'compression', plot)


if __name__ == '__main__':
    main()
