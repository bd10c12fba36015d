"""What each level would cost each layer of a network: by its filters, or by what it does with images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..common import InputError
from ..layers import HarmonicLayer, dct_frequencies
from .energy import at_level, energy_of, levels_of
from .running import evaluating, images_in, watching
from .swap import harmonic_layers

# For each layer by name: the share of its energy that each possible level loses, from the present level downwards.
Losses = dict[str, dict[int, float]]


def losses_by_filters(model: nn.Module) -> Losses:
    """Share of the energy of each harmonic layer's filters that each level loses; 0 at the present level.

    If all filters of a layer are zero, any lower level loses everything. Raises ValueError if weights are not finite.
    """
    found = {}
    for name, layer in harmonic_layers(model).items():
        energy = energy_of(layer)
        sums = torch.tensor([i + j for i, j in dct_frequencies(layer.kernel_size[0], layer.level, layer.dc)])
        lost = {level: float(energy[sums >= level].sum()) for level in levels_of(layer)}
        total = float(energy.sum())
        found[name] = _check_finite(
            name, {level: part / total if total else float(level < layer.level) for level, part in lost.items()}
        )
    return found


def losses_by_images(model: nn.Module, data: Iterable[Any], batches: int | None = None) -> Losses:
    """Share of each harmonic layer's output on images that becomes error, at each level.

    Each layer gets its complete input, so this is the error that the layer itself makes. A frequency that is rare in
    the input, or that cancels between channels, counts for little. With the error e and the complete output y, the
    ratio E[e^2] / Var[y] is averaged over output channels, because normalisation divides each by its own deviation, and
    brought into [0, 1) as ratio / (1 + ratio). The network is in evaluation meanwhile. A layer that no image reaches is
    judged by its filters.

    `data` are batches of images (B, C, H, W), alone or first in a tuple or list; `batches` is how many are read at
    most. Raises TypeError and ValueError as `images_in` does, or ValueError if outputs are not finite.
    """
    layers, found = harmonic_layers(model), losses_by_filters(model)
    lower = {
        name: {level: at_level(layers[name], level).eval() for level in of if level < layers[name].level}
        for name, of in found.items()
    }
    outputs = {name: _Moments() for name in layers}
    errors = {name: {level: _Moments() for level in of} for name, of in lower.items()}

    def watch(name: str, layer: HarmonicLayer, x: Tensor, output: Tensor) -> None:
        outputs[name].add(output)
        for level, truncated in lower[name].items():
            errors[name][level].add(output - truncated(x))

    parameter = next(model.parameters())
    with evaluating(model), watching(model, watch), torch.no_grad():
        for images in images_in(data, parameter, batches):
            model(images)
    for name, output in outputs.items():
        if not output.count:
            continue
        variance = output.variance()
        alive = variance > 1e-12 * variance.max()  # a channel that is constant has nothing to lose
        for level, error in errors[name].items() if alive.any() else ():
            ratio = float((error.square[alive] / variance[alive]).mean())
            found[name][level] = ratio / (1 + ratio)
        _check_finite(name, {**found[name], 0: float(variance.max())})
    return found


class _Moments:
    """Mean and mean square of each channel, (C,) in float64, over everything that was added."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, responses: Tensor) -> None:
        values = responses.transpose(0, 1).flatten(1)  # (C, B * H * W)
        variance, mean = torch.var_mean(values.to(torch.promote_types(values.dtype, torch.float32)), 1, correction=0)
        variance, mean = variance.cpu().double(), mean.cpu().double()
        self.count += values.shape[1]
        share = values.shape[1] / self.count
        self.mean = self.mean + (mean - self.mean) * share
        self.square = self.square + (variance + mean.square() - self.square) * share

    def variance(self) -> Tensor:
        return (self.square - self.mean.square()).clamp_min(0)


def _check_finite(name: str, losses: dict[int, float]) -> dict[int, float]:
    if not torch.tensor(list(losses.values())).isfinite().all():
        raise InputError(f'{name} has weights or outputs that are not finite: its frequencies cannot be weighed.')
    return losses
