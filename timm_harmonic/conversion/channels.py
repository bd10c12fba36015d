"""Which functions every input channel keeps: pairs of channel and function, eliminated one after another.

As in optimal brain surgeon (Hassibi and Stork, 1993), what counts is the error that the remaining pairs cannot make up
for, on the second moments of a layer's responses.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import HarmonicConv2d, HarmonicLayer
from .costs import Pairs, reduced
from .refit import Moments, by_group

_SIZES, _LEFT = 12, 0.8  # so many numbers of pairs, each this share of the one before
_MIXTURES = (0.75, 0.5, 0.35, 0.25, 0.15)  # of the channels
_OF_MIXTURES = (1, 0.8, 0.64, 0.5, 0.4)  # of their pairs
_MULTIPLE = 16  # ONNX Runtime computes channels in blocks of 8 or 16, and pads the last
_RIDGE = 1e-2  # of features of unit variance


class Choices:
    """What each layer may keep: levels or pairs, see `sizes_of`. Layers that are not named stay."""

    def __init__(self, layers: Mapping[str, HarmonicLayer], names: Collection[str], per: str) -> None:
        self.layers = layers
        # By layer, the present one first.
        self.of: dict[str, Sequence[Any]] = {name: [layer.level] for name, layer in layers.items()}
        for name in names:
            self.of[name] = sizes_of(layers[name], per) or list(layers[name].levels())
        # By layer and choice: the arguments of `at_mixtures`, if there are mixtures, and of `at_pairs`.
        self._kept: dict[str, dict[Any, Any]] = {}

    def weighed(self, name: str, whole: Moments, intercept: bool) -> Iterator[tuple[Any, Moments, dict[Any, Tensor]]]:
        """Yields mixtures of a layer's channels, at first none, their moments, and the places of the features kept.

        It notes mixtures and places, by choice, for `lowered`. `whole` are the moments of the complete layer.
        """
        layer, choices = self.layers[name], self.of[name]
        if not isinstance(choices[0], Pairs):
            yield None, whole, {level: layer.columns_at(level) for level in choices}
            return
        kept = self._kept[name] = {}
        numbers = sorted({choice.mixtures for choice in choices})
        every = mixtures_of(whole, layer, intercept) if any(numbers) else ()
        for number in numbers:
            of = {choice.number: choice for choice in choices if choice.mixtures == number}
            mixed = tuple(x[:number] for x in every) if number else None
            moments = whole.mixed(mixed[0]) if mixed else whole
            found = eliminate(moments, sorted(of, reverse=True), intercept)
            yield mixed, moments, {choice: found[size] for size, choice in of.items()}
            none = torch.zeros(number or layer.channels, len(layer.basis)).bool()
            pairs = (~none).nonzero().t() if layer.kept is None else layer.pairs.cpu()
            for size, choice in of.items():
                mask = none.clone()
                mask[tuple(pairs[:, found[size]])] = True
                kept[choice] = mixed, mask if size < max(of) else size

    def lowered(self, chosen: Mapping[str, Any]) -> dict[str, HarmonicLayer]:
        """Returns the layers with what was chosen of each. Without `weighed`, pairs are those with the most energy."""
        return {name: reduced(self.layers[name], of, self._kept.get(name)) for name, of in chosen.items()}


def sizes_of(layer: HarmonicLayer, per: str = 'channel') -> list[Any]:
    """Returns the pairs that a layer may keep per channel or mixture, from its own downwards; none if it has levels.

    Those with groups, normalised responses, or fewer than 16 channels, such as stems, which timm adapts, have levels.
    """
    if per == 'layer' or not isinstance(layer, HarmonicConv2d) or layer.groups > 1 or layer.in_channels < _MULTIPLE:
        return []

    def rounded(number: float) -> int:
        return int(number) // _MULTIPLE * _MULTIPLE

    present = layer.weight[0].numel()
    sizes = {Pairs(rounded(present * _LEFT**step)) for step in range(1, _SIZES + 1)}
    if per == 'mixture' and layer.kept is None and layer.mixtures is None:
        for number in {rounded(share * layer.channels) for share in _MIXTURES}:
            complete = number * len(layer.basis)
            sizes |= {Pairs(complete if left == 1 else rounded(left * complete), number) for left in _OF_MIXTURES}
    return sorted({Pairs(present), *(size for size in sizes if size.number)}, reverse=True)


def mixtures_of(moments: Moments, layer: HarmonicLayer, intercept: bool) -> tuple[Tensor, Tensor]:
    """Returns mixtures (C, C) of a layer's channels, those first that its outputs need most, and what they stand for.

    Outputs count by the inverse of their variance. If moments of features are products of those of channels and those
    of functions, the principal components of the coefficients between the roots of both are best (arXiv:1505.06798).
    """
    shape = layer.channels, len(layer.basis)
    both = moments.products(intercept)[0][0].unflatten(0, shape).unflatten(2, shape)
    channels, functions = both.diagonal(dim1=1, dim2=3).sum(2), both.diagonal(dim1=0, dim2=2).sum(2)
    variance = moments.variance()[0]
    weight = by_group(layer.weight, 1)[0] * torch.where(variance > 1e-12 * variance.max(), variance, torch.inf).rsqrt()
    values, axes = torch.linalg.eigh(functions)
    weight = torch.einsum('mn,cno->cmo', values.clamp_min(0).sqrt()[:, None] * axes.t(), weight.unflatten(0, shape))
    values, axes = torch.linalg.eigh(channels)
    roots = torch.where(values > 1e-9 * values.max(), values, 0).sqrt()  # less would be rounding errors
    weight = roots[:, None] * (axes.t() @ weight.flatten(1))
    vectors = torch.linalg.eigh(weight @ weight.t()).eigenvectors.flip(1).t()
    inverse = torch.where(roots > 0, roots, torch.inf).reciprocal()
    mixtures = vectors * inverse @ axes.t()
    scale = mixtures.norm(dim=1).mean()  # as weights that train well have; all mixtures have one variance, for 8 bits
    return mixtures / scale, vectors * roots @ axes.t() * scale


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
            # Not torch.cholesky_inverse, which takes up to a hundred times as long with several threads of MKL.
            lower, identity = torch.linalg.cholesky(both[left[:, None], left]), torch.eye(len(left)).to(both)
            root = torch.linalg.solve_triangular(lower, identity, upper=False)  # G^-1 is its transpose times it
            harm = (root.t() @ (root @ outputs[left])).square().sum(1) / root.square().sum(0)
            left = left[harm.argsort(descending=True)[:size].sort().values]
        found[size] = left.cpu()
    return found
