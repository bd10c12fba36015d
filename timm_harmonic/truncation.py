"""Dropping high frequencies: which levels the layers of a network keep, and what that costs."""

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .conv import HarmonicLayer
from .convert import PatternLevels, describe, plan
from .dct import dct_frequencies
from .swap import harmonic_layers, replace_layers

__all__ = [
    'Losses',
    'choose_levels',
    'losses_by_response',
    'losses_by_weight',
    'parameters_at',
    'parameters_of',
    'truncate',
]

# For each layer by name: the share of its energy that is lost by each possible level, from the present one downwards.
Losses = dict[str, dict[int, float]]

_LEAST = 1e-12  # share of energy; a layer that keeps nothing is worse than any other, not infinitely bad


def truncate(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    energy: float | None = None,
    max_params: int | None = None,
    ratio: float | None = None,
    data: Iterable[Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Drops the high frequencies of a network's harmonic layers: of each filter, the nearest in L2 is left.

    How much is said in one of four ways. With `energy`, each layer gets the lowest level that keeps this share of its
    energy. With `max_params` or `ratio`, levels are chosen over all layers together, greedy by the energy lost per
    parameter saved, see `choose_levels`.

    Energy is that of the filters, or, with `data`, of what the filters do with these images, see `losses_by_response`.
    Always as a share of a layer's own: normalisation after a layer makes its scale meaningless. Multiply-adds stay.

    Args:
        model: Network with harmonic layers, see `harmonize`.
        level: The paper's lambda for all layers that `levels` says nothing about.
        levels: Levels by patterns over qualified names (fnmatch), the first that matches counts.
        energy: Share of each layer's present energy to keep, in (0, 1].
        max_params: Parameters that the network may have, all its layers counted.
        ratio: The same as a share of the present parameters, in (0, 1].
        data: Batches of images (B, C, H, W), alone or first in a tuple or list, for `energy`, `max_params` and `ratio`.
        inplace: Whether the network itself is changed, rather than a copy.

    Returns:
        The network, with fewer parameters.

    Raises:
        ValueError: If there is nothing harmonic, an argument is out of range or missing, a pattern matches nothing, a
            layer has weights that are not finite, or the network cannot be made as small as that.
        TypeError: If a level or a number has another type.
    """
    layers = harmonic_layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no harmonic layers: harmonize it first.')
    by_level = dict(level=level, levels=levels)
    by_energy = dict(energy=energy, max_params=max_params, ratio=ratio)
    given = [name for name, value in {**by_level, **by_energy}.items() if value is not None]
    if len(given) != 1 and given != ['level', 'levels']:
        raise ValueError(
            f'say in one way how much is dropped: level and levels, energy, max_params or ratio; '
            f'got {" and ".join(given) or "none"}.'
        )
    if given[0] in by_level:
        if data is not None:
            raise ValueError('data weigh frequencies for energy, max_params and ratio: they mean nothing for levels.')
        chosen = plan(model, level=level, levels=levels, include=lambda name, layer: name in layers)
    else:
        budget = _budget(model, **by_energy)
        losses = losses_by_weight(model) if data is None else losses_by_response(model, data)
        if budget is None:
            chosen = {name: min(lv for lv, lost in of.items() if lost <= 1 - energy) for name, of in losses.items()}
        else:
            chosen = choose_levels(model, losses, budget)
    truncated = {name: layer.truncated(chosen[name]) for name, layer in layers.items()}
    if not inplace:
        # What is going to be replaced is not copied: the copy has it in common with the network until then.
        model = copy.deepcopy(model, {id(layer): layer for layer in layers.values()})
    replace_layers(model, truncated)
    return describe(model)


def _budget(model: nn.Module, energy: float | None, max_params: int | None, ratio: float | None) -> int | None:
    """How many parameters the network may have; None if a share of energy says it."""
    for name, share in (('energy', energy), ('ratio', ratio)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f'{name} must be above 0 and at most 1, got {share!r}.')
    if energy is not None:
        return None
    if ratio is not None:
        return int(ratio * parameters_of(model, {}))
    if not isinstance(max_params, int) or isinstance(max_params, bool):
        raise TypeError(f'max_params must be an integer, got {max_params!r}.')
    return max_params


def parameters_at(layer: HarmonicLayer, level: int) -> int:
    """Coefficients that a layer has at a level."""
    count = len(dct_frequencies(layer.kernel_size[0], level, layer.dc))
    return layer.weight.numel() // layer.weight.shape[2] * count


def parameters_of(model: nn.Module, levels: Mapping[str, int]) -> int:
    """Parameters of a network, all its layers counted, with the harmonic layers that are named at these levels."""
    layers = harmonic_layers(model)
    present = sum(p.numel() for p in model.parameters())
    return present - sum(layers[n].weight.numel() - parameters_at(layers[n], level) for n, level in levels.items())


def _levels_of(layer: HarmonicLayer) -> range:
    """Levels that a layer can have, from the present one downwards."""
    return range(layer.level or layer.full_level, 0 if layer.dc else 1, -1)


def losses_by_weight(model: nn.Module) -> Losses:
    """Share of the energy of each harmonic layer's filters that is lost by each level below its own.

    Args:
        model: Network with harmonic layers. A layer whose filters are all zero has no energy to judge by: any lower
            level counts as a loss of all.

    Returns:
        The losses, which are 0 at the present level.

    Raises:
        ValueError: If a layer's weights are not finite.
    """
    found = {}
    for name, layer in harmonic_layers(model).items():
        energy = layer.energy()
        sums = torch.tensor([i + j for i, j in dct_frequencies(layer.kernel_size[0], layer.level, layer.dc)])
        lost = {level: float(energy[sums >= level].sum()) for level in _levels_of(layer)}
        total, present = float(energy.sum()), max(lost)
        found[name] = _finite(name, {lv: part / total if total else float(lv < present) for lv, part in lost.items()})
    return found


def losses_by_response(model: nn.Module, data: Iterable[Any]) -> Losses:
    """Share of what each harmonic layer puts out on data that is error, at each level below its own.

    The layer's input is complete, so this is the error that the layer itself makes: by the input's covariance, a
    frequency that is rare in the input, or that cancels between channels, weighs little. With e the error and y the
    complete output, the ratio E[e^2] / Var[y], averaged over output channels because normalisation divides each by its
    own deviation, is brought into [0, 1) as ratio / (1 + ratio). The network is in evaluation meanwhile. A layer that
    the data do not reach is judged by its weights.

    Args:
        model: Network with harmonic layers.
        data: Batches of images (B, C, H, W), alone or first in a tuple or list.

    Returns:
        The losses, which are 0 at the present level.

    Raises:
        ValueError: If there are no batches, or responses are not finite.
    """
    layers = harmonic_layers(model)
    lower = {
        name: {level: layer.truncated(level).eval() for level in _levels_of(layer)[1:]}
        for name, layer in layers.items()
    }
    outputs = {name: _Moments() for name in layers}
    errors = {name: {level: _Moments() for level in of} for name, of in lower.items()}

    def watch(name: str) -> Any:
        def hook(layer: HarmonicLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name].add(output)
            for level, truncated in lower[name].items():
                errors[name][level].add(output - truncated(inputs[0]))

        return hook

    parameter = next(model.parameters())
    with _evaluating(model), torch.no_grad():
        handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
        try:
            for batch in data:
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(images.to(parameter))
        finally:
            for handle in handles:
                handle.remove()
    if not any(output.count for output in outputs.values()):
        raise ValueError('data have no batches: give at least one batch of images.')
    found = losses_by_weight(model)
    for name, output in outputs.items():
        if output.count:
            variance = output.variance()
            alive = variance > 1e-12 * variance.max()  # a channel that never changes has nothing to lose
            ratios = {level: float((of.square[alive] / variance[alive]).mean()) for level, of in errors[name].items()}
            shares = {level: ratio / (1 + ratio) for level, ratio in ratios.items()}
            found[name] = _finite(name, {max(found[name]): 0.0, **shares} if alive.any() else found[name])
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


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finite(name: str, losses: dict[int, float]) -> dict[int, float]:
    if not torch.tensor(list(losses.values())).isfinite().all():
        raise ValueError(f'{name} has weights or responses that are not finite: its frequencies cannot be weighed.')
    return losses


def choose_levels(model: nn.Module, losses: Losses, max_params: int) -> dict[str, int]:
    """Levels for all layers together, such that the network has at most so many parameters.

    What is kept shall be large as a product over the layers, since each passes on what the one before has left: the
    sum of -ln(1 - loss) is made small. Greedy: of all layers' steps to lower levels, that with the least increase per
    parameter saved comes first, steps being those along the lower convex hull of each layer's (parameters, -ln(1 -
    loss)). So far no other choice with as few parameters has a smaller sum. The last step may save more than was asked
    for: what fits is then given back, to the layer that gains most by it, which is a heuristic.

    Args:
        model: Network with harmonic layers.
        losses: Of `losses_by_weight` or `losses_by_response`.
        max_params: Parameters that the network may have, all its layers counted.

    Returns:
        Levels by name.

    Raises:
        ValueError: If even the lowest levels leave more parameters than that.
    """
    layers = harmonic_layers(model)
    sizes = {name: {level: parameters_at(layers[name], level) for level in of} for name, of in losses.items()}
    costs = {
        name: {level: -math.log(max(1 - loss, _LEAST)) for level, loss in of.items()} for name, of in losses.items()
    }
    chosen = {name: max(of) for name, of in losses.items()}
    now = parameters_of(model, chosen)
    least = parameters_of(model, {name: min(of) for name, of in losses.items()})
    if max_params < least:
        raise ValueError(
            f'max_params={max_params:,} cannot be reached: the network has {now:,} parameters, and {least:,} are left '
            'when every layer has its lowest level.'
        )
    steps = [
        (slope, place, name, level)
        for place, name in enumerate(losses)
        for slope, level in _hull(sizes[name], costs[name])
    ]
    for _, _, name, level in sorted(steps, key=lambda step: step[:2]):
        if now <= max_params:
            break
        now -= sizes[name][chosen[name]] - sizes[name][level]
        chosen[name] = level
    while True:
        raises = [
            (of[chosen[name]] - cost, name, level)
            for name, of in costs.items()
            for level, cost in of.items()
            if cost < of[chosen[name]] and 0 < sizes[name][level] - sizes[name][chosen[name]] <= max_params - now
        ]
        if not raises:
            return chosen
        _, name, level = max(raises, key=lambda step: step[0])
        now += sizes[name][level] - sizes[name][chosen[name]]
        chosen[name] = level


def _hull(sizes: dict[int, int], costs: dict[int, float]) -> list[tuple[float, int]]:
    """Steps down the lower convex hull from the highest level: (cost per parameter saved, level), slopes ascending."""
    steps, level = [], max(sizes)
    while lower := [lv for lv in sizes if lv < level]:
        slopes = {lv: (costs[lv] - costs[level]) / (sizes[level] - sizes[lv]) for lv in lower}
        level = min(lower, key=lambda lv: (slopes[lv], lv))
        steps.append((slopes[level], level))
    return steps
