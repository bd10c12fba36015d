"""Draws docs/idea.png: fixed DCT functions times learned coefficients give a filter. `python docs/draw_idea.py`"""

from pathlib import Path

import matplotlib
import numpy as np
import torch

from timm_harmonic import dct_basis
from timm_harmonic.layers.compose import compose
from timm_harmonic.layers.dct import dct_frequencies, project

matplotlib.use('Agg')

from matplotlib import pyplot as plt
from matplotlib.patches import Polygon

K, LEVEL = 7, 4
RED_BLUE = dict(cmap='RdBu_r', interpolation='nearest')


def example() -> torch.Tensor:
    """An oriented edge (1, 1, K, K), as stems learn them."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, K, dtype=torch.float64)] * 2, indexing='ij')
    along, across = 0.8 * x + 0.6 * y, 0.8 * y - 0.6 * x
    return (torch.sin(2.6 * along) * torch.exp(-2 * along**2 - across**2)).reshape(1, 1, K, K)


def mosaic(functions: np.ndarray) -> np.ndarray:
    """Functions (K * K, K, K) as tiles in a square, each by its largest magnitude, with gaps between them."""
    canvas = np.full((K * (K + 1) - 1,) * 2, np.nan)
    for n, function in enumerate(functions):
        top, left = n // K * (K + 1), n % K * (K + 1)
        canvas[top : top + K, left : left + K] = function / np.abs(function).max()
    return canvas


def corner(scale: float, shift: float) -> np.ndarray:
    """Outline of the frequencies with i + j < LEVEL, in tiles of this size."""
    steps = [(0, LEVEL)]
    for i in range(LEVEL):
        steps += [(i + 1, LEVEL - i), (i + 1, LEVEL - i - 1)]
    return np.array([(0, 0), *[(j, i) for i, j in steps]]) * scale + shift


def main() -> None:
    basis = dct_basis(K, normalization='ortho', dtype=torch.float64)
    coefficients = project(example(), basis)
    kept = [n for n, (i, j) in enumerate(dct_frequencies(K)) if i + j < LEVEL]
    low = compose(coefficients[:, :, kept], basis[kept])
    weights, filters, low = (t.reshape(K, K).numpy() for t in (coefficients, compose(coefficients, basis), low))

    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.5), width_ratios=(1.5, 1, 1, 1), layout='constrained')
    largest, brightest = np.abs(weights).max(), np.abs(filters).max()
    axes[0].imshow(mosaic(basis.numpy()), vmin=-1, vmax=1, **RED_BLUE)
    axes[1].imshow(weights, vmin=-largest, vmax=largest, **RED_BLUE)
    axes[2].imshow(filters, vmin=-brightest, vmax=brightest, **RED_BLUE)
    axes[3].imshow(low, vmin=-brightest, vmax=brightest, **RED_BLUE)
    for axis, scale, shift in ((axes[0], K + 1, -1), (axes[1], 1, -0.5)):
        axis.add_patch(Polygon(corner(scale, shift), closed=True, fill=False, edgecolor='black', linewidth=1.8))
    titles = (
        'basis $d_n$: DCT functions, fixed',
        'coefficients $w_n$: learned',
        r'filter $\sum_n w_n d_n$',
        f'the same at level {LEVEL}:\n{len(kept)} of {K * K} coefficients',
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axes[0].set_xlabel('horizontal frequency j', fontsize=9)
    axes[0].set_ylabel('vertical frequency i', fontsize=9)
    axes[1].set_xlabel(f'outlined: level {LEVEL}, i + j < {LEVEL}', fontsize=9)
    for axis, sign in ((axes[1], r'$\times$'), (axes[2], '='), (axes[3], r'$\approx$')):
        axis.text(-0.13, 0.5, sign, transform=axis.transAxes, fontsize=20, ha='center', va='center')
    figure.savefig(Path(__file__).with_name('idea.png'), dpi=160)


if __name__ == '__main__':
    main()
