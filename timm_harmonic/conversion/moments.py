"""Least squares from sums over batches: outputs of a layer on the features that its coefficients mix."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..common import InputError
from ..layers import HarmonicLayer

_ELEMENTS = 2**24  # of features that are there at a time: 128 MiB in float64
_ROWS, _FEWEST = 64, 2**14  # positions for each feature of a group, and for a group; of more, so many at random


class Moments:
    """Sums of the products of F features, o outputs and 1, in each group of a layer: (groups, F + o + 1, F + o + 1).

    They are float64, and all that least squares needs, whatever the number of images.
    """

    def __init__(self, features: int, sums: Tensor | None = None) -> None:
        self.features, self.sums = features, sums

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Adds rows: features (groups, N, F) and outputs (groups, N, o) in float64."""
        both = torch.cat([features, outputs, torch.ones_like(outputs[..., :1])], 2)
        products = both.transpose(1, 2) @ both
        self.sums = products if self.sums is None else self.sums.add_(products)

    @property
    def rows(self) -> float:
        """Rows that were added."""
        return 0.0 if self.sums is None else float(self.sums[0, -1, -1])

    def plus(self, other: 'Moments') -> 'Moments':
        """Those of the rows of both."""
        assert self.sums is not None
        assert other.sums is not None
        return Moments(self.features, self.sums + other.sums)

    def of(self, kept: Tensor) -> 'Moments':
        """Those of some of the features, by their places."""
        assert self.sums is not None
        places = torch.cat([kept, torch.arange(self.features, self.sums.shape[1])]).to(self.sums.device)
        return Moments(len(kept), self.sums[:, places][:, :, places])

    def variance(self) -> Tensor:
        """Variance of the outputs, (groups, o)."""
        assert self.sums is not None
        means = self.sums[:, self.features : -1, -1] / self.rows
        squares = self.sums.diagonal(dim1=1, dim2=2)[:, self.features : -1] / self.rows
        return (squares - means.square()).clamp_min(0)

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error of the outputs, (groups, o), with weights (groups, F, o) and biases (groups, o)."""
        assert self.sums is not None
        identity = torch.eye(weight.shape[2]).to(weight).expand(len(weight), -1, -1)
        residual = torch.cat([-weight, identity, -bias[:, None]], 1)
        return (residual * (self.sums @ residual)).sum(1).clamp_min(0) / self.rows

    def solve(self, start: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """Weights (groups, F, o) and biases (groups, o) of least squares.

        A ridge pulls the weights to `start`, by this share of each feature's energy. Biases are 0 without intercept.
        """
        assert self.sums is not None
        count = self.features
        ff, fy = self.sums[:, :count, :count].clone(), self.sums[:, :count, count:-1].clone()
        f, y = self.sums[:, :count, -1:], self.sums[:, count:-1, -1:]
        if intercept:
            ff -= f @ f.transpose(1, 2) / self.rows
            fy -= f @ y.transpose(1, 2) / self.rows
        energy = ff.diagonal(dim1=1, dim2=2)
        least = 1e-9 * energy.amax(1, keepdim=True) + torch.finfo(ff.dtype).tiny  # of features that are always 0
        change = fy - ff @ start
        ff.diagonal(dim1=1, dim2=2).add_(ridge * energy + least)
        weight = start + torch.linalg.solve(ff, change)
        bias = (y - weight.transpose(1, 2) @ f)[..., 0] / self.rows
        return weight, bias if intercept else torch.zeros_like(bias)


def rows_of(values: Tensor, groups: int) -> Tensor:
    """Channels (B, groups * c, N) as rows (groups, B * N, c) in float64."""
    values = values.to('cpu' if values.device.type == 'mps' else values.device, torch.float64)
    return values.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def by_group(weight: Tensor, groups: int) -> Tensor:
    """Coefficients (O, C / groups, P, 1) as weights (groups, F, o) in float64."""
    rows = weight.detach().to('cpu' if weight.device.type == 'mps' else weight.device, torch.float64).flatten(1)
    return rows.unflatten(0, (groups, -1)).transpose(1, 2)


def coefficients_of(weight: Tensor, like: Tensor) -> Tensor:
    """Weights (groups, F, o) as coefficients (O, C / groups, P, 1) like others."""
    return weight.transpose(1, 2).reshape(like.shape).to(like)


class Samples:
    """Moments of a layer on images that it is fitted to, and apart from them on images that judge.

    Of the positions of its output that all images have together a random share counts, enough for the features of a
    group. The layer computes in float32 at least.
    """

    def __init__(self, layer: HarmonicLayer, positions: int) -> None:
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.layer: Any = layer if dtype == layer.weight.dtype else copy.deepcopy(layer).to(dtype)
        count = layer.in_channels // layer.groups * len(layer.basis)
        self.fit, self.judge = Moments(count), Moments(count)
        self.share = min(1.0, max(_ROWS * count, _FEWEST) / positions)
        self.generator = torch.Generator().manual_seed(0)

    def check(self, name: str) -> None:
        """Raises ValueError, with the layer's name, if what it computes is not finite."""
        for moments in (self.fit, self.judge):
            if moments.sums is not None and not moments.sums.isfinite().all():
                raise InputError(
                    f'{name} has inputs or outputs that are not finite on the data: it cannot be refitted.'
                )

    def add(self, x: Tensor, outputs: Tensor, judges: Tensor) -> None:
        """Adds inputs (B, C, H, W) and outputs (B, O, H', W'); `judges` (B,) says which images judge."""
        number = outputs[0, 0].numel()
        size = number * self.layer.in_channels * len(self.layer.basis)
        for part in torch.arange(len(x)).split(max(1, _ELEMENTS // size)):
            features = self.layer.features(x[part].to(self.layer.weight.dtype)).flatten(2)
            wanted = outputs[part].flatten(2)
            places = torch.randperm(number, generator=self.generator)[: max(1, round(self.share * number))]
            for moments, chosen in ((self.fit, ~judges[part]), (self.judge, judges[part])):
                if chosen.any():
                    both = (v[chosen.to(v.device)][:, :, places.to(v.device)] for v in (features, wanted))
                    moments.add(*(rows_of(values, self.layer.groups) for values in both))
