"""Pictures of comparisons: learning curves, paired differences, learned filters in pixels and by frequency."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ..layers import dct_basis, project
from .training import MEANINGS

# Colours of Okabe and Ito, which colour-blind readers can tell apart, with markers, in the order of the networks.
_STYLES = (
    ('#404040', 'o'),
    ('#0072B2', 's'),
    ('#D55E00', '^'),
    ('#009E73', 'D'),
    ('#CC79A7', 'v'),
    ('#E69F00', 'P'),
    ('#56B4E9', 'X'),
)
_COLUMNS = 8  # filters in a row
_SHOWN = 32  # filters of a stem
_FONTS: Any = {'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8}
_TITLES = (
    f'{_SHOWN} strongest filters of the stem, seed 0\nin pixels, over the largest of each',
    'magnitudes of their DCT coefficients\n(0, 0 at the top left), over the largest',
    'mean of all\nfilters and seeds',
)


def _coefficients(filters: Tensor) -> np.ndarray:
    """Orthonormal DCT coefficients (O, k, k) of filters (O, 1, k, k), vertical frequency first."""
    size = filters.shape[-1]
    basis = dct_basis(size, normalization='ortho', dtype=filters.dtype)
    return project(filters, basis).reshape(-1, size, size).numpy()


def energy_by_frequency(filters: Tensor) -> np.ndarray:
    """Share of energy (k, k) at each frequency, in percent, averaged over filters (O, 1, k, k); vertical first."""
    energy = np.square(_coefficients(filters))
    return 100 * (energy / energy.sum((1, 2), keepdims=True)).mean(0)


def _mosaic(filters: np.ndarray) -> np.ndarray:
    """Filters (O, k, k), each divided by its largest magnitude, side by side with gaps between them."""
    filters = filters / np.abs(filters).max((1, 2), keepdims=True)
    count, size = len(filters), filters.shape[-1]
    rows = -(-count // _COLUMNS)
    canvas = np.full((rows * (size + 1) - 1, _COLUMNS * (size + 1) - 1), np.nan)
    for i, tile in enumerate(filters):
        top, left = i // _COLUMNS * (size + 1), i % _COLUMNS * (size + 1)
        canvas[top : top + size, left : left + size] = tile
    return canvas


def style(place: int) -> tuple[str, str]:
    """Colour and marker of the network at a place in the list."""
    return _STYLES[place % len(_STYLES)]


def _draw_curves(axes: Any, results: dict[str, Any], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs, chance, seeds = results['curve_epochs'], results['data']['chance'], 1
    for place, (name, of) in enumerate(results['networks'].items()):
        colour, marker = style(place)
        curves = np.array(of['curves'])  # (seed, epoch)
        mean, seeds = curves.mean(0), len(curves)
        label = f'{", ".join(filter(None, (name, MEANINGS.get(name))))}: {of["accuracy_mean"]:.1f} %'
        axes.plot(epochs, mean, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        if seeds > 1:
            deviation = curves.std(0, ddof=1)
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(chance, color='0.5', linestyle=':', linewidth=1)
    look: Any = dict(textcoords='offset points', ha='right', va='top', color='0.35')
    axes.annotate('chance', (max(epochs), chance), (0, -2), **look)
    axes.set(xlabel='epoch', ylabel='test accuracy (%)', xlim=(0, max(epochs) * 1.02), ylim=(0, None))
    axes.grid(color='0.92')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False)
    spread = f'mean and ±1 standard deviation over {seeds} seeds' if seeds > 1 else 'one seed'
    axes.set_title(f'{title}\n{spread}', loc='left')


def _draw_differences(axes: Any, results: dict[str, Any]) -> None:
    """Differences to the baseline, a dot a seed, with mean and interval."""
    networks, baseline = results['networks'], results['baseline']
    for place, (name, of) in enumerate(networks.items()):
        if name == baseline:
            continue
        colour, marker = style(place)
        found = of['difference']
        axes.scatter(found['pairs'], [place] * len(found['pairs']), s=12, color=colour, alpha=0.4, linewidths=0)
        low, high = (found[key] if found[key] is not None else found['mean'] for key in ('low', 'high'))
        reach = [[found['mean'] - low], [high - found['mean']]]
        axes.errorbar(found['mean'], place, xerr=reach, color=colour, marker=marker, capsize=4, linewidth=1.6)
        axes.annotate(interval(found), (found['mean'], place), (0, 8), textcoords='offset points', ha='center')
    axes.axvline(0, color='0.5', linestyle=':', linewidth=1)
    places = [place for place, name in enumerate(networks) if name != baseline]
    axes.set(yticks=places, yticklabels=[name for name in networks if name != baseline], xlabel='percentage points')
    axes.set_ylim(max(places, default=1) + 0.6, min(places, default=0) - 0.6)
    axes.grid(color='0.92', axis='x')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.set_title(f'Test accuracy minus {baseline}\na dot a seed, mean and 95 % interval', loc='left')


def draw_comparison(results: dict[str, Any], path: Path) -> None:
    """Draws results of `compare` as a PNG: learning curves, and differences paired by seed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = results['data']
    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=(11, max(4.4, 3.4 + 0.35 * len(results['networks']))), layout='constrained')
        FigureCanvasAgg(figure)  # no window, whatever backend the user has set
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        title = f'{data["train"]} training and {data["test"]} test images of {len(data["classes"])} classes'
        _draw_curves(left, results, title)
        _draw_differences(right, results)
        figure.savefig(path, format='png', dpi=160)


def draw_quickstart(results: dict[str, Any], stems: dict[str, Tensor], path: Path) -> None:
    """Draws results of `quickstart` as a PNG, with the filters (O, 1, k, k) of fused stems by the model's name."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    count = len(stems)
    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=(12, max(4.0, 1.3 * count + 0.9)), layout='constrained')
        FigureCanvasAgg(figure)  # no window, whatever backend the user has set
        halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.65), wspace=0.03)
        left, right = halves
        data = results['data']
        title = (
            f'Which of {len(data["classes"])} photographs is a patch from?\n{data["train_patches"]} training patches, '
        )
        _draw_curves(left.subplots(), results, f'{title}{data["test_patches"]} test patches')
        grid = right.subplots(count, 3, squeeze=False, width_ratios=(4, 4, 1.35))
        energies = {name: np.array(results['networks'][name]['stem_energy']) for name in stems}
        # Three decades: below, a frequency plays no part.
        shared = LogNorm(vmin=0.02, vmax=max(20.0, *(energy.max() for energy in energies.values())), clip=True)
        for order, (row, (name, filters)) in enumerate(zip(grid, stems.items(), strict=True)):
            strongest = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:_SHOWN]]
            pixels = row[0].imshow(_mosaic(strongest[:, 0].numpy()), cmap='RdBu_r', vmin=-1, vmax=1)
            magnitudes = row[1].imshow(_mosaic(np.abs(_coefficients(strongest))), cmap='magma_r', vmin=0, vmax=1)
            image = row[2].imshow(energies[name], cmap='viridis', norm=shared)
            row[0].set_axis_off()
            row[1].set_axis_off()
            ticks = range(0, filters.shape[-1], 2)
            row[2].set(xticks=ticks, yticks=ticks, ylabel='vertical freq.')
            row[2].tick_params(length=2)
            place = dict(transform=row[0].transAxes, rotation=90, ha='right', va='center', weight='bold')
            row[0].text(-0.02, 0.5, name, color=style(order)[0], **place)
        grid[-1][2].set_xlabel('horizontal freq.')
        for axes, title in zip(grid[0], _TITLES, strict=True):
            axes.set_title(title)
        for column, tiles in enumerate((pixels, magnitudes)):
            right.colorbar(tiles, ax=grid[-1][column], location='bottom', shrink=0.6, aspect=30, pad=0.02)
        right.colorbar(image, ax=[row[2] for row in grid], label='share of energy (%)', shrink=0.8, pad=0.02)
        figure.savefig(path, format='png', dpi=160)


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
