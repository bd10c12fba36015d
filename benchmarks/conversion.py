"""What making a network harmonic takes, against building it; and what reporting on it and truncating it takes.

python -m benchmarks.conversion --out benchmarks/results
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from timm_harmonic import harmonic_report, harmonize, truncate

from .environment import environment
from .files import write


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Medians over rounds; of harmonizing, as a ratio to building the network in the same round."""
    ratios, inplace, reports, truncations = [], [], [], []
    for _ in tqdm(range(rounds), desc=name):
        built, model = seconds(lambda: timm.create_model(name))
        made, harmonic = seconds(lambda model=model: harmonize(model))
        changed, _ = seconds(lambda model=model: harmonize(model, inplace=True))
        reported, _ = seconds(lambda harmonic=harmonic: str(harmonic_report(harmonic)))
        cut, _ = seconds(lambda harmonic=harmonic: truncate(harmonic, energy=0.99))
        ratios.append(made / built)
        inplace.append(changed / built)
        reports.append(reported)
        truncations.append(cut)
    return dict(
        model=name,
        rounds=rounds,
        harmonize=[statistics.median(ratios), min(ratios), max(ratios)],
        harmonize_inplace=[statistics.median(inplace), min(inplace), max(inplace)],
        report_seconds=statistics.median(reports),
        truncate_seconds=statistics.median(truncations),
    )


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    lines = [
        '# Making networks harmonic',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} threads, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}. `harmonize` as a ratio to `timm.create_model` of the same round, median [least, most]; '
        '`harmonic_report` and `truncate(energy=0.99)` in seconds, median.',
        '',
        '| network | harmonize | in place | report, s | truncate, s |',
        '|---|---|---|---|---|',
    ]
    for row in report['rows']:
        ratios = [f'{m:.2f} [{a:.2f}, {b:.2f}]' for m, a, b in (row['harmonize'], row['harmonize_inplace'])]
        lines.append(
            f'| `{row["model"]}` | {" | ".join(ratios)} | {row["report_seconds"]:.2f} | {row["truncate_seconds"]:.2f} |'
        )
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.conversion', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=['resnet152', 'resnet50', 'regnety_008'], metavar='NAME')
    parser.add_argument('--rounds', type=int, default=7, metavar='N')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for conversion.json and conversion.md')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = dict(environment=environment(), rows=[measure(name, args.rounds) for name in args.models])
    write(report, table, args.out, 'conversion')


if __name__ == '__main__':
    main()
