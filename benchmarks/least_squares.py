"""Least squares behind other ways of cutting a network, by the sums and on the terms of `refit`."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_harmonic.conversion.refit import (
    FEWEST,
    POSITIONS,
    Samples,
    estimate_statistics,
    output_error,
    solve_layer,
)
from timm_harmonic.conversion.running import HELD_OUT, evaluating, suspended

__all__ = ['fitted', 'samples_of', 'with_statistics']

# Convolutions of a cut network, in the order in which they run -> the complete network's whose output they should have,
# and which channels of that.
Wanted = Mapping[str, tuple[str, Tensor]]


class _Patches:
    """A convolution without groups as `Samples` takes layers: its weights mix the patches of its input."""

    groups = 1

    def __init__(self, conv: Any) -> None:
        self.weight, self.bias, self.out_channels = conv.weight, conv.bias, conv.out_channels
        self._options = dict(
            kernel_size=conv.kernel_size, dilation=conv.dilation, padding=conv.padding, stride=conv.stride
        )

    def features(self, x: Tensor) -> Tensor:
        """Returns the patches (B, C k k, N)."""
        return F.unfold(x, **self._options)


def samples_of(conv: nn.Module, number: int, values: Iterable[tuple[Tensor, Tensor]]) -> Samples:
    """Sums up inputs and wanted outputs of a convolution in each part of so many images, every fourth held out."""
    samples: Any = None
    for x, outputs in values:
        if samples is None:
            patches, positions = _Patches(conv), number * outputs[0, 0].numel()
            samples = Samples(patches, min(1.0, max(POSITIONS * conv.weight[0].numel(), FEWEST) / positions))
        samples.add(x, outputs, _held_out(x))
    return samples


def _held_out(part: Tensor) -> Tensor:
    """A mask (B,) of the images that are held out."""
    return torch.arange(len(part)) % HELD_OUT == HELD_OUT - 1


def fitted(model: nn.Module, small: nn.Module, wanted: Wanted, parts: Sequence[Tensor]) -> tuple[nn.Module, float]:
    """Fits convolutions of a cut network, one after another.

    Each gets the outputs of the complete network on the inputs that it has in the cut one. The ridge of each is chosen
    on the held-out images, and so is whether anything changes, and whether the statistics of batch normalisation are
    re-estimated. All have a bias.

    Returns:
        The network, fitted to all images, and its root relative error on the held-out ones before it was fitted to
        them.
    """
    judged, final = copy.deepcopy(small), copy.deepcopy(small)
    number = sum(map(len, parts))
    with (
        torch.no_grad(),
        evaluating(model),
        evaluating(judged),
        suspended(model, parts, [dict.fromkeys((name for name, _ in wanted.values()), 1)] * len(parts)) as whole,
        suspended(judged, parts, [dict.fromkeys(wanted, 1)] * len(parts)) as cut,
    ):
        for name, (complete, channels) in wanted.items():
            visits = ((next(ours)[0], next(theirs)[0]) for ours, theirs in zip(cut, whole, strict=True))
            outputs_of = model.get_submodule(complete)
            samples = samples_of(
                judged.get_submodule(name), number, ((x, outputs_of(theirs)[:, channels]) for x, theirs in visits)
            )
            if not (solved := solve_layer(judged.get_submodule(name), samples, True)):
                continue
            for network, (weight, bias) in zip((judged, final), solved, strict=True):
                conv: Any = network.get_submodule(name)
                conv.weight.copy_(weight.transpose(1, 2).reshape(conv.weight.shape))
                conv.bias.copy_(bias.flatten())
    found = _better(model, judged, final, parts), with_statistics(model, small, parts)
    return min(found, key=lambda network_and_error: network_and_error[1])


def with_statistics(model: nn.Module, small: nn.Module, parts: Sequence[Tensor]) -> tuple[nn.Module, float]:
    """Re-estimates the statistics of batch normalisation, if that is better. Returns what `fitted` does."""
    return _better(model, copy.deepcopy(small), copy.deepcopy(small), parts)


def _better(model: nn.Module, judged: nn.Module, final: nn.Module, parts: Sequence[Tensor]) -> tuple[nn.Module, float]:
    as_is = output_error(model, judged, parts)
    estimate_statistics(judged, [part[~_held_out(part)] for part in parts])
    counted = output_error(model, judged, parts)
    if counted < as_is:
        estimate_statistics(final, parts)
    return final, math.sqrt(min(counted, as_is))
