"""What truncation costs in accuracy, on the quickstart's patches: against pruned filters and a narrower network.

    python -m benchmarks.compression --out benchmarks/results

A plain network is trained by the quickstart's recipe. Then its parameters are cut in several ways to the same numbers,
those of the levels 3, 2 and 1, and each result is measured as it is and after some more epochs at a lower rate.
"""

import argparse
import copy
import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import reparameterize_model
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from timm_harmonic import harmonize, truncate
from timm_harmonic.small_data.networks import NAMED
from timm_harmonic.small_data.photographs import load_photographs
from timm_harmonic.small_data.quickstart import RECIPE, patches
from timm_harmonic.small_data.training import Images, batches, evaluate, fit, one_thread

from .environment import environment
from .files import write

LEVELS = (3, 2, 1)
EPOCHS, MORE, MORE_LR = 30, 15, 1e-3
TRAIN, TEST = 10, 24  # patches of each photograph
# What each method is called in tables, in their order.
METHODS = {
    'level': 'one level for all layers',
    'weights': 'levels by energy of the filters',
    'data': 'levels by error on training patches',
    'filters': 'pruned filters',
    'narrower': 'narrower network, trained anew',
}


def count(model: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in model.parameters())


def plain(num_classes: int, share: float = 1.0) -> nn.Module:
    """The quickstart's network without anything harmonic, its stages this much narrower."""
    options = dict(NAMED['harm0'], channels=tuple(max(1, round(c * share)) for c in NAMED['harm0']['channels']))
    return timm.create_model('harm_resnet18', num_classes=num_classes, in_chans=1, **options)


def narrower(num_classes: int, parameters: int) -> nn.Module:
    """The widest such network with at most so many parameters."""
    for share in (i / 200 for i in range(200, 0, -1)):
        with torch.device('meta'):
            size = count(plain(num_classes, share))
        if size <= parameters:
            return plain(num_classes, share)
    raise ValueError(f'no network has at most {parameters} parameters')


def without_filters(model: nn.Module, parameters: int) -> nn.Module:
    """A copy in which blocks lose the filters with the smallest l1 norm, the same share in each.

    Only the filters between the two convolutions of a block can go: the others feed the sum of the residual
    connection. By magnitude and without regard for data, as Li et al., arXiv:1608.08710.
    """
    for share in (i / 200 for i in range(200, 0, -1)):
        small = build_without(model, [max(1, round(block.conv1.out_channels * share)) for block in blocks(model)])
        if count(small) <= parameters:
            return small
    raise ValueError(f'blocks with one filter each still leave more than {parameters} parameters')


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The residual blocks of a network."""
    return [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]


def build_without(model: nn.Module, kept: list[int]) -> nn.Module:
    """A copy of a network whose blocks have only so many inner channels, those with the strongest filters."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, number in zip(blocks(model), kept, strict=True):
            first, norm, second = block.conv1, block.bn1, block.conv2
            strongest = first.weight.abs().sum((1, 2, 3)).argsort(descending=True)[:number].sort().values
            first.weight = nn.Parameter(first.weight[strongest])
            second.weight = nn.Parameter(second.weight[:, strongest])
            for name in ('weight', 'bias'):
                setattr(norm, name, nn.Parameter(getattr(norm, name)[strongest]))
            norm.running_mean, norm.running_var = norm.running_mean[strongest], norm.running_var[strongest]
            first.out_channels = second.in_channels = norm.num_features = number
    return model.eval()


def one_seed(seed: int, photographs: dict[str, Any], normalization: str, bar: tqdm) -> list[dict[str, Any]]:
    """Every method at every size, from one trained network."""
    classes = len(photographs)
    train, test = patches(photographs, TRAIN, seed, TEST)
    random_seed(seed)
    trained = plain(classes)
    fit(trained, train, dataclasses.replace(RECIPE, epochs=EPOCHS), seed)
    harmonic = harmonize(trained.eval(), normalization=normalization)
    calibration = [pixels for pixels, _ in batches(train, RECIPE, seed, epoch=0)]
    rows = []

    def note(method: str, level: int | None, model: nn.Module, before: float | None, epochs: int) -> None:
        lr = MORE_LR if before is not None else RECIPE.lr
        fit(model, train, dataclasses.replace(RECIPE, epochs=epochs, lr=lr), seed)
        after = accuracy_on(model, test)
        rows.append(dict(seed=seed, method=method, level=level, parameters=count(model), before=before, after=after))
        bar.update()

    note('none', None, trained, accuracy_on(harmonic, test), MORE)
    for level in LEVELS:
        low = truncate(harmonic, level=level)
        size = count(low)
        models = dict(
            level=low,
            weights=truncate(harmonic, max_params=size),
            data=truncate(harmonic, max_params=size, data=calibration),
            filters=without_filters(reparameterize_model(harmonic), size),  # the plain network, not trained on
        )
        for method, model in models.items():
            note(method, level, model, accuracy_on(model, test), MORE)
        random_seed(seed)
        note('narrower', level, narrower(classes, size), None, EPOCHS + MORE)
    return rows


def accuracy_on(model: nn.Module, test: Images) -> float:
    """Percentage of the test patches."""
    return evaluate(model, test)[0]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method at each size."""
    found = []
    for level in (None, *LEVELS):
        for method in ('none', *METHODS):
            of = [row for row in rows if (row['method'], row['level']) == (method, level)]
            if of:
                entry = dict(method=method, level=level, parameters=round(statistics.mean(r['parameters'] for r in of)))
                for when in ('before', 'after'):
                    values = [row[when] for row in of if row[when] is not None]
                    entry[when] = statistics.mean(values) if values else None
                    entry[f'{when}_deviation'] = statistics.stdev(values) if len(values) > 1 else None
                found.append(entry)
    return found


def cell(mean: float | None, deviation: float | None) -> str:
    """A figure with its deviation, as in the tables."""
    return '' if mean is None else f'{mean:.1f}' + ('' if deviation is None else f' ± {deviation:.1f}')


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env, options = report['environment'], report['options']
    lines = [
        '# Truncation against pruned filters and narrower networks',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} thread, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}: {options["seeds"]} seeds, each with its own training patches ({TRAIN} of each of '
        f'{options["classes"]} photographs), the same {TEST * options["classes"]} test patches. Plain network of the '
        f'quickstart, {EPOCHS} epochs; then cut; then {MORE} more epochs at a rate of {MORE_LR}. Basis: '
        f'{options["normalization"]}. Test accuracy in percent, mean ± standard deviation over seeds.',
        '',
        'Pruned filters: between the two convolutions of each block, those with the smallest l1 norm, the same share '
        'in each block (arXiv:1608.08710). Narrower: all stages with fewer channels, trained from the start for as '
        f'many epochs as the others together, {EPOCHS + MORE}.',
        '',
        '| size | method | parameters | as it is | after fine-tuning |',
        '|---|---|---|---|---|',
    ]
    for row in report['summary']:
        size = 'all' if row['level'] is None else f'of level {row["level"]}'
        method = METHODS.get(row['method'], 'nothing cut')
        figures = ' | '.join(cell(row[when], row[f'{when}_deviation']) for when in ('before', 'after'))
        lines.append(f'| {size} | {method} | {row["parameters"]:,} | {figures} |')
    return '\n'.join(lines) + '\n'


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy against parameters, as it is and after fine-tuning."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks = (('#E69F00', 'v'), ('#D55E00', 'o'), ('#0072B2', 's'), ('#404040', 'x'), ('#009E73', 'D'))
    styles, titles = dict(zip(METHODS, looks, strict=True)), dict(before='as it is', after='after fine-tuning')
    figure = Figure(figsize=(11, 4.6), layout='constrained')
    FigureCanvasAgg(figure)
    whole = report['summary'][0]
    for axes, (when, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.axhline(whole[when], color='0.5', linestyle=':', linewidth=1, label='nothing cut')
        for place, (method, (colour, marker)) in enumerate(styles.items()):
            rows = [row for row in report['summary'] if row['method'] == method and row[when] is not None]
            if rows:
                x = [row['parameters'] / whole['parameters'] * 100 + place * 0.35 - 0.7 for row in rows]
                y, error = [row[when] for row in rows], [row[f'{when}_deviation'] or 0 for row in rows]
                axes.errorbar(x, y, error, color=colour, marker=marker, capsize=2, linewidth=1.4, label=METHODS[method])
        axes.set(xlabel='parameters, % of the plain network', title=title, xlim=(0, 100))
        axes.grid(color='0.92')
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
    figure.axes[0].set_ylabel('test accuracy, %')
    figure.axes[1].legend(loc='lower right', frameon=False, fontsize=8)
    figure.suptitle(f'{report["options"]["seeds"]} seeds, mean and standard deviation', fontsize=10)
    figure.savefig(path, format='png', dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.compression', description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', type=int, default=8, metavar='N')
    parser.add_argument('--normalization', default='ortho', choices=('l1', 'ortho'), help='of the truncated networks')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for compression.json, .md and .png')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    photographs = load_photographs()
    options = dict(seeds=args.seeds, normalization=args.normalization, classes=len(photographs))
    with one_thread(), tqdm(total=args.seeds * (1 + len(LEVELS) * len(METHODS))) as bar:
        report: dict[str, Any] = dict(environment=environment(), options=options)
        rows = [row for seed in range(args.seeds) for row in one_seed(seed, photographs, args.normalization, bar)]
        report.update(rows=rows, summary=summary(rows))
    write(report, table, args.out, 'compression', plot)


if __name__ == '__main__':
    main()
