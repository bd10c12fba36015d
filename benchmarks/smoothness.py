"""What `smoothness` costs: a training step, its memory, and evaluation, as ratios to the same network without it.

    python -m benchmarks.smoothness --out benchmarks/results

All runs of a network alternate in one process. A second network without smoothness shows the noise.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import reparameterize_model
from torch import nn
from tqdm import tqdm

from .environment import environment
from .files import write
from .measure import Setting, compare, evaluation, train_steps

# Side of the images that each network is made for. No VGG: its classifier with 120M parameters hides the layers.
SIDES = {'harm_resnet18': 224, 'harm_resnet50': 224, 'harm_wrn16_8': 32}
OPTIONS: dict[str, dict[str, Any]] = {'without': {}, 'without again': {}, 'smooth': dict(smoothness=1.0)}
BATCH = 8


def measure(name: str, setting: Setting, size: int, budget: float) -> list[dict[str, Any]]:
    """Rows of one network: a training step, evaluation as trained, and fused evaluation."""
    torch.manual_seed(0)
    models = {
        key: setting.place(timm.create_model(name, num_classes=1000, **options)) for key, options in OPTIONS.items()
    }
    about = dict(model=name, size=size, batch=BATCH, device=setting.device)

    def evaluated(of: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
        candidates = {key: evaluation(model, setting, BATCH, size) for key, model in of.items()}
        return compare(candidates, setting.device, budget)

    rows = [dict(about, mode='training step', runs=train_steps(models, setting, BATCH, size, budget))]
    rows.append(dict(about, mode='evaluation', runs=evaluated(models)))
    fused = {key: reparameterize_model(model.eval()) for key, model in models.items()}
    rows.append(dict(about, mode='evaluation, fused', runs=evaluated(fused)))
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    lines = [
        '# What smoothness costs',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} threads, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}. Time with `smoothness=1` as a ratio to the same network without it in the same round, '
        'float32, contiguous: median [quartiles]. "Without again" is a second network without it: the noise. Memory is '
        'the peak of a training step, as a ratio.',
        '',
        '| network | what | batch, side | without, ms | without again | smoothness 1 | memory (again) |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in report['rows']:
        runs = row['runs']
        ratios = [f'{r["ratio"]:.2f} [{r["low"]:.2f}, {r["high"]:.2f}]' for r in (runs[key] for key in list(runs)[1:])]
        without, again, smooth = (run.get('peak_bytes') for run in runs.values())
        memory = f'{smooth / without:.3f} ({again / without:.3f})' if without else ''
        lines.append(
            f'| `{row["model"]}` | {row["mode"]} | {row["batch"]}, {row["size"]} | '
            f'{1000 * runs["without"]["seconds"]:.1f} | {" | ".join(ratios)} | {memory} |'
        )
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.smoothness', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(SIDES), choices=list(SIDES), metavar='NAME')
    parser.add_argument('--budget', type=float, default=25, help='seconds for the rounds of one comparison')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for smoothness.json and smoothness.md')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = dict(environment=environment(), rows=[])
    for name in tqdm(args.models, unit='network'):
        report['rows'] += measure(name, Setting('cpu'), SIDES[name], args.budget)
    write(report, table, args.out, 'smoothness')


if __name__ == '__main__':
    main()
