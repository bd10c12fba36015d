"""Dropping high frequencies: which levels the layers of a network keep."""

import copy
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..common import InputError
from ..layers import HarmonicLayer
from .choose import choose_levels
from .costs import Costs, mac_costs, parameter_costs, time_costs
from .energy import at_level, levels_of
from .harmonize import PatternLevels, plan, record_options
from .losses import Losses, losses_by_filters, losses_by_images
from .refit import Parts, losses_by_refit, read_images
from .refit import refit as fit_to
from .running import check_changeable, trainable
from .swap import check_unwrapped, harmonic_layers, replace_layers

_COSTS = ('parameters', 'macs', 'time')


@trainable
def truncate(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    energy: float | None = None,
    max_params: int | None = None,
    ratio: float | None = None,
    cost: str = 'parameters',
    images: Tensor | None = None,
    data: Iterable[Any] | None = None,
    refit: bool = False,
    losses: Losses | None = None,
    batches: int | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Drops the high frequencies of a network's harmonic layers. Each filter becomes the nearest in L2.

    Pass exactly one of level (with or without levels), levels, energy, max_params, ratio. With `energy`, each layer
    gets the lowest level that keeps this share of its energy. With `max_params` or `ratio`, levels are chosen over all
    layers together, so that as little energy as possible is lost for the budget, see `choose_levels`.

    Energy is that of the filters or, with `data`, of the layers' outputs on these images, see `losses_by_images`. It
    counts as a share of the layer's own, because normalisation after a layer takes its scale away.

    `ratio` is a share of the parameters, of the multiply-adds, or of the time in evaluation. The latter two are those
    of each layer in its better form, which it gets: timm's `reparameterize_model` then makes the network that is so
    fast. `deploy` chooses forms anew.

    Args:
        model: Network with harmonic layers, see `harmonize`.
        level: The paper's lambda for all layers that `levels` does not name.
        levels: Levels by patterns over qualified names (fnmatch). The first pattern that matches counts.
        energy: Share of each layer's present energy to keep, in (0, 1].
        max_params: Parameters that the network may have, all its layers counted.
        ratio: Share of the present cost to keep, in (0, 1].
        cost: What the ratio is of: 'parameters', 'macs' (multiply-adds), or 'time' (measured).
        images: For macs and time an example batch (B, C, H, W), on the device and in the dtype and memory format that
            count.
        data: Batches of images (B, C, H, W), alone or first in a tuple or list. For energy, max_params, ratio and
            refit.
        refit: Whether to fit the coefficients to what the complete network computes on the data, by the function
            `refit`. Energies are then what it leaves over, see `losses_by_refit`. No label is used.
        losses: In place of energies and data: by layer and level, the share of it that is lost, from 0 to 1.
        batches: How many batches of the data are read at most. Data without an end need it.
        inplace: Whether to change the network itself rather than a copy.

    Returns:
        The network, with fewer parameters. With macs or time, `harmonic_report` shows the forms.

    Raises:
        ValueError: If no layer is harmonic, an argument is out of range or missing, a pattern matches nothing, a layer
            has weights that are not finite, or the network cannot be made so small.
        TypeError: If a level or a number has another type.
    """
    check_unwrapped(model)
    if inplace:
        check_changeable(model)
    layers = harmonic_layers(model)
    if not layers:
        raise InputError(f'{type(model).__name__} has no harmonic layers: harmonize it first.')
    options = dict(level=level, levels=levels, energy=energy, max_params=max_params, ratio=ratio)
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1 and given != ['level', 'levels']:
        raise InputError(
            f'pass exactly one of level and levels, energy, max_params, ratio; got {" and ".join(given) or "none"}.'
        )
    for name, share in (('energy', energy), ('ratio', ratio)):
        if share is not None and (isinstance(share, bool) or not isinstance(share, Real)):
            raise TypeError(f'{name} must be a number above 0 and at most 1, got {share!r}.')
        if share is not None and not 0 < share <= 1:
            raise InputError(f'{name} must be above 0 and at most 1, got {share!r}.')
    if losses is not None and data is not None and not refit:
        raise InputError('pass data or losses: losses are what data would tell.')
    _check_cost(cost, images, ratio)
    if refit:
        if data is None:
            raise InputError('refit needs data: batches of images.')
        data = read_images(data, next(model.parameters()), batches)
    if given[0] in ('level', 'levels'):
        if (data is not None and not refit) or losses is not None:
            raise InputError('data and losses are for energy, max_params and ratio: given levels need no choice.')
        chosen = plan(model, level=level, levels=levels, include=lambda name, layer: name in layers)
    else:
        costs = _costs(model, cost, images)
        budget = 0.0 if energy is not None else _budget(costs, max_params, ratio)
        losses = _losses(model, data, batches) if losses is None else _check_losses(losses, layers)
        if energy is not None:
            chosen = {
                name: min((lv for lv, lost in of.items() if lost <= 1 - energy), default=max(of))
                for name, of in losses.items()
            }
        else:
            chosen = choose_levels(losses, costs, budget)
    lower = {name: at_level(layer, chosen[name]) for name, layer in layers.items()}
    if cost != 'parameters':
        for name, layer in lower.items():
            layer.form = costs.forms[name][chosen[name]]
            layer.milliseconds = costs.milliseconds.get(name, {}).get(chosen[name])
    small = copy.deepcopy(model) if refit or not inplace else model
    replace_layers(small, lower)
    if refit:
        assert data is not None
        small = fit_to(model, small, data, inplace=True)
    if inplace and small is not model:
        replace_layers(model, harmonic_layers(small))
        model.load_state_dict(small.state_dict())
        small = model
    return record_options(small)


def _budget(costs: Costs, max_params: int | None, ratio: float | None) -> float:
    """What the network may cost. Raises ValueError if the ratio is below the least that is possible."""
    if ratio is not None:
        if ratio * costs.present < costs.least:
            raise InputError(
                f'ratio={ratio:g} is too small: {math.ceil(1e3 * costs.least / costs.present) / 1e3:g} is the least, '
                f'{costs.text(costs.least)} of {costs.text(costs.present)} with every layer at its cheapest level.'
            )
        return ratio * costs.present
    if not isinstance(max_params, int) or isinstance(max_params, bool):
        raise TypeError(f'max_params must be an integer, got {max_params!r}.')
    return max_params


def _costs(model: nn.Module, cost: str, images: Tensor | None) -> Costs:
    if cost == 'parameters':
        return parameter_costs(model)
    assert images is not None
    return mac_costs(model, images) if cost == 'macs' else time_costs(model, images)


def _losses(model: nn.Module, data: Iterable[Any] | None, batches: int | None) -> Losses:
    if data is None:
        return losses_by_filters(model)
    return losses_by_refit(model, data) if isinstance(data, Parts) else losses_by_images(model, data, batches)


def _check_cost(cost: str, images: Tensor | None, ratio: float | None) -> None:
    if cost not in _COSTS:
        raise InputError(f'cost must be one of {_COSTS}, got {cost!r}.')
    if cost == 'parameters' and images is not None:
        raise InputError("images are for cost='macs' and cost='time'. Images to weigh frequencies by are data.")
    if cost != 'parameters' and ratio is None:
        raise InputError(f'cost={cost!r} needs ratio, the share of it to keep.')
    if cost != 'parameters' and not isinstance(images, Tensor):
        raise InputError(
            f'cost={cost!r} needs images: an example batch (B, C, H, W), on the device and in the dtype that count.'
        )


def _check_losses(losses: Losses, layers: Mapping[str, HarmonicLayer]) -> Losses:
    """Losses of one's own. Raises TypeError if they are no such mapping, ValueError if one is missing or no share."""
    if not isinstance(losses, Mapping) or not all(isinstance(of, Mapping) for of in losses.values()):
        raise TypeError('losses must map names of layers to losses by level, as {"layer1.0.conv1": {5: 0.0, 4: 0.1}}.')
    for name, layer in layers.items():
        for level in levels_of(layer):
            if level not in losses.get(name, {}):
                raise InputError(f'losses have no entry for {name} at level {level}.')
            loss = losses[name][level]
            if not isinstance(loss, (Real, Tensor)) or not 0 <= loss <= 1:
                raise InputError(f'losses of {name} must be shares from 0 to 1, got {loss!r}.')
    return {name: {level: float(losses[name][level]) for level in levels_of(layer)} for name, layer in layers.items()}
