"""What autoloading adds to `import torch`: fresh interpreters, with and without our entry point, in turn.

    python -m benchmarks.imports --out benchmarks/results

A start of Python varies by many times of what is looked for. So two things are measured in every interpreter: the whole
`import torch`, and within it the time from the loading of our entry point to its return.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .environment import environment
from .files import write

# Both variants wrap importlib.metadata.entry_points; one leaves ours out, the other clocks it.
_PROGRAM = """
import importlib.metadata as metadata, json, sys, time
entry_points = metadata.entry_points
spent = [0.0]
class Clocked:
    def __init__(self, entry):
        self.entry, self.name = entry, entry.name
    def load(self):
        start = time.perf_counter()
        function = self.entry.load()
        spent[0] += time.perf_counter() - start
        def call():
            start = time.perf_counter()
            function()
            spent[0] += time.perf_counter() - start
        return call
def wrapped(*args, **kwargs):
    found = list(entry_points(*args, **kwargs))
    if kwargs.get("group") != "torch.backends":
        return found
    with_ours = [Clocked(e) if e.name == "timm_harmonic" else e for e in found]
    assert any(isinstance(e, Clocked) for e in with_ours), "the entry point is not installed"
    return with_ours if sys.argv[1] == "with" else [e for e in found if e.name != "timm_harmonic"]
metadata.entry_points = wrapped
start = time.perf_counter()
import torch
print(json.dumps([time.perf_counter() - start, spent[0]]))
"""


def measure(rounds: int) -> dict[str, Any]:
    """Medians and quartiles over fresh interpreters, in milliseconds."""
    seconds: dict[str, list[float]] = {'without': [], 'with': []}
    own = []
    for round_ in tqdm(range(rounds)):
        for variant in sorted(seconds, reverse=bool(round_ % 2)):  # neither is always the first of its pair
            command = [sys.executable, '-c', _PROGRAM, variant]
            total, spent = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            seconds[variant].append(total)
            if variant == 'with':
                own.append(spent)
    ratios = [ours / theirs for ours, theirs in zip(seconds['with'], seconds['without'], strict=True)]
    return {
        'rounds': rounds,
        'import_torch_ms': {name: 1000 * statistics.median(times) for name, times in seconds.items()},
        'ratio': dict(zip(('low', 'median', 'high'), statistics.quantiles(ratios, n=4), strict=True)),
        'entry_point_ms': dict(
            zip(('low', 'median', 'high'), (1000 * q for q in statistics.quantiles(own, n=4)), strict=True)
        ),
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env, result = report['environment'], report['imports']
    times, ratio, own = result['import_torch_ms'], result['ratio'], result['entry_point_ms']
    return '\n'.join(
        [
            '# What autoloading adds to `import torch`',
            '',
            f'Measured on {env["processor"]}, Python {env["python"]}, torch {env["torch"]}, {env["date"]}; '
            f'{result["rounds"]} pairs of fresh interpreters.',
            '',
            '| | median | quartiles |',
            '|---|---|---|',
            f'| our entry point, loaded and called, ms | {own["median"]:.2f} | {own["low"]:.2f} to {own["high"]:.2f} |',
            f'| `import torch` without it, ms | {times["without"]:.0f} | |',
            f'| `import torch` with it, ms | {times["with"]:.0f} | |',
            f'| ratio of a pair | {ratio["median"]:.3f} | {ratio["low"]:.3f} to {ratio["high"]:.3f} |',
            '',
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.imports', description=__doc__.partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=40)
    parser.add_argument('--out', type=Path, help='folder for imports.json and imports.md')
    args = parser.parse_args()
    report = {'environment': environment(), 'imports': measure(args.rounds)}
    write(report, table, args.out, 'imports')


if __name__ == '__main__':
    main()
