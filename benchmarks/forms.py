"""What the form of a layer costs in training: a step of truncated networks in both forms, as ratios to the plain one.

    python -m benchmarks.forms --out benchmarks/results
    python -m benchmarks.forms --device cuda --out benchmarks/results

All runs of a network alternate in one process. A second plain network is the noise. The stem is left alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg_value
from tqdm import tqdm

from timm_harmonic import harmonize

from .environment import environment
from .files import write
from .measure import Setting, fresh_processes, train_steps, usable

MODELS = ('resnet18', 'resnet50')
SETTINGS = {
    'contiguous': Setting('cpu'),
    'channels_last': Setting('cpu', channels_last=True),
    'CUDA, channels_last': Setting('cuda', channels_last=True),
    'CUDA, channels_last, bf16': Setting('cuda', precision='bf16', channels_last=True),
}
LEVELS, FORMS = (3, 2, 1), ('dense', 'separable')
_BATCHES, _SIZE = dict(cpu=8, cuda=128), 224


def measure(name: str, setting: str, size: int, budget: float) -> dict[str, Any]:
    """A row: a training step of the plain network, and of truncated ones in both forms."""
    torch.manual_seed(0)
    stem, place = get_pretrained_cfg_value(name, 'first_conv'), SETTINGS[setting].place
    networks = {key: place(timm.create_model(name)) for key in ('plain', 'plain again')}
    for level in LEVELS:
        for form in FORMS:
            small = harmonize(timm.create_model(name), level=level, form=form, exclude=stem)
            networks[f'level {level}, {form}'] = place(small)
    batch = _BATCHES[SETTINGS[setting].device]
    runs = train_steps(networks, SETTINGS[setting], batch, size, budget)
    return dict(model=name, setting=setting, batch=batch, size=size, runs=runs)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    columns = list(report['rows'][0]['runs'])[1:]
    lines = [
        '# A training step of truncated networks',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} threads, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}. Ratios of time to the plain network of the same round: median [quartiles]. Then the peak of '
        f'memory, as a ratio. Float32 unless stated otherwise, batch {report["rows"][0]["batch"]}, images of '
        f'{report["rows"][0]["size"]} pixels. "Plain again" times plain against plain: the noise.',
        '',
        f'| network | in | plain, ms | {" | ".join(columns)} |',
        '|---' * (3 + len(columns)) + '|',
    ]
    for row in report['rows']:
        runs = row['runs']
        first = runs['plain']
        cells = [f'`{row["model"]}`', row['setting'], f'{1000 * first["seconds"]:.0f}']
        for run in (runs[column] for column in columns):
            memory = run['peak_bytes'] / first['peak_bytes']
            cells.append(f'{run["ratio"]:.2f} [{run["low"]:.2f}, {run["high"]:.2f}]; {memory:.2f}')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.forms', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME')
    parser.add_argument('--device', type=usable, choices=sorted(_BATCHES), default='cpu')
    parser.add_argument('--size', type=int, default=_SIZE, help='side of the images')
    parser.add_argument('--budget', type=float, default=60, help='seconds for the rounds of one row')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for forms.json and forms.md, or forms-cuda')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    torch.set_num_threads(args.threads)  # here for the environment's sake
    report: dict[str, Any] = dict(environment=environment(args.device), rows=[])
    settings = [name for name, setting in SETTINGS.items() if setting.device == args.device]
    with fresh_processes(args.threads) as fresh:
        for name, setting in tqdm([(name, setting) for name in args.models for setting in settings]):
            report['rows'].append(fresh.apply(measure, (name, setting, args.size, args.budget)))
    write(report, table, args.out, 'forms' if args.device == 'cpu' else f'forms-{args.device}')


if __name__ == '__main__':
    main()
