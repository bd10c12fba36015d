"""Which functions every input channel keeps: pairs of channel and function, eliminated one after another.

As in optimal brain surgeon (Hassibi and Stork, 1993), what counts is the error that the remaining pairs cannot make up
for, on the second moments of a layer's responses.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..layers import HarmonicConv2d, HarmonicLayer
from .costs import Pairs, reduced
from .refit import Moments

_SIZES, _LEFT = 12, 0.8  # so many numbers of pairs, each this share of the one before
_MULTIPLE = 16  # ONNX Runtime computes channels in blocks of 8 or 16, and pads the last
_RIDGE = 1e-2  # of features of unit variance


class Choices:
    """What each layer may keep: levels or, per channel, numbers of pairs, see `sizes_of`. Those not named stay."""

    def __init__(self, layers: Mapping[str, HarmonicLayer], names: Collection[str], per: str) -> None:
        self.layers = layers
        # By layer, the present one first.
        self.of: dict[str, Sequence[int]] = {name: [layer.level] for name, layer in layers.items()}
        for name in names:
            self.of[name] = (per == 'channel' and sizes_of(layers[name])) or list(layers[name].levels())
        self._pairs: dict[str, dict[int, Tensor]] = {}  # by layer and number: (C, P)

    def places(self, name: str, moments: Moments, intercept: bool) -> dict[int, Tensor]:
        """Returns the places of the features that a layer keeps with each choice, and notes pairs."""
        layer, choices = self.layers[name], self.of[name]
        if not isinstance(choices[0], Pairs):
            return {level: layer.columns_at(level) for level in choices}
        found, none = eliminate(moments, choices, intercept), torch.zeros(layer.in_channels, len(layer.basis)).bool()
        pairs = (~none).nonzero().t() if layer.kept is None else layer.pairs.cpu()
        self._pairs[name] = {number: none.clone() for number in choices[1:]}
        for number, mask in self._pairs[name].items():
            mask[tuple(pairs[:, found[number]])] = True
        return found

    def lowered(self, chosen: Mapping[str, int]) -> dict[str, HarmonicLayer]:
        """Returns the layers with what was chosen of each. Without `places`, pairs are those with the most energy."""
        return {name: reduced(self.layers[name], of, self._pairs.get(name)) for name, of in chosen.items()}


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
