"""Dropping high frequencies: which levels the layers of a network keep."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..layers import HarmonicLayer, dct_frequencies
from .convolutions import harmonic_layers, replace_layers
from .energy import at_level
from .harmonize import PatternLevels, plan, record_options
from .losses import Losses, losses_by_filters, losses_by_images

_LEAST = 1e-12  # share of energy: a layer that keeps nothing is worse than any other, but not infinitely bad


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
    """Drops the high frequencies of a network's harmonic layers. Each filter becomes the nearest in L2.

    Pass exactly one of level (with or without levels), levels, energy, max_params, ratio. With `energy`, each layer
    gets the lowest level that keeps this share of its energy. With `max_params` or `ratio`, levels are chosen over all
    layers together, greedily by the energy lost per parameter saved, see `choose_levels`.

    Energy is that of the filters or, with `data`, of the layers' outputs on these images, see `losses_by_images`. It
    counts as a share of the layer's own, because normalisation after a layer takes its scale away. Parameters become
    fewer; multiply-adds stay.

    Args:
        model: Network with harmonic layers, see `harmonize`.
        level: The paper's lambda for all layers that `levels` does not name.
        levels: Levels by patterns over qualified names (fnmatch). The first pattern that matches counts.
        energy: Share of each layer's present energy to keep, in (0, 1].
        max_params: Parameters that the network may have, all its layers counted.
        ratio: The same as a share of the present parameters, in (0, 1].
        data: Batches of images (B, C, H, W), alone or first in a tuple or list. For energy, max_params and ratio.
        inplace: Whether to change the network itself rather than a copy.

    Returns:
        The network, with fewer parameters.

    Raises:
        ValueError: If no layer is harmonic, an argument is out of range or missing, a pattern matches nothing, a layer
            has weights that are not finite, or the network cannot be made so small.
        TypeError: If a level or a number has another type.
    """
    layers = harmonic_layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no harmonic layers: harmonize it first.')
    options = dict(level=level, levels=levels, energy=energy, max_params=max_params, ratio=ratio)
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1 and given != ['level', 'levels']:
        raise ValueError(
            f'pass exactly one of level and levels, energy, max_params, ratio; got {" and ".join(given) or "none"}.'
        )
    if given[0] in ('level', 'levels'):
        if data is not None:
            raise ValueError('data is for energy, max_params and ratio: levels that are given need no choice.')
        chosen = plan(model, level=level, levels=levels, include=lambda name, layer: name in layers)
    else:
        for name, share in (('energy', energy), ('ratio', ratio)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f'{name} must be above 0 and at most 1, got {share!r}.')
        budget = 0 if energy is not None else _budget(model, max_params, ratio)
        losses = losses_by_filters(model) if data is None else losses_by_images(model, data)
        if energy is not None:
            chosen = {name: min(lv for lv, lost in of.items() if lost <= 1 - energy) for name, of in losses.items()}
        else:
            chosen = choose_levels(model, losses, budget)
    lower = {name: at_level(layer, chosen[name]) for name, layer in layers.items()}
    if not inplace:
        # Layers that will be replaced are not copied: the copy shares them with the network until then.
        model = copy.deepcopy(model, {id(layer): layer for layer in layers.values()})
    replace_layers(model, lower)
    return record_options(model)


def _budget(model: nn.Module, max_params: int | None, ratio: float | None) -> int:
    """How many parameters the network may have."""
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
    """Parameters of a network, all its layers counted, with the named harmonic layers at these levels."""
    layers = harmonic_layers(model)
    present = sum(p.numel() for p in model.parameters())
    return present - sum(layers[n].weight.numel() - parameters_at(layers[n], level) for n, level in levels.items())


def choose_levels(model: nn.Module, losses: Losses, max_params: int) -> dict[str, int]:
    """Levels for all layers together, so that the network has at most `max_params` parameters.

    Each layer passes on what the one before left, so the shares kept multiply: the sum of -ln(1 - loss) is to be small.
    Greedy: each layer has steps to lower levels, along the lower convex hull of its (parameters, -ln(1 - loss)), and of
    all steps the one with the least increase per parameter saved comes first. Up to here no choice with as few
    parameters has a smaller sum. The last step may save too much. What then fits goes back to the layer that gains
    most, which is a heuristic. Raises ValueError if even the lowest levels leave more parameters than that.
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
            f'max_params={max_params:,} is too few: the network has {now:,} parameters, and {least:,} with every layer '
            'at its lowest level.'
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
