"""The picture of the quickstart: learning curves, and the learned root filters in two domains."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .dct import analyze, dct_basis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['draw', 'energy_by_frequency']

# Colours of Okabe and Ito, which colour-blind readers can tell apart, and markers for print without colour.
_STYLES = {
    'harm0': ('#404040', 'o'),
    'harm1': ('#0072B2', 's'),
    'harm': ('#D55E00', '^'),
    'harm_ortho': ('#009E73', 'D'),
}
_MEANING = {
    'harm0': 'nothing harmonic',
    'harm1': 'root harmonic',
    'harm': 'all harmonic',
    'harm_ortho': 'all, orthonormal',
}
_COLUMNS = 8  # filters in a row
_SHOWN = 32  # filters of a root layer
_FONTS = {'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8}


def _coefficients(filters: Tensor) -> np.ndarray:
    """Orthonormal DCT coefficients (O, k, k) of filters (O, 1, k, k), vertical frequency first."""
    size = filters.shape[-1]
    basis = dct_basis(size, normalization='ortho', dtype=filters.dtype)
    return analyze(filters, basis).reshape(-1, size, size).numpy()


def energy_by_frequency(filters: Tensor) -> np.ndarray:
    """Share of a filter's energy at each frequency pair, in percent, averaged over the filters.

    Args:
        filters: Tensor (O, 1, k, k) without a filter that is all zero.

    Returns:
        Array (k, k), vertical frequency first, with the sum 100.
    """
    energy = np.square(_coefficients(filters))
    return 100 * (energy / energy.sum((1, 2), keepdims=True)).mean(0)


def _mosaic(filters: np.ndarray, padding: float) -> np.ndarray:
    """Filters (O, k, k), each divided by its largest magnitude, side by side with `padding` between them."""
    filters = filters / np.abs(filters).max((1, 2), keepdims=True)
    count, size = len(filters), filters.shape[-1]
    rows = -(-count // _COLUMNS)
    canvas = np.full((rows * (size + 1) - 1, _COLUMNS * (size + 1) - 1), padding)
    for i, tile in enumerate(filters):
        top, left = i // _COLUMNS * (size + 1), i % _COLUMNS * (size + 1)
        canvas[top : top + size, left : left + size] = tile
    return canvas


def _draw_curves(axes: 'Axes', results: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs, seeds = results['curve_epochs'], results['options']['seeds']
    for name, model in results['models'].items():
        colour, marker = _STYLES[name]
        curves = np.array(model['curves'])  # (seed, epoch)
        mean = curves.mean(0)
        label = f'{name}, {_MEANING[name]}: {model["accuracy_mean"]:.1f} %'
        axes.plot(epochs, mean, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        if seeds > 1:
            deviation = curves.std(0, ddof=1)
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    chance = results['data']['chance']
    axes.axhline(chance, color='0.5', linestyle=':', linewidth=1)
    axes.annotate(
        'chance', (max(epochs), chance), (0, -2), textcoords='offset points', ha='right', va='top', color='0.35'
    )
    axes.set(xlabel='epoch', ylabel='test accuracy (%)', xlim=(0, max(epochs) * 1.02), ylim=(0, None))
    axes.grid(color='0.92')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False)


def _frequency_axes(axes: 'Axes', size: int) -> None:
    axes.set_xticks(range(0, size, 2))
    axes.set_yticks(range(0, size, 2))
    axes.tick_params(length=2)


def draw(results: dict[str, Any], roots: dict[str, Tensor], path: Path) -> None:
    """Draws the figure and saves it as a PNG.

    Args:
        results: What `timm_harmonic.quickstart.quickstart` returns.
        roots: Filters (O, 1, k, k) of the fused root layer to show, by the model's name.
        path: File to write, whatever its suffix.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    count = len(roots)
    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=(12, max(4.0, 1.3 * count + 0.9)), layout='constrained')
        FigureCanvasAgg(figure)  # no window, whatever backend the user has set
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.65), wspace=0.03)
        curves = left.subplots()
        _draw_curves(curves, results)
        curves.set_title(_curve_title(results), loc='left')

        grid = right.subplots(count, 3, squeeze=False, width_ratios=(4, 4, 1.35))
        energies = {name: np.array(results['models'][name]['root_energy']) for name in roots}
        # Three decades: below, a frequency plays no part.
        shared = LogNorm(vmin=0.02, vmax=max(20.0, *(energy.max() for energy in energies.values())), clip=True)
        for row, (name, filters) in zip(grid, roots.items(), strict=True):
            strongest = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:_SHOWN]]
            row[0].imshow(_mosaic(strongest[:, 0].numpy(), np.nan), cmap='RdBu_r', vmin=-1, vmax=1)
            row[1].imshow(_mosaic(np.abs(_coefficients(strongest)), np.nan), cmap='magma_r', vmin=0, vmax=1)
            image = row[2].imshow(energies[name], cmap='viridis', norm=shared)
            for axes in row[:2]:
                axes.set_axis_off()
            _frequency_axes(row[2], filters.shape[-1])
            row[0].text(
                -0.02, 0.5, name, transform=row[0].transAxes, rotation=90, ha='right', va='center', weight='bold',
                color=_STYLES[name][0],
            )  # fmt: skip
            row[2].set_ylabel('vertical freq.')
        grid[-1][2].set_xlabel('horizontal freq.')
        for axes, title in zip(grid[0], _filter_titles(), strict=True):
            axes.set_title(title)
        right.colorbar(image, ax=[row[2] for row in grid], label='share of energy (%)', shrink=0.8, pad=0.02)
        figure.savefig(path, format='png', dpi=160)


def _curve_title(results: dict[str, Any]) -> str:
    data, seeds = results['data'], results['options']['seeds']
    spread = f'mean and ±1 standard deviation over {seeds} seeds' if seeds > 1 else 'one seed'
    return (
        f'Which of {len(data["classes"])} photographs is a patch from?\n'
        f'{data["train_patches"]} training patches, {data["test_patches"]} test patches\n'
        f'{spread}'
    )


def _filter_titles() -> Sequence[str]:
    return (
        f'{_SHOWN} strongest root filters of seed 0\nin pixels (red positive, blue negative)',
        'the same, DCT coefficient magnitude\n(frequency 0, 0 at the top left)',
        'mean of all\nfilters and seeds',
    )
