"""Speed and memory of harmonic networks against their plain twins and the original formulation.

    python -m benchmarks --out benchmarks/results
    python -m benchmarks --device cuda --minutes 10 --out benchmarks/results

A plain twin is the same network with nothing harmonic: the same stem stride, pool and widths. All runs of a network
alternate in one process, so that a slow moment of the machine meets all of them; what is printed is the median of the
ratios of neighbouring runs, with the quartiles, and the noise of the plain network against itself. The next network has
a process of its own: what the last one left in the allocator changes how long large temporaries take, of which the
original formulation has many.

Every network is saved as soon as it is measured. With --resume a run that ended early, or whose minutes were over, goes
on where it stopped: rows that --out holds from the same machine and versions are kept.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from multiprocessing import TimeoutError
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .environment import environment
from .files import write
from .measure import Setting, fresh_processes, growth, measure, usable
from .report import plot, table

MODELS = {
    'cpu': (
        'harm_resnet50',
        'harm_resnet50_avgpool',
        'harm_resnet50_progressive',
        'harm_resnet101',
        'harm_seresnext101_32x4d',
        'harm_vgg16_bn',
    ),
    'cuda': ('harm_resnet50', 'harm_resnet101', 'harm_vgg16_bn', 'harm_seresnext101_32x4d', 'harm_wrn28_10'),
}
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
        Setting('cuda', precision='bf16', channels_last=True, compiled=True),
        Setting('cuda', precision='fp16', channels_last=True),
        Setting('cuda', channels_last=True),
        Setting('cuda'),
    ],
}
SIZES = {'harm_wrn28_10': 32}  # of images, where --size is larger
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
    parser.add_argument('--models', nargs='+', metavar='NAME')
    parser.add_argument(
        '--variants', type=int, metavar='N', help='networks in all settings (default: all on CUDA, else 1)'
    )
    parser.add_argument('--settings', type=int, metavar='N', help='how many of the settings are measured')
    parser.add_argument('--eval-batch', type=int, nargs='*', metavar='N', help='batch sizes in evaluation')
    parser.add_argument('--train-batch', type=int, nargs='*', metavar='N', help='batch sizes in training')
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--budget', type=float, default=25, help='seconds for the rounds of one comparison')
    parser.add_argument('--minutes', type=float, metavar='N', help='end by then, and leave the rest to the next run')
    parser.add_argument('--resume', action='store_true', help='keep what --out holds')
    parser.add_argument('--no-growth', action='store_true', help='leave the curves over batch and side out')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for DEVICE.json, DEVICE.md and DEVICE.png')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    args = parser.parse_args()
    if args.resume and args.out is None:
        parser.error('--resume needs --out')
    return args


def size_of(name: str, size: int) -> int:
    """The side of a network's images."""
    return min(size, SIZES.get(name, size))


def is_of(row: dict[str, Any], setting: Setting, name: str, size: int) -> bool:
    """Whether a row is of this network in this setting."""
    return dict(model=name, size=size_of(name, size), **asdict(setting)).items() <= row.items()


def saved(path: Path, env: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run on this machine with these versions."""
    report = json.loads(path.read_text()) if path.exists() else {}
    same = all(report.get('environment', {}).get(key) == env[key] for key in ('processor', 'threads', 'torch', 'timm'))
    return report if same else {}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report, or what --minutes leave time for."""
    minutes = math.inf if args.minutes is None else args.minutes
    end = time.monotonic() + 60 * min(minutes, 1e6)
    names = args.models or MODELS[args.device]
    evals = BATCHES[args.device]['eval'] if args.eval_batch is None else args.eval_batch
    trains = BATCHES[args.device]['train'] if args.train_batch is None else args.train_batch
    first, *others = SETTINGS[args.device][: args.settings]
    variants = args.variants or (len(names) if args.device == 'cuda' else 1)
    jobs = [(first, name) for name in names] + [(setting, name) for setting in others for name in names[:variants]]
    points = [] if args.no_growth else GROWTH[args.device]
    # Half of the minutes are for starting and compiling.
    budget = min(args.budget, 30 * minutes / (len(jobs) * max(1, len(evals) + len(trains))))
    torch.set_num_threads(args.threads)  # here for the environment's sake
    report: dict[str, Any] = {'environment': environment(args.device), 'rows': [], 'growth': []}
    before = saved(args.out / f'{args.device}.json', report['environment']) if args.resume else {}
    rows = {job: [row for row in before.get('rows', []) if is_of(row, *job, args.size)] for job in jobs}
    with (
        fresh_processes(args.threads) as fresh,
        tqdm(total=len(jobs) + bool(points)) as bar,
    ):

        def within(work: Any, *options: Any) -> list[dict[str, Any]]:
            try:
                return fresh.apply_async(work, options).get(max(0, end - time.monotonic()))
            except TimeoutError:
                return []

        for setting, name in jobs:
            bar.set_description(f'{name}, {setting}')
            size = size_of(name, args.size)
            rows[setting, name] = rows[setting, name] or within(measure, name, setting, evals, trains, size, budget)
            report['rows'] = [row for job in jobs for row in rows[job]]
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f'{args.device}.json').write_text(json.dumps(report))
            bar.update()
        if points:
            bar.set_description('growth')
            report['growth'] = before.get('growth') or within(growth, names[0], first, points, budget / 4)
            bar.update()
    return report


def main() -> None:
    args = parse()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    report = run(args)
    write(report, table, args.out, args.device, plot if report['rows'] else None)


if __name__ == '__main__':
    main()
