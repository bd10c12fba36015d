"""Speed and memory of harmonic networks against their plain twins, as ratios of one run.

    python -m benchmarks --out benchmarks/results

A plain twin is the same network with nothing harmonic: the same root stride, pool and widths. Plain and harmonic runs
alternate in one process, so that a slow moment of the machine meets both; what is printed is the median of the ratios
of neighbouring runs, with the quartiles, and the noise of the plain network against itself.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import nn
from tqdm import tqdm

import timm_harmonic

PLAIN = dict(harmonic_stem=False, harmonic_blocks=False)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'platform': platform.platform(),
        'processor': _processor(),
        'threads': torch.get_num_threads(),
        'device': 'cpu',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_harmonic': timm_harmonic.__version__,
    }


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    names = [line.partition(':')[2].strip() for line in info.read_text().splitlines() if line.startswith('model name')]
    return names[0] if names else platform.processor()


def evaluation(model: nn.Module, batch: int, size: int) -> Callable[[], Any]:
    """A forward pass in evaluation."""
    model = model.eval()
    x = torch.randn(batch, 3, size, size)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model(x)

    return run


def training(model: nn.Module, batch: int, size: int) -> Callable[[], Any]:
    """A step of SGD with momentum: forward, backward, update."""
    model = model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def kept_for_backward(model: nn.Module, batch: int, size: int) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(torch.randn(batch, 3, size, size))  # held: it keeps the storages alive
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    del output
    return total


def compare(candidates: dict[str, Callable[[], Any]], rounds: int, bar: tqdm) -> dict[str, dict[str, float]]:
    """Seconds of each candidate, and its ratio to the one named 'plain' of the same round.

    Args:
        candidates: Name -> what to run; 'plain' must be among them.
        rounds: How often all are run, one after the other.
        bar: Moves on by one a round.

    Returns:
        Name -> median seconds, and median and quartiles of the ratio.
    """
    for run in candidates.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        bar.update()
    result = {}
    for name, times in seconds.items():
        ratios = [ours / plain for ours, plain in zip(times, seconds['plain'], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {'seconds': statistics.median(times), 'ratio': middle, 'low': low, 'high': high}
    return result


def measure(name: str, args: argparse.Namespace, bar: tqdm) -> list[dict[str, Any]]:
    """All rows of one network."""
    rows = []
    torch.manual_seed(0)
    ours, plain, again = (timm.create_model(name, **kwargs) for kwargs in ({}, PLAIN, PLAIN))
    for batch in args.eval_batch:
        runs = {'plain': plain, 'plain again': again, 'fused': reparameterize_model(ours), 'harmonic': ours}
        candidates = {key: evaluation(model, batch, args.size) for key, model in runs.items()}
        rows.append({'model': name, 'mode': 'eval', 'batch': batch, 'runs': compare(candidates, args.rounds, bar)})
    for batch in args.train_batch:
        runs = {'plain': plain, 'plain again': again, 'harmonic': ours}
        memory = {key: kept_for_backward(model, batch, args.size) for key, model in runs.items()}
        candidates = {key: training(model, batch, args.size) for key, model in runs.items()}
        result = compare(candidates, max(3, args.rounds // 3), bar)
        for key, run in result.items():
            run['kept_bytes'] = memory[key]
        rows.append({'model': name, 'mode': 'train', 'batch': batch, 'runs': result})
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    lines = [
        '# Harmonic networks against their plain twins',
        '',
        f'Measured on {env["processor"]} ({env["device"]}, {env["threads"]} threads), torch {env["torch"]}, timm '
        f'{env["timm"]}, {env["date"]}; {report["size"]} x {report["size"]} images, float32, contiguous, eager.',
        'Ratios of time to the plain twin of the same round: median [quartiles]. "Plain again" is a second plain',
        'network: the noise. Kept: memory that a training step holds for its backward pass, as a ratio.',
        '',
        '| network | mode | batch | plain, ms | plain again | fused | harmonic | kept |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for row in report['rows']:
        runs = row['runs']
        cells = [row['model'], row['mode'], str(row['batch']), f'{1000 * runs["plain"]["seconds"]:.1f}']
        for key in ('plain again', 'fused', 'harmonic'):
            run = runs.get(key)
            cells.append(f'{run["ratio"]:.2f} [{run["low"]:.2f}, {run["high"]:.2f}]' if run else '')
        kept = [runs[key].get('kept_bytes') for key in ('harmonic', 'plain')]
        cells.append(f'{kept[0] / kept[1]:.3f}' if all(kept) else '')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=['harm_resnet50', 'harm_resnet50_avgpool', 'harm_vgg16_bn'])
    parser.add_argument('--eval-batch', type=int, nargs='*', default=[1, 8], help='batch sizes in evaluation')
    parser.add_argument('--train-batch', type=int, nargs='*', default=[8], help='batch sizes in training')
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--rounds', type=int, default=21, help='alternating runs; a third of it in training')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path, help='folder for cpu.json and cpu.md')
    parser.add_argument('--show', type=Path, help='print the table of a saved JSON, run nothing')
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    torch.set_num_threads(args.threads)
    report = {'environment': environment(), 'size': args.size, 'rows': []}
    total = args.rounds * len(args.eval_batch) + max(3, args.rounds // 3) * len(args.train_batch)
    with tqdm(total=total * len(args.models)) as bar:
        for name in args.models:
            bar.set_description(name)
            report['rows'] += measure(name, args, bar)
    print(table(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'cpu.json').write_text(json.dumps(report, indent=1) + '\n')
        (args.out / 'cpu.md').write_text(table(report))


if __name__ == '__main__':
    main()
