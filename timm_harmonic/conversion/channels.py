"""Which functions every input channel keeps: pairs of channel and function, eliminated one after another.

As in optimal brain surgeon (Hassibi and Stork, 1993), what counts is the error that the remaining pairs cannot make up
for, on the second moments of a layer's responses.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import HarmonicConv2d, HarmonicLayer
from .costs import Pairs
from .refit import Moments

Choices = Mapping[str, Sequence[int]]  # by layer: levels, or numbers of pairs

_SIZES, _LEFT = 12, 0.8  # so many numbers of pairs, each this share of the one before
_MULTIPLE = 16  # ONNX Runtime computes channels in blocks of 8 or 16, and pads the last
_RIDGE = 1e-2  # of features of unit variance


def choices_of(layers: Mapping[str, HarmonicLayer], names: Collection[str], per: str) -> dict[str, list[int]]:
    """Returns the levels or, per channel, the `sizes_of` each layer, its present one first. Those not named stay."""
    found = {name: [layer.level] for name, layer in layers.items()}
    for name in names:
        sizes = sizes_of(layers[name]) if per == 'channel' else []
        found[name] = sizes or list(layers[name].levels())
    return found


def sizes_of(layer: HarmonicLayer) -> list[int]:
    """Returns the numbers of pairs that a layer may keep, from its own downwards; none if it stays with levels.

    These are layers with groups or normalised responses, and those of fewer than 16 channels, such as stems, whose
    input channels timm adapts.
    """
    if not isinstance(layer, HarmonicConv2d) or layer.groups > 1 or layer.in_channels < _MULTIPLE:
        return []
    present = layer.weight[0].numel()
    sizes = {int(present * _LEFT**step) // _MULTIPLE * _MULTIPLE for step in range(1, _SIZES + 1)}
    return [Pairs(size) for size in sorted({present, *sizes} - {0}, reverse=True)]


def choose(
    choices: Choices, kept: dict[str, dict[int, Tensor]], name: str, layer: Any, moments: Moments, intercept: bool
) -> dict[int, Tensor]:
    """Returns the features of a layer that each choice keeps, by their places; `kept` notes pairs (C, P) by number."""
    if not isinstance(choices[name][0], Pairs):
        return {level: layer.columns_at(level) for level in choices[name]}
    found, none = eliminate(moments, choices[name], intercept), torch.zeros(layer.in_channels, len(layer.basis)).bool()
    pairs = (~none).nonzero().t() if layer.kept is None else layer.pairs.cpu()
    kept[name] = {}
    for number in choices[name][1:]:
        kept[name][number] = none.clone()
        kept[name][number][tuple(pairs[:, found[number]])] = True
    return found


def eliminate(moments: Moments, sizes: Sequence[int], intercept: bool = True) -> dict[int, Tensor]:
    """Returns the places of the features left at each size, dropped so that least squares loses as little as possible.

    Features have unit variance. At each step those go whose absence would add least to the squared error, divided by
    the variance of each output: h_oj^2 / (G^-1)_jj, summed over outputs o, for coefficients h and moments G.
    """
    both, outputs = (products[0] for products in moments.products(intercept))
    energy, variance = both.diagonal().clone(), moments.variance()[0]
    scale = torch.where(energy > 1e-12 * energy.max(), energy, torch.inf).rsqrt()  # a constant feature explains nothing
    alive = variance > 1e-12 * variance.max()
    both, outputs = both * scale * scale[:, None], outputs[:, alive] * scale[:, None] * variance[alive].rsqrt()
    both.diagonal().copy_(torch.full_like(energy, 1 + _RIDGE))
    left, found = torch.arange(len(energy), device=both.device), {}
    for size in sizes:
        if size < len(left):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(both[left[:, None], left]))
            harm = (inverse @ outputs[left]).square().sum(1) / inverse.diagonal()
            left = left[harm.argsort(descending=True)[:size].sort().values]
        found[size] = left.cpu()
    return found
