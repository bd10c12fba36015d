"""Figures of a comparison: mean, deviation, and the paired difference to a baseline with its interval."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.table import Table

_CONFIDENCE = 0.95
_PACKAGES = ('timm_harmonic', 'torchvision', 'timm', 'scikit_image', 'scikit_learn')


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; a single value has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Mean of the paired differences, and its 95 % interval by Student's t; a single pair has no interval."""
    pairs = [ours - theirs for ours, theirs in zip(values, baseline, strict=True)]
    mean, low, high = statistics.mean(pairs), None, None
    if len(pairs) > 1:
        from scipy.stats import t  # here, because it takes long to import

        half = t.ppf((1 + _CONFIDENCE) / 2, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
        low, high = mean - half, mean + half
    return dict(pairs=pairs, mean=mean, low=low, high=high)


def summarise(runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """What the runs of a network, one a seed, come to; `baseline` are those that they are paired with."""
    accuracy, fused = ([measured[key] for measured in runs] for key in ('accuracy', 'fused_accuracy'))
    return dict(
        accuracy_mean=statistics.mean(accuracy),
        accuracy_deviation=deviation(accuracy),
        accuracy=accuracy,
        fused_accuracy=fused,
        difference=difference(accuracy, [measured['accuracy'] for measured in baseline]) if baseline else None,
        parameters=runs[0]['parameters'],
        seconds=statistics.mean(measured['seconds'] for measured in runs),
        curves=[measured['curve'] for measured in runs],
    )


def environment() -> dict[str, Any]:
    """Versions and the machine, which figures depend on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    here = dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count())
    return dict(versions, torch=torch.__version__, **here, threads=torch.get_num_threads())


def interval(of: dict[str, Any] | None) -> str:
    """A difference as text: +3.1 (+1.2 to +5.0)."""
    if of is None:
        return ''
    return f'{of["mean"]:+.1f}' + ('' if of['low'] is None else f' ({of["low"]:+.1f} to {of["high"]:+.1f})')


def accuracy(of: dict[str, Any]) -> str:
    """Accuracies of a network as text: 53.0 ± 2.1."""
    spread = of['accuracy_deviation']
    return f'{of["accuracy_mean"]:.1f}' + ('' if spread is None else f' ± {spread:.1f}')


def table(networks: dict[str, dict[str, Any]], baseline: str, title: str, caption: str, fused: bool = True) -> Table:
    """The table of a comparison: a row a network; with its accuracy after fusing, or without."""
    lines = Table(title=title, caption=caption)
    lines.add_column('network', overflow='fold')
    titles = ['test accuracy, %', *(['fused, %'] if fused else []), f'minus {baseline}', 'parameters', 'seconds']
    for name in titles:
        lines.add_column(name, justify='right')
    for name, of in networks.items():
        after = [f'{statistics.mean(of["fused_accuracy"]):.1f}'] if fused else []
        gain = '' if name == baseline else interval(of['difference'])
        lines.add_row(name, accuracy(of), *after, gain, f'{of["parameters"]:,}', f'{of["seconds"]:.1f}')
    return lines
