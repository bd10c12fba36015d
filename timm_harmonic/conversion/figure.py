"""The picture of a truncation: where the energy of each layer is, what is kept of it, and what that costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .losses import Losses

_CAPTION = (
    'Frequency i + j: how often a DCT function changes its sign, down and across. Energy: the sum of the squared '
    'coefficients\nof all filters of a layer. A layer at level L keeps the frequencies i + j < L, left of the line: '
    'dark cells right of it are cheap to lose.'
)
_FONTS: Any = {'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 7}


def draw(
    path: Path,
    title: str,
    losses: Losses,
    levels: Mapping[str, int],
    curve: Sequence[tuple[int, float]],
    chosen: tuple[int, float],
    times: Mapping[str, tuple[float, float]],
) -> None:
    """Draws a PNG: each layer's energy by frequency (from `losses_by_filters`) with its level, and a curve.

    The curve is the mean share of energy kept by the network's parameters, for budgets over all layers together;
    `chosen` is its point for the network that was made. With times, milliseconds by layer before and now, there is a
    third panel; a layer that has none stays as it was.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_FONTS):
        height = max(4.2, 1.9 + 0.16 * len(losses))  # every layer has its name
        figure = Figure(figsize=(15 if times else 12, height), layout='constrained')
        FigureCanvasAgg(figure)  # no window, whatever backend the user has set
        figure.suptitle(title, x=0.01, ha='left', fontsize=11)
        figure.supxlabel(_CAPTION, x=0.01, ha='left', fontsize=8, color='0.35')
        left, *middle, right = figure.subplots(1, 3 if times else 2, width_ratios=(1.25, *((0.7,) if times else ()), 1))
        _draw_energy(left, losses, levels)
        for axes in middle:
            _draw_times(axes, list(losses), times)
        _draw_curve(right, curve, chosen)
        figure.savefig(path, format='png', dpi=130)


def _draw_energy(axes: Any, losses: Losses, levels: Mapping[str, int]) -> None:
    from matplotlib.colors import LogNorm

    names, top = list(losses), max(max(of) for of in losses.values())
    shares = np.full((len(names), top), np.nan)
    for row, name in enumerate(names):
        lost = {0: 1.0, min(losses[name]) - 1: 1.0, **losses[name]}
        for total in range(max(losses[name])):
            shares[row, total] = 100 * (lost.get(total, 1.0) - lost[total + 1]) if total + 1 in lost else np.nan
    norm = LogNorm(vmin=0.05, vmax=100, clip=True)
    image = axes.imshow(shares, aspect='auto', cmap='viridis', norm=norm, interpolation='nearest')
    edges = np.array([levels[name] - 0.5 for name in names])
    axes.step([*edges, edges[-1]], np.arange(len(names) + 1) - 0.5, where='pre', color='#D55E00', linewidth=2)
    axes.set_yticks(range(len(names)), [f'{name}  L={levels[name]}' for name in names])
    axes.set_xticks(range(top))
    axes.set(xlabel='frequency i + j', title="where the energy of each layer's filters is, and what is kept")
    axes.tick_params(length=2)
    axes.figure.colorbar(image, ax=axes, label='share of energy (%)', shrink=0.8, pad=0.02)


def _draw_times(axes: Any, names: Sequence[str], times: Mapping[str, tuple[float, float]]) -> None:
    """Bars in the rows of the first panel."""
    rows = [(row, *times[name]) for row, name in enumerate(names) if name in times]
    for shift, column, colour, label in ((-0.2, 1, '0.7', 'plain'), (0.2, 2, '#009E73', 'in its form')):
        places = [row[0] + shift for row in rows]
        axes.barh(places, [row[column] for row in rows], 0.4, color=colour, label=label)
    axes.set(
        ylim=(len(names) - 0.5, -0.5),
        yticks=[],
        xlabel='milliseconds',
        title='time of each layer, measured: shorter is faster',
    )
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _draw_curve(axes: Any, curve: Sequence[tuple[int, float]], chosen: tuple[int, float]) -> None:
    parameters, kept = (np.array(values) for values in zip(*curve, strict=True))
    label = 'levels chosen for each number of parameters'
    axes.plot(parameters / 1e6, 100 * kept, color='#0072B2', marker='.', label=label)
    label = f'this network: {chosen[0] / 1e6:.2f} M, {chosen[1]:.2%}'
    axes.plot(chosen[0] / 1e6, 100 * chosen[1], color='#D55E00', marker='o', markersize=8, linestyle='', label=label)
    axes.set(xlabel='parameters of the network (millions)', ylabel='energy kept, mean over layers (%)', xlim=(0, None))
    axes.set_title('energy kept by networks of this size: top left is better')
    axes.grid(color='0.92')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(loc='lower right', frameon=False)
