"""What to recommend for few images: variants of a small network on the design tasks, by the protocol of `compare`.

    python -m benchmarks.small_data_design --out benchmarks/results

Stem and blocks apart, floors, how filters start, and both optimizers. Test images choose between variants here, so
these numbers are no evidence: that is what the evaluation tasks are for. Finished runs stay in --work; after an
interruption the same command continues. Takes two hours on two cores.
"""

import argparse
import dataclasses
import statistics
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
from timm_harmonic.small_data.protocol import RANGES, USUAL, Protocol, Store
from timm_harmonic.small_data.results import difference, edges, interval
from timm_harmonic.small_data.training import NAMED, Network, Recipe, one_thread

from .environment import environment
from .files import write
from .tasks import DESIGN

AMOUNT = dict(trials=8, seeds=5, epochs=30)
TASKS = ('photographs_shift', 'photographs_zoom', 'textures', 'digits', 'bands')
_COUNT = 10  # training images of each class


@dataclasses.dataclass(frozen=True)
class Variant(Network):
    """A network whose stem differs from its blocks, or whose filters start as those of a smooth network."""

    stem: float | None = None  # smoothness of the stem, if it is not that of the blocks
    floor: float | None = None  # of the variances in the stem
    start: float | None = None  # smoothness of the network that gives the initial filters

    def build(self, num_classes: int, in_chans: int, seed: int) -> nn.Module:
        """Builds a new network. The seed determines its initial weights."""
        model: Any = super().build(num_classes, in_chans, seed)
        if self.stem is not None:
            random_seed(seed)
            model.conv1 = HarmonicBlock2d(**conv_args(model.conv1), smoothness=self.stem)
        if self.floor is not None:
            model.conv1.bn.eps = self.floor
        if self.start is not None:
            options = dict(NAMED['harm'], smoothness=self.start)
            smooth = Network(self.name, self.model, options).build(num_classes, in_chans, seed)
            with torch.no_grad():
                for name, layer in harmonic_layers(smooth).items():
                    model.get_submodule(name).weight.copy_(layer.filters())
        return model


def _variant(base: str = 'harm', options: dict[str, Any] | None = None, **changes: Any) -> Variant:
    return Variant(base, 'harm_resnet18', {**NAMED[base], **(options or {})}, **changes)


VARIANTS = {
    'plain': _variant('harm0'),
    'plain, BlurPool': _variant('harm0', dict(aa_layer=timm.layers.BlurPool2d)),
    'plain, smooth start 0.5': _variant('harm0', start=0.5),
    'plain, smooth start 1': _variant('harm0', start=1.0),
    'harm1': _variant('harm1'),
    'harm': _variant('harm'),
    'smoothness 0': _variant(options=dict(smoothness=0)),
    'smoothness 0.5': _variant(options=dict(smoothness=0.5)),
    'smoothness 1': _variant(options=dict(smoothness=1)),
    'stem 1, blocks 0.5': _variant(options=dict(smoothness=0.5), stem=1.0),
    'stem 1, blocks plain': _variant(options=dict(smoothness=1, harmonic_blocks=False)),
    'stem 0.5, blocks 1': _variant(options=dict(smoothness=1), stem=0.5),
    'smoothness 0.5, floor 0.2': _variant(options=dict(smoothness=0.5), floor=0.2),
    'smoothness 0.5, floor 0.01': _variant(options=dict(smoothness=0.5), floor=0.01),
}


class Unit(NamedTuple):
    """One variant on one task."""

    task: str
    opt: str
    variant: str


UNITS = [
    *(Unit(task, 'adamw', variant) for task in TASKS for variant in VARIANTS),
    *(Unit('photographs_shift', 'momentum', variant) for variant in VARIANTS),
]


def measure(unit: Unit, work: Path) -> dict[str, Any]:
    """Searches and runs one unit, except for what is stored."""
    task, net = DESIGN[unit.task], VARIANTS[unit.variant]
    flags: dict[str, Any] = dict(augment=task.augment, flip=task.flip, interpolation=task.interpolation)
    recipe = Recipe(epochs=AMOUNT['epochs'], opt=unit.opt, **USUAL[unit.opt], **flags)
    path = work / f'{"-".join(unit)}.json'.replace(' ', '_')
    store = Store(path, dict(unit._asdict(), amount=AMOUNT, ranges=RANGES[unit.opt]))
    amounts = (AMOUNT['trials'], AMOUNT['seeds'])
    with one_thread():
        draw = cache(lambda seed: task.draw(_COUNT, seed))
        protocol = Protocol(draw, [net], task.classes, recipe, *amounts, store, curves=False)
        runs = [protocol.final(net, seed) for seed in range(protocol.seeds)]
        (chosen,) = protocol.chosen(net)['chosen']
    found = {key: [run[key] for run in runs] for key in ('accuracy', 'accuracy_as_trained')}
    return dict(unit._asdict(), **found, **chosen)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a table for each optimizer, with a column for each task."""
    env, rows = report['environment'], report['rows']
    lines = [
        '# Few images: what was tried on the design tasks',
        '',
        f'Measured on {env["processor"]}, torch {env["torch"]}, timm {env["timm"]}, {env["date"]}: a small ResNet, '
        f'{_COUNT} training images of each class, {AMOUNT["epochs"]} epochs, {AMOUNT["trials"]} settings and '
        f'{AMOUNT["seeds"]} seeds for each variant and task. '
        'Test accuracy in percent with re-estimated statistics: of plain, mean ± standard deviation; of the others, '
        'points above plain, paired by seed, with 95 % interval. Variants were compared on these test images, so this '
        'is no evidence for any of them.',
        '',
    ]
    for opt in dict.fromkeys(row['opt'] for row in rows):
        of = {(row['task'], row['variant']): row for row in rows if row['opt'] == opt}
        tasks = [task for task in TASKS if (task, 'plain') in of]
        at = ', '.join(f'{share:.0%} of {key}' for key, share in edges(list(of.values()), RANGES[opt]).items())
        lines += [f'## {opt}', '', f'Choices at an edge of the search: {at}.', '']
        lines += [f'| variant | {" | ".join([*tasks, "mean"])} |', '|---' * (len(tasks) + 2) + '|']
        for variant in VARIANTS:
            cells, gains = [], []
            for task in tasks:
                row, plain = of.get((task, variant)), of[task, 'plain']
                if row is None:
                    cells.append('')
                elif variant == 'plain':
                    values = row['accuracy']
                    cells.append(f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}')
                else:
                    gain = difference(row['accuracy'], plain['accuracy'])
                    gains.append(gain['mean'])
                    cells.append(interval(gain))
            mean = f'{statistics.mean(gains):+.1f}' if len(gains) == len(tasks) else ''
            lines.append(f'| {variant} | {" | ".join([*cells, mean])} |')
        lines.append('')
    return '\n'.join(lines)


def main() -> None:
    description = __doc__.partition('\n')[0]
    parser = argparse.ArgumentParser(prog='python -m benchmarks.small_data_design', description=description)
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for small_data_design.json and .md')
    parser.add_argument('--work', type=Path, default=Path('build/design'), metavar='DIR', help='finished runs')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='parallel runs, one thread each (default: 2)')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows: dict[Unit, dict[str, Any]] = {}
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) as pool:
        started = {pool.submit(measure, unit, args.work): unit for unit in UNITS}
        for done in tqdm(as_completed(started), total=len(started), unit='variant'):
            rows[started[done]] = done.result()
    report = dict(environment=environment(), amount=AMOUNT, rows=[rows[unit] for unit in UNITS])
    write(report, table, args.out, 'small_data_design')


if __name__ == '__main__':
    main()
