"""Plain against harmonic networks on few images, by the protocol of `compare`: two studies, see small_data_plan.md.

    python -m benchmarks.small_data design --out benchmarks/results
    python -m benchmarks.small_data evaluation --out benchmarks/results

`design` is what the recommendation was chosen by, test images included, so its numbers are no evidence. `evaluation`
runs all contenders on tasks that nothing was chosen on. Finished runs stay in --work and in the report in --out, which
is written after every unit: after an interruption the same command continues. On two cores the studies take an hour
and three: --only does a part, --show JSON writes the table and the picture of a saved report again.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import timm.layers
import torch
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from timm_harmonic import HarmonicBlock2d
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.layers import conv_args
from timm_harmonic.small_data.protocol import INNER_SHARE, INNER_SPLITS, RANGES, USUAL, Protocol, Ranges, Store
from timm_harmonic.small_data.results import accuracy, at_edge, difference, interval
from timm_harmonic.small_data.training import NAMED, Network, Recipe, one_thread

from .environment import environment
from .files import write
from .tasks import DESIGN, EVALUATION, Task

OPTIMIZERS = dict(adamw='AdamW', momentum='SGD')  # by timm's names
_BATCH, _LONGER, _HEAVIER = 32, 2.5, 10.0  # of the plain network that is trained long, with heavy decay


@dataclasses.dataclass(frozen=True)
class Contender(Network):
    """A network that may differ in its stem, its initial filters, or its training."""

    stem: float | None = None  # smoothness of the stem, if it is not that of the blocks
    floor: float | None = None  # of the variances in the stem
    start: float | None = None  # smoothness of the network that gives the initial filters
    heavy: bool = False  # trained longer, and with more weight decay

    def build(self, num_classes: int, in_chans: int, seed: int) -> nn.Module:
        """Builds a new network. The seed determines its initial weights."""
        model: Any = super().build(num_classes, in_chans, seed)
        if self.stem is not None:
            random_seed(seed)
            model.conv1 = HarmonicBlock2d(**conv_args(model.conv1), smoothness=self.stem)
        if self.floor is not None:
            model.conv1.bn.eps = self.floor
        if self.start is not None:
            options = dict(self.options, harmonic_stem=True, harmonic_blocks=True, smoothness=self.start)
            smooth = Network(self.name, self.model, options).build(num_classes, in_chans, seed)
            with torch.no_grad():
                for name, layer in harmonic_layers(smooth).items():
                    model.get_submodule(name).weight.copy_(layer.filters())
        return model


# Networks by group: their title, timm's name, their options, and the number of seeds.
GROUPS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    'small': ('small ResNet', 'harm_resnet18', NAMED['harm'], 8),
    'resnet18': ('ResNet-18', 'harm_resnet18', dict(stem_pool='max'), 5),
    'wrn': ('WRN-10-2', 'harm_wrn16_8', dict(depth=10, width=2), 5),
}
_PLAIN: dict[str, Any] = dict(harmonic_stem=False, harmonic_blocks=False)
# Options of the network, and what else a contender changes.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'plain': (_PLAIN, {}),
    'plain, BlurPool': (dict(_PLAIN, aa_layer=timm.layers.BlurPool2d), {}),
    'plain, long and heavy': (_PLAIN, dict(heavy=True)),
    'plain, smooth start': (_PLAIN, dict(start=0.5)),
    'harm1': (dict(harmonic_blocks=False), {}),
    'harm': ({}, {}),
    'smoothness 0': (dict(smoothness=0), {}),
    'smoothness 0.5': (dict(smoothness=0.5), {}),
    'smoothness 0.5, long and heavy': (dict(smoothness=0.5), dict(heavy=True)),
    'smoothness 1': (dict(smoothness=1), {}),
    'stem 1, blocks 0.5': (dict(smoothness=0.5), dict(stem=1.0)),
    'smoothness 0.5, floor 0.2': (dict(smoothness=0.5), dict(floor=0.2)),
    'auto': (dict(smoothness='auto'), {}),
}


def contender(group: str, variant: str) -> Contender:
    """A variant of a group's network."""
    _, model, given, _ = GROUPS[group]
    options, changes = VARIANTS[variant]
    return Contender(variant, model, {**given, **options}, **changes)


class Unit(NamedTuple):
    """One contender on one task."""

    task: str
    count: int  # of training images of each class
    group: str
    opt: str
    variant: str


@dataclasses.dataclass(frozen=True)
class Study:
    """What is run, and what its report says of that."""

    title: str
    about: str
    tasks: dict[str, Task]
    units: Sequence[Unit]
    trials: int = 8
    seeds: int = 8  # at most; larger networks have fewer
    epochs: int = 0
    updates: int = 0  # determine the epochs unless these are given

    def recipe(self, unit: Unit) -> Recipe:
        """How the networks of a unit are trained."""
        task, heavy = self.tasks[unit.task], VARIANTS[unit.variant][1].get('heavy', False)
        per_epoch = max(1, unit.count * len(task.classes) // _BATCH)
        epochs = self.epochs or math.ceil(self.updates / per_epoch)
        usual = dict(USUAL[unit.opt])
        if heavy:
            epochs, usual['weight_decay'] = round(_LONGER * epochs), _HEAVIER * usual['weight_decay']
        flags: dict[str, Any] = dict(augment=task.augment, flip=task.flip, interpolation=task.interpolation)
        return Recipe(epochs=epochs, batch_size=_BATCH, opt=unit.opt, **usual, **flags)

    @property
    def amount(self) -> dict[str, int]:
        """Numbers that results depend on."""
        return dict(trials=self.trials, seeds=self.seeds, epochs=self.epochs, updates=self.updates)


def searched(unit: Unit) -> Ranges:
    """Ranges of a unit's search."""
    ranges = dict(RANGES[unit.opt])
    if VARIANTS[unit.variant][1].get('heavy'):
        low, high = ranges['weight_decay']
        ranges['weight_decay'] = (_HEAVIER * low, _HEAVIER * high)
    return ranges


_DESIGNED = (
    *('plain', 'smoothness 0', 'smoothness 0.5', 'smoothness 1'),
    *('stem 1, blocks 0.5', 'smoothness 0.5, floor 0.2'),
)
_CONTENDERS = (
    *('plain', 'plain, BlurPool', 'plain, long and heavy', 'plain, smooth start'),
    *('harm1', 'harm', 'smoothness 0.5', 'smoothness 1', 'auto'),
)

_SOME, _LARGER = ('icons', 'surfaces'), ('plain', 'harm', 'smoothness 0.5', 'auto')


def _evaluation() -> Iterator[Unit]:
    for task, of in EVALUATION.items():
        yield from (Unit(task, of.counts[0], 'small', 'adamw', variant) for variant in _CONTENDERS)
    for task, of in EVALUATION.items():  # see the plan: it was added later
        yield Unit(task, of.counts[0], 'small', 'adamw', 'smoothness 0.5, long and heavy')
    for task in _SOME:
        count = EVALUATION[task].counts[0]
        yield from (Unit(task, count, 'small', 'momentum', variant) for variant in _CONTENDERS)
        for group in ('resnet18', 'wrn'):
            yield from (Unit(task, count, group, 'adamw', variant) for variant in _LARGER)


STUDIES = {
    'design': Study(
        'Few images: what was tried on the design tasks',
        'Variants were compared on these test images, so this is no evidence for any of them.',
        DESIGN,
        [
            Unit(task, 10, 'small', opt, variant)
            for task, opt in (
                ('photographs_shift', 'adamw'),
                ('photographs_zoom', 'adamw'),
                ('photographs_shift', 'momentum'),
            )
            for variant in _DESIGNED
        ],
        seeds=5,
        epochs=30,
    ),
    'evaluation': Study(
        'Few images: all contenders on the evaluation tasks',
        'Nothing was chosen on these tasks.',
        EVALUATION,
        list(_evaluation()),
        updates=200,
    ),
}
# Reports of another protocol do not count as measured.
PROTOCOL = (
    f"Every network tries the optimizer's usual setting and then the same ones of Sobol's sequence, judged by "
    f'{INNER_SPLITS} inner splits that hold out {INNER_SHARE:.0%} of the training images of seed 0, then is trained '
    'with its best one on the training images of every seed. Batch-norm statistics are re-estimated on augmented '
    'training images before every judgement and every test'
)


def measure(study: str, unit: Unit, work: Path) -> dict[str, Any]:
    """Searches and runs one unit, except for what is stored."""
    of, recipe, ranges = STUDIES[study], STUDIES[study].recipe(unit), searched(unit)
    task, net = of.tasks[unit.task], contender(unit.group, unit.variant)
    path = work / f'{study}-{"-".join(map(str, unit))}.json'.replace(' ', '_')
    store = Store(path, dict(unit._asdict(), amount=of.amount, ranges=ranges, recipe=dataclasses.asdict(recipe)))
    amounts = (of.trials, min(of.seeds, GROUPS[unit.group][3]))
    with one_thread():
        draw = cache(lambda seed: task.draw(unit.count, seed))
        protocol = Protocol(draw, [net], task.classes, recipe, *amounts, store, ranges=ranges)
        runs = [protocol.final(net, seed) for seed in range(protocol.seeds)]
        (chosen,) = protocol.chosen(net)['chosen']
    found = {key: [run[key] for run in runs] for key in ('accuracy', 'accuracy_as_trained')}
    return dict(
        unit._asdict(), epochs=recipe.epochs, ranges=ranges, **found, parameters=runs[0]['parameters'], **chosen
    )


def reported(path: Path, study: str) -> dict[Unit, dict[str, Any]]:
    """Rows of a report that need no new run: same protocol, numbers and versions."""
    if not path.exists():
        return {}
    report, here = json.loads(path.read_text()), environment()
    same = all(report['environment'][key] == here[key] for key in ('torch', 'timm'))
    if not same or (report['protocol'], report['amount']) != (PROTOCOL, STUDIES[study].amount):
        return {}
    return {Unit(*(row[key] for key in Unit._fields)): row for row in report['rows']}


def gains(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Differences to plain by variant and task, of rows with one group, optimizer and number of images each."""
    plain = {row['task']: row['accuracy'] for row in rows if row['variant'] == 'plain'}
    return {
        (row['variant'], row['task']): difference(row['accuracy'], plain[row['task']])
        for row in rows
        if row['variant'] != 'plain' and row['task'] in plain
    }


def over_tasks(found: dict[tuple[str, str], dict[str, Any]], variant: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Mean over tasks of a variant's differences to plain, with the interval over tasks: each counts once."""
    means = [found[variant, task]['mean'] for task in tasks]
    return difference(means, [0.0] * len(means))


def _settings(report: dict[str, Any]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that one table shows: those of one group and optimizer, and of the first number of images or another."""
    first: dict[str, int] = {}
    for row in report['rows']:
        first.setdefault(row['task'], row['count'])
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report['rows']:
        more = row['count'] if row['count'] != first[row['task']] else None
        found.setdefault((row['group'], row['opt'], more), []).append(row)
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a table for each network and optimizer, with a column for each task."""
    env, amount = report['environment'], report['amount']
    length = f'{amount["epochs"]} epochs' if amount['epochs'] else f'{amount["updates"]} updates or slightly more'
    lines = [
        f'# {report["title"]}',
        '',
        f'Measured on {env["processor"]}, torch {env["torch"]}, timm {env["timm"]}, {env["date"]}. '
        f'{report["protocol"]}: {amount["trials"]} settings, {length} in batches of {_BATCH}. {report["about"]} Test '
        'accuracy in percent: of plain, mean ± standard deviation over seeds; of the others, points above plain, '
        "paired by seed, with 95 % interval (Student's t over seeds; of the mean, over tasks). Under each: the "
        'accuracy as trained, without re-estimated statistics, and the chosen learning rate and weight decay.',
        '',
    ]
    for (group, opt, count), rows in _settings(report).items():
        tasks, found = list(dict.fromkeys(row['task'] for row in rows)), gains(rows)
        seeds = max(len(row['accuracy']) for row in rows)
        images = f', {count} training images of each class' if count else ''
        lines += [f'## {GROUPS[group][0]}, {OPTIMIZERS[opt]}, {seeds} seeds{images}', '']
        shares = [{key: at_edge(row[key], bounds) for key, bounds in row['ranges'].items()} for row in rows]
        at = ', '.join(f'{statistics.mean(of[key] for of in shares):.0%} of {key}' for key in shares[0])
        lines += [f'Choices at an edge of the search: {at}.', '']
        header = [
            'variant',
            *(f'{task}, {_count(rows, task)}' for task in tasks),
            *(['mean'] if len(tasks) > 1 else []),
        ]
        lines += [f'| {" | ".join(header)} |', '|---' * len(header) + '|']
        for variant in [name for name in VARIANTS if any(row['variant'] == name for row in rows)]:
            of = {row['task']: row for row in rows if row['variant'] == variant}
            cells = [_cell(of.get(task), found.get((variant, task))) for task in tasks]
            whole = variant != 'plain' and len(of) == len(tasks) > 1
            mean = [interval(over_tasks(found, variant, tasks)) if whole else ''] if len(tasks) > 1 else []
            lines.append(f'| {" | ".join([variant, *cells, *mean])} |')
        lines.append('')
    return '\n'.join(lines)


def _count(rows: Sequence[dict[str, Any]], task: str) -> int:
    return next(row['count'] for row in rows if row['task'] == task)


def _cell(row: dict[str, Any] | None, gain: dict[str, Any] | None) -> str:
    if row is None:
        return ''
    values = row['accuracy']
    summary = dict(accuracy_mean=statistics.mean(values), accuracy_deviation=statistics.stdev(values))
    chosen = f'{row["lr"]:.2g}, {row["weight_decay"]:.2g}'
    if 'smoothness' in row:
        chosen += f', smoothness {row["smoothness"]:g}'
    first = accuracy(summary) if gain is None else interval(gain)
    return f'{first}<br>{statistics.mean(row["accuracy_as_trained"]):.1f}; {chosen}'


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws differences to plain by task, and their mean: a panel per contender of the small network with AdamW."""
    from matplotlib.figure import Figure

    rows = _settings(report)['small', 'adamw', None]
    found, tasks = gains(rows), list(dict.fromkeys(row['task'] for row in rows))
    shown = [name for name in VARIANTS if all((name, task) in found for task in tasks)]
    figure = Figure(figsize=(1.6 + 1.35 * len(shown), 1.3 + 0.27 * len(tasks)), layout='constrained')
    panels = figure.subplots(1, len(shown), sharey=True, sharex=True, squeeze=False)[0]
    for axes, variant in zip(panels, shown, strict=True):
        points = [*(found[variant, task] for task in tasks), over_tasks(found, variant, tasks)]
        for place, of in enumerate(points):
            colour = '#D55E00' if place == len(tasks) else '#0072B2'
            reach = [[of['mean'] - of['low']], [of['high'] - of['mean']]]
            axes.errorbar(of['mean'], place, xerr=reach, color=colour, marker='o', markersize=4, capsize=2)
        axes.axvline(0, color='0.5', linestyle=':', linewidth=1)
        axes.set_title(variant.replace(', ', ',\n'), fontsize='small')
        axes.grid(color='0.92', axis='x')
        axes.spines[['top', 'right', 'left']].set_visible(False)
    labels = [*(f'{task} ({_count(rows, task)} a class)' for task in tasks), 'mean of all tasks']
    panels[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    figure.supxlabel('test accuracy minus that of the plain network, points, with 95 % interval', fontsize='small')
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.small_data', description=__doc__.partition('\n')[0])
    parser.add_argument('study', choices=STUDIES, help='which study')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for small_data_STUDY.json, .md and .png')
    parser.add_argument('--work', type=Path, default=Path('build/small_data'), metavar='DIR', help='finished runs')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='tasks, groups, optimizers or variants')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='parallel runs, one thread each (default: 2)')
    parser.add_argument('--show', type=Path, metavar='JSON', help='run nothing: print (and write) a saved report')
    args = parser.parse_args()
    name, study = f'small_data_{args.study}', STUDIES[args.study]
    draw = plot if args.study == 'evaluation' else None
    if args.show:
        write(json.loads(args.show.read_text()), table, args.out, name, draw)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    saved = args.out / f'{name}.json' if args.out else None
    rows = reported(saved, args.study) if saved else {}

    def report() -> dict[str, Any]:
        of = dict(title=study.title, about=study.about, protocol=PROTOCOL, amount=study.amount)
        return dict(environment=environment(), **of, rows=[rows[unit] for unit in study.units if unit in rows])

    wanted = [unit for unit in study.units if unit not in rows]
    wanted = [unit for unit in wanted if not args.only or set(args.only) & set(map(str, unit))]
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) as pool:
        started = {pool.submit(measure, args.study, unit, args.work): unit for unit in wanted}
        for done in tqdm(as_completed(started), total=len(started), unit='contender'):
            rows[started[done]] = done.result()
            if saved:
                saved.parent.mkdir(parents=True, exist_ok=True)
                saved.write_text(json.dumps(report(), indent=1) + '\n')
    write(report(), table, args.out, name, draw)


if __name__ == '__main__':
    main()
