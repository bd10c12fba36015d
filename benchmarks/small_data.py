"""Plain against harmonic networks on few images: eight tasks, three networks, the same search for each.

    python -m benchmarks.small_data --out benchmarks/results

Every network tries the same learning rates and weight decays on inner splits of the training images, and is trained
with its best setting on eight sets of training images. Batch-norm statistics are re-estimated before every test. Test
images choose nothing. Finished runs stay in --work and in the report in --out; after an interruption the same command
continues. Takes hours on two cores: --only does a part.

    python -m benchmarks.small_data --show benchmarks/results/small_data.json --out benchmarks/results

writes the table and the picture of a saved report again.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from timm_harmonic.small_data.protocol import INNER_SHARE, INNER_SPLITS, RANGES, USUAL, Protocol, Store
from timm_harmonic.small_data.results import accuracy, difference, edges, interval
from timm_harmonic.small_data.training import Recipe, network, one_thread

from .environment import environment
from .files import write
from .tasks import TASKS

_WRN, _RESNET = 'depth=10,width=2', "stem_pool='max'"
_PLAIN = 'harmonic_stem=False,harmonic_blocks=False'
OPTIMIZERS = dict(momentum='SGD', adamw='AdamW')  # by timm's names


def _variants(base: str, options: str) -> dict[str, str]:
    """All variants of one network, plain and harmonic, by their names in the tables."""
    given = f'{base}:{options}' if options else base
    comma = ',' if options else ':'
    smooth = {f'smooth {s}': f'{given}{comma}smoothness={s}' for s in ('0', '0.5', '1', '2')}
    return {
        'plain': f'{given}{comma}{_PLAIN}',
        'harm1': f'{given}{comma}harmonic_blocks=False',
        'harm': given,
        **smooth,
    }


# By group: title, variants of the network, and the number of trials, seeds and epochs.
GROUPS: dict[str, tuple[str, dict[str, str], dict[str, int]]] = {
    'small': ('small ResNet', _variants('harm', ''), dict(trials=8, seeds=8, epochs=30)),
    'wrn': ('WRN-10-2', _variants('harm_wrn16_8', _WRN), dict(trials=8, seeds=8, epochs=30)),
    'resnet18': ('ResNet-18', _variants('harm_resnet18', _RESNET), dict(trials=8, seeds=8, epochs=30)),
}
# Comparisons: group, task, training images per class, optimizer.
SETTINGS = [
    *(('small', task, 10, 'adamw') for task in TASKS),
    ('small', 'photographs_shift', 10, 'momentum'),
    *(('resnet18', task, 10, 'adamw') for task in ('photographs_shift', 'photographs_zoom')),
    *(('wrn', task, 10, 'adamw') for task in ('digits', 'photographs_shift')),
    *(('small', name, count, 'adamw') for name, task in TASKS.items() for count in task.counts[1:]),
]
_RANGES = '; '.join(
    f'{opt} learning rate {of["lr"][0]:g} to {of["lr"][1]:g}, '
    f'weight decay {of["weight_decay"][0]:g} to {of["weight_decay"][1]:g}'
    for opt, of in RANGES.items()
)
# Reports of another protocol do not count as measured.
PROTOCOL = (
    f"Every network tries the optimizer's usual setting and then the same ones of Sobol's sequence, in logarithms "
    f'({_RANGES}), judged by {INNER_SPLITS} inner splits that hold out {INNER_SHARE:.0%} of the training images, then '
    'is trained with its best one on all of them. Batch-norm statistics are re-estimated on augmented training images '
    'before every test; "as trained" is without that. The intervals cover training noise and the choice of training '
    'images, not the choice of the task'
)


class Unit(NamedTuple):
    """One variant of a network in one setting."""

    group: str
    task: str
    count: int
    opt: str
    variant: str


def units() -> Iterator[Unit]:
    """Everything to measure, the most important first."""
    for group, task, count, opt in SETTINGS:
        for variant in GROUPS[group][1]:
            yield Unit(group, task, count, opt, variant)


def path_of(unit: Unit, work: Path) -> Path:
    """File of a unit's results."""
    return work / f'{"-".join(map(str, unit)).replace(" ", "")}.json'


def is_done(unit: Unit, work: Path) -> bool:
    """Whether all runs of a unit are stored."""
    path = path_of(unit, work)
    return path.exists() and path.read_text().count('"final ') == GROUPS[unit.group][2]['seeds']


def reported(path: Path) -> dict[Unit, dict[str, Any]]:
    """Rows of a report that need no new run: same protocol and versions, same numbers of trials, seeds and epochs."""
    if not path.exists():
        return {}
    report, here = json.loads(path.read_text()), environment()
    same = all(report['environment'][key] == here[key] for key in ('torch', 'timm', 'timm_harmonic'))
    if not same or report['protocol'] != PROTOCOL:
        return {}
    groups = [
        name for name, (title, _, amount) in GROUPS.items() if report['groups'].get(name) == dict(amount, title=title)
    ]
    return {Unit(*(row[key] for key in Unit._fields)): row for row in report['rows'] if row['group'] in groups}


def measure(unit: Unit, work: Path) -> dict[str, Any]:
    """Searches and runs one unit, except for what is stored."""
    _, variants, amount = GROUPS[unit.group]
    task = TASKS[unit.task]
    flags: dict[str, Any] = dict(augment=task.augment, flip=task.flip, interpolation=task.interpolation)
    recipe = Recipe(epochs=amount['epochs'], opt=unit.opt, **USUAL[unit.opt], **flags)
    net = network(variants[unit.variant])
    settings = dict(unit._asdict(), network=variants[unit.variant], protocol=PROTOCOL, **amount)
    store = Store(path_of(unit, work), settings)
    draw = cache(lambda seed: task.draw(unit.count, seed))
    with one_thread():
        amounts = (amount['trials'], amount['seeds'])
        protocol = Protocol(draw, [net], task.classes, recipe, *amounts, store, curves=False)
        runs = [protocol.final(net, seed) for seed in range(protocol.seeds)]
        (chosen,) = protocol.chosen(net)['chosen']
    found = {key: [run[key] for run in runs] for key in ('accuracy', 'accuracy_as_trained')}
    return dict(unit._asdict(), **found, parameters=runs[0]['parameters'], **chosen)


def summary(measured: dict[Unit, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per unit: accuracy, and the differences to plain and harm in the same setting, paired by seed."""
    rows = []
    for unit in units():
        plain, harm = (measured.get(unit._replace(variant=name)) for name in ('plain', 'harm'))
        if unit not in measured or plain is None:
            continue
        found = measured[unit]
        values = found['accuracy']
        row = dict(
            found,
            accuracy_mean=statistics.mean(values),
            accuracy_deviation=statistics.stdev(values) if len(values) > 1 else None,
            difference=None if unit.variant == 'plain' else difference(values, plain['accuracy']),
            minus_harm=difference(values, harm['accuracy']) if harm else None,
        )
        rows.append(row)
    return rows


def _setting(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row['group'], row['task'], row['count'], row['opt']


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env, rows = report['environment'], report['rows']
    amounts = '; '.join(
        f'{of["title"]} {of["trials"]} trials, {of["seeds"]} seeds, {of["epochs"]} epochs'
        for name, of in report['groups'].items()
        if any(row['group'] == name for row in rows)
    )
    lines = [
        '# Plain against harmonic networks on few images',
        '',
        f'Measured on {env["processor"]}, torch {env["torch"]}, timm {env["timm"]}, {env["date"]}. '
        f'{report["protocol"]}: {amounts}. Each seed has its own training images, the same for all networks. Test '
        'accuracy in percent, mean ± standard deviation over seeds; differences to plain are paired by seed, with '
        'their 95 % interval.',
        '',
    ]
    ranges = report.get('ranges', {})
    for opt, bounds in ranges.items():
        at = edges([row for row in rows if row['opt'] == opt], bounds)
        share = ', '.join(f'{share:.0%} of {key}' for key, share in at.items())
        lines += [f'Choices at an edge of what was searched, {OPTIMIZERS[opt]}: {share}.', '']
    for group, task, count, opt in dict.fromkeys(map(_setting, rows)):
        of = [row for row in rows if _setting(row) == (group, task, count, opt)]
        title = f'{report["tasks"][task]}, {count} images per class: {report["groups"][group]["title"]}, {opt}'
        header = ['network', 'accuracy', *(['as trained'] if ranges else []), 'minus plain', 'minus harm']
        lines += [f'## {title}', '', f'| {" | ".join(header)} |', '|---' * len(header) + '|']
        for row in of:
            as_trained = [f'{statistics.mean(row["accuracy_as_trained"]):.1f}'] if ranges else []
            differences = [interval(row['difference']), interval(row['minus_harm']) if row['variant'] != 'harm' else '']
            lines.append(f'| {" | ".join([row["variant"], accuracy(row), *as_trained, *differences])} |')
        lines.append('')
    return '\n'.join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws differences to plain: a panel per variant, a line per setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report['rows']
    settings = list(dict.fromkeys(map(_setting, rows)))
    shown = {
        'harm1': ('#0072B2', 'stem harmonic (harm1)'),
        'harm': ('#D55E00', 'all harmonic (harm)'),
        'smooth 1': ('#009E73', 'all harmonic, smoothness 1'),
    }
    figure = Figure(figsize=(12, 1.2 + 0.3 * len(settings)), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (variant, (colour, title)) in zip(
        figure.subplots(1, len(shown), sharey=True, sharex=True), shown.items(), strict=True
    ):
        for place, (group, task, count, opt) in enumerate(settings):
            of = [r for r in rows if _setting(r) == (group, task, count, opt) and r['variant'] == variant]
            for row in of:
                gain = row['difference']
                reach = [[gain['mean'] - gain['low']], [gain['high'] - gain['mean']]]
                axes.errorbar(gain['mean'], place, xerr=reach, color=colour, marker='o', markersize=4, capsize=3)
        axes.axvline(0, color='0.5', linestyle=':', linewidth=1)
        axes.set_title(title, fontsize='medium')
        axes.grid(color='0.92', axis='x')
        axes.spines[['top', 'right', 'left']].set_visible(False)
    seeds = ', '.join(sorted({str(of['seeds']) for of in report['groups'].values()}))
    caption = (
        f'test accuracy minus that of the plain network, percentage points: mean over {seeds} seeds, 95 % interval'
    )
    figure.supxlabel(f'{caption} (right is better)', fontsize='medium')
    labels = [
        f'{report["tasks"][task]}: {count} images per class, {report["groups"][group]["title"]}, {OPTIMIZERS[opt]}'
        for group, task, count, opt in settings
    ]
    axes.set(yticks=range(len(settings)), yticklabels=labels, ylim=(len(settings) - 0.5, -0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.small_data', description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for small_data.json, .md and .png')
    parser.add_argument('--work', type=Path, default=Path('build/small_data'), metavar='DIR', help='finished runs')
    parser.add_argument('--only', nargs='+', choices=[*GROUPS, *TASKS], metavar='NAME', help='groups or tasks')
    parser.add_argument('--variants', nargs='+', metavar='NAME', help="only these, as 'smooth 1'")
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='parallel runs, one thread each (default: 2)')
    parser.add_argument('--done', action='store_true', help='run nothing: report finished runs')
    parser.add_argument('--show', type=Path, metavar='JSON', help='run nothing: print (and write) a saved report')
    args = parser.parse_args()
    if args.show:
        write(json.loads(args.show.read_text()), table, args.out, 'small_data', plot)
        return
    measured = reported(args.out / 'small_data.json') if args.out else {}
    wanted = [u for u in units() if not args.only or u.group in args.only or u.task in args.only]
    wanted = [u for u in wanted if u not in measured and (not args.variants or u.variant in args.variants)]
    if args.done:
        wanted = [unit for unit in wanted if is_done(unit, args.work)]
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) as pool:
        started = {pool.submit(measure, unit, args.work): unit for unit in wanted}
        for done in tqdm(as_completed(started), total=len(started), unit='network'):
            measured[started[done]] = done.result()
    titles: dict[str, Any] = dict(
        tasks={name: task.title for name, task in TASKS.items()},
        groups={name: dict(title=title, **amount) for name, (title, _, amount) in GROUPS.items()},
    )
    rows = summary(measured)
    used = {opt: bounds for opt, bounds in RANGES.items() if any(row['opt'] == opt for row in rows)}
    report: dict[str, Any] = dict(environment=environment(), protocol=PROTOCOL, ranges=used, **titles, rows=rows)
    write(report, table, args.out, 'small_data', plot)


if __name__ == '__main__':
    main()
