"""Speed and memory of harmonic networks against their plain twins and the original formulation.

    python -m benchmarks --out benchmarks/results

A plain twin is the same network with nothing harmonic: the same stem stride, pool and widths. All runs of a network
alternate in one process, so that a slow moment of the machine meets all of them; what is printed is the median of the
ratios of neighbouring runs, with the quartiles, and the noise of the plain network against itself. The next network has
a process of its own: what the last one left in the allocator changes how long large temporaries take, of which the
original formulation has many.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .environment import environment
from .files import write
from .measure import Setting, fresh_processes, growth, measure, usable
from .report import plot, table

MODELS = (
    'harm_resnet50',
    'harm_resnet50_avgpool',
    'harm_resnet50_progressive',
    'harm_resnet101',
    'harm_seresnext101_32x4d',
    'harm_vgg16_bn',
)
# The first of a device is measured for all networks, the others for the first ones (--variants).
SETTINGS = {
    'cpu': [
        Setting('cpu'),
        Setting('cpu', channels_last=True),
        Setting('cpu', precision='bf16', channels_last=True),
        Setting('cpu', compiled=True),
    ],
    'cuda': [
        Setting('cuda', precision='bf16', channels_last=True),
        Setting('cuda'),
        Setting('cuda', channels_last=True),
        Setting('cuda', precision='bf16'),
        Setting('cuda', precision='bf16', channels_last=True, compiled=True),
    ],
}
BATCHES = {'cpu': dict(eval=[1, 8], train=[8]), 'cuda': dict(eval=[1, 128], train=[128])}
SIDES = (96, 160, 224, 320, 384)
GROWTH = {
    'cpu': [
        *(('eval', batch, 224) for batch in (1, 4, 16, 64, 256)),
        *(('eval', 8, side) for side in SIDES),
        *(('train', batch, 224) for batch in (2, 4, 8, 16, 32)),
        *(('train', 8, side) for side in SIDES if side != 224),
    ],
    'cuda': [
        *(('eval', batch, 224) for batch in (1, 4, 16, 64, 256)),
        *(('eval', 32, side) for side in SIDES),
        *(('train', batch, 224) for batch in (4, 16, 64, 128, 256)),
        *(('train', 32, side) for side in SIDES),
    ],
}


def parse() -> argparse.Namespace:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__.partition('\n')[0])
    parser.add_argument('--device', type=usable, choices=sorted(SETTINGS), default=device)
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME')
    parser.add_argument('--variants', type=int, default=1, metavar='N', help='networks measured in all settings')
    parser.add_argument('--settings', type=int, metavar='N', help='how many of the settings are measured')
    parser.add_argument('--eval-batch', type=int, nargs='*', metavar='N', help='batch sizes in evaluation')
    parser.add_argument('--train-batch', type=int, nargs='*', metavar='N', help='batch sizes in training')
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--budget', type=float, default=25, help='seconds for the rounds of one comparison')
    parser.add_argument('--no-growth', action='store_true', help='leave the curves over batch and side out')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for DEVICE.json, DEVICE.md and DEVICE.png')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    evals = BATCHES[args.device]['eval'] if args.eval_batch is None else args.eval_batch
    trains = BATCHES[args.device]['train'] if args.train_batch is None else args.train_batch
    first, *others = SETTINGS[args.device][: args.settings]
    jobs = [(first, name) for name in args.models]
    jobs += [(setting, name) for setting in others for name in args.models[: args.variants]]
    points = [] if args.no_growth else GROWTH[args.device]
    torch.set_num_threads(args.threads)  # here for the environment's sake
    report: dict[str, Any] = {'environment': environment(args.device), 'rows': [], 'growth': []}
    with (
        fresh_processes(args.threads) as fresh,
        tqdm(total=len(jobs) + bool(points)) as bar,
    ):
        for setting, name in jobs:
            bar.set_description(f'{name}, {setting}')
            report['rows'] += fresh.apply(measure, (name, setting, evals, trains, args.size, args.budget))
            bar.update()
        if points:
            bar.set_description('growth')
            report['growth'] = fresh.apply(growth, (args.models[0], first, points, args.budget / 4))
            bar.update()
    return report


def main() -> None:
    args = parse()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    report = run(args)
    write(report, table, args.out, args.device, plot)


if __name__ == '__main__':
    main()
