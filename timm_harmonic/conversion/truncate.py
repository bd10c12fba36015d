"""Dropping high frequencies: what each level loses, which levels fit a budget, and `truncate`, which drops the rest."""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..common import InputError
from ..layers import dct_frequencies
from .channels import Choices
from .costs import Costs, Pairs, costs_of
from .harmonize import PatternLevels, Selection, plan, record_options
from .refit import losses_by_images, output_error, refitted, take_over
from .running import HELD_OUT, check_changeable, read_images, trainable
from .swap import check_unwrapped, harmonic_layers, replace_layers
from .timing import check_runtime

_COSTS, _PER = ('parameters', 'macs', 'time'), ('layer', 'channel', 'mixture')
_LEAST = 1e-12  # share of energy: keeping nothing is worse than anything else, but not infinitely bad
_STEPS = 2**16  # of cost, into which `choose_levels` divides what the budget leaves above the least

Losses = dict[str, dict[Any, float]]  # by layer and choice, from the present one downwards: the share that is lost


@trainable
def truncate(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    per: str = 'layer',
    include: Selection | None = None,
    exclude: Selection | None = None,
    cost: str = 'parameters',
    images: Tensor | None = None,
    runtime: str = 'torch',
    data: Iterable[Any] | None = None,
    refit: bool = False,
    batches: int | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Drops the high frequencies of a network's harmonic layers. Each filter becomes the nearest in L2.

    Pass exactly one of level (with or without levels), levels, energy, ratio. With `energy`, each layer gets the lowest
    level that keeps this share of its energy. With `ratio`, the levels of all layers are chosen together, so that the
    network meets the budget and loses as little energy as possible, see `choose_levels`.

    Energy is that of the filters or, with `data`, of the layers' outputs on these images, see `losses_by_images`. Each
    layer counts its share of its own energy, because a normalisation after it removes its scale.

    With per='channel', every input channel keeps its own functions: pairs of channel and function go one after another
    (see `eliminate`), those last whose absence the others cannot make up for. Pass `data` and refit=True: without data
    this loses far more than levels do, without refitting it gains nothing. Some layers keep to levels, see `sizes_of`.
    With per='mixture', layers may first mix their channels to fewer, and then each mixture keeps its own functions, see
    `mixtures_of`: where channels resemble each other, as behind poolings, this loses less. If levels alone come nearer
    to the complete network on held-out images, at the same budget, the result has levels, with a warning. One layer at
    a time takes the sums of `refit` and about four matrices of 8 F^2 bytes for F features.

    With 'macs' or 'time' as the cost, each layer counts in its cheaper form, and takes that form: timm's
    `reparameterize_model` then makes the network of that cost. `deploy` chooses forms again.

    Args:
        model: Network with harmonic layers, see `harmonize`.
        level: The paper's lambda for all layers that `levels` does not name.
        levels: Levels by patterns over qualified names (fnmatch). The first pattern that matches counts.
        energy: Share of each layer's present energy to keep, in (0, 1].
        ratio: Share of the present cost to keep, in (0, 1].
        per: What energy and ratio choose: a level for each 'layer', or the functions of each 'channel' or 'mixture'.
        include: Patterns, or a predicate of name and layer: change only these.
        exclude: Patterns, or a predicate: leave these as they are.
        cost: The cost: 'parameters' (of the whole network), 'macs' (multiply-adds), or 'time' (measured).
        images: Example batch (B, C, H, W) for macs and time, on the device, in the dtype and memory format that count.
        runtime: Where to measure time: 'torch', or 'onnxruntime', see `deploy`.
        data: Batches of images (B, C, H, W), alone or first in a tuple or list. For energy, ratio and refit.
        refit: Whether to fit what is kept to the complete network's outputs on `data`, without labels, by the function
            `refit`. Losses are then what refitting leaves over.
        batches: The most batches of `data` to read. Endless data need it.
        inplace: Whether to change the network itself rather than a copy.

    Returns:
        The network, with fewer parameters. With macs or time, `harmonic_report` shows the forms.

    Raises:
        InputError: If no layer is harmonic, an argument is out of range or missing, a pattern matches nothing, a layer
            has weights that are not finite, or no choice of levels meets the budget.
        TypeError: If a level or a number has another type.
    """
    check_unwrapped(model)
    if inplace:
        check_changeable(model)
    layers = harmonic_layers(model)
    if not layers:
        raise InputError(f'{type(model).__name__} has no harmonic layers: harmonize it first.')
    by_hand = level is not None or levels is not None
    _check_amounts(dict(level=level, levels=levels, energy=energy, ratio=ratio), cost, images, runtime)
    if per not in _PER or (by_hand and per != 'layer') or (per == 'mixture' and (data is None or ratio is None)):
        needs = "'channel' with energy or ratio, 'mixture' with ratio and data"
        raise InputError(f'per must be one of {_PER}, {needs}; got {per!r}.')
    if refit and data is None:
        raise InputError('refit needs data: batches of images.')
    if by_hand and data is not None and not refit:
        raise InputError('data serve to choose levels or to refit: with given levels, pass refit=True or no data.')
    selected = plan(model, include=include, exclude=exclude)
    if not (names := [name for name in layers if name in selected]):
        raise InputError('include and exclude leave none of the harmonic layers.')
    held = refit or per != 'layer'
    least = 2 * HELD_OUT if held else 1
    parts = None if data is None else read_images(data, next(model.parameters()), batches, least)

    def cut(choices: Choices, chosen: dict[str, Any], costs: Costs | None = None) -> nn.Module:
        lower = choices.lowered(chosen)
        if costs is not None and cost != 'parameters':
            for name, layer in lower.items():
                _, layer.form, layer.milliseconds = costs.of[name][chosen[name]]
        small = copy.deepcopy(model)
        replace_layers(small, lower)
        return refitted(model, small, parts) if refit and parts is not None else small

    choices = [Choices(layers, names, per)]
    if by_hand:
        chosen = {name: layer.level for name, layer in layers.items()}
        chosen |= plan(model, level=level, levels=levels, include=lambda name, layer: name in names)
        small = cut(choices[0], chosen)
    elif energy is not None:
        (losses,) = _losses(model, choices, parts, held)
        enough = {name: [level for level, lost in of.items() if lost <= 1 - energy] for name, of in losses.items()}
        small = cut(choices[0], {name: min(of, default=max(losses[name])) for name, of in enough.items()})
    else:
        assert ratio is not None
        costs = [costs_of(model, cost, images, runtime, choices[0].of)]
        budget = budget_of(costs[0], ratio)
        if per != 'layer' and parts is not None and costs[0].present > budget:
            other = Choices(layers, names, 'layer')
            if (priced := costs_of(model, cost, images, runtime, other.of)).least <= budget:
                choices, costs = [*choices, other], [*costs, priced]
        rivals = [
            cut(of, choose_levels(losses, priced, budget), priced)
            for of, losses, priced in zip(choices, _losses(model, choices, parts, held), costs, strict=True)
        ]
        small = _nearest(model, rivals, parts)
    if inplace:
        replace_layers(model, harmonic_layers(small))
        small = take_over(model, small) if refit else model
    return record_options(small)


def _losses(model: nn.Module, choices: Sequence[Choices], parts: Sequence[Tensor] | None, refit: bool) -> list[Losses]:
    found = [losses_by_filters(model, of) for of in choices]
    if parts is not None:
        by_images = losses_by_images(model, parts, [of.weighed for of in choices], refit)
        return [losses | weighed for losses, weighed in zip(found, by_images, strict=True)]
    return found


def _nearest(model: nn.Module, rivals: Sequence[nn.Module], parts: Sequence[Tensor] | None) -> nn.Module:
    """Returns the first network, of pairs, or the other, of levels, if its outputs on held-out images are nearer."""
    if len(rivals) == 1 or parts is None:
        return rivals[0]
    errors = [math.sqrt(output_error(model, network, parts)) for network in rivals]
    if errors[0] <= errors[1]:
        return rivals[0]
    text = 'levels come nearer to the complete network on held-out images than functions of each channel or mixture'
    warnings.warn(f'{text}: errors of {errors[1]:.3g} and {errors[0]:.3g}. The result has levels.', stacklevel=4)
    return rivals[1]


def _check_amounts(amounts: dict[str, Any], cost: str, images: Tensor | None, runtime: str) -> None:
    given = [name for name, value in amounts.items() if value is not None]
    if len(given) != 1 and given != ['level', 'levels']:
        raise InputError(f'pass exactly one of level and levels, energy, ratio; got {" and ".join(given) or "none"}.')
    for name in {'energy', 'ratio'}.intersection(given):
        share = amounts[name]
        if isinstance(share, bool) or not isinstance(share, Real):
            raise TypeError(f'{name} must be a number above 0 and at most 1, got {share!r}.')
        if not 0 < float(share) <= 1:
            raise InputError(f'{name} must be above 0 and at most 1, got {share!r}.')
    if cost not in _COSTS:
        raise InputError(f'cost must be one of {_COSTS}, got {cost!r}.')
    if cost == 'parameters' and images is not None:
        raise InputError("images are for cost='macs' and cost='time'. To weigh frequencies by images, pass data.")
    if cost != 'parameters' and amounts['ratio'] is None:
        raise InputError(f'cost={cost!r} needs ratio, the share of it to keep.')
    if cost != 'parameters' and not isinstance(images, Tensor):
        raise InputError(f'cost={cost!r} needs images: an example batch (B, C, H, W), where and as it will run.')
    check_runtime(runtime)
    if cost != 'time' and runtime != 'torch':
        raise InputError(f"runtime={runtime!r} is for cost='time', got cost={cost!r}.")


def budget_of(costs: Costs, ratio: float) -> float:
    """Returns the cost that a ratio allows. Raises InputError if no choice of levels is that cheap."""
    if ratio * costs.present < costs.least:
        least = math.ceil(1e3 * costs.least / costs.present) / 1e3
        raise InputError(
            f'ratio={ratio:g} is too small: {least:g} is the least, with every layer at its cheapest level.'
        )
    return ratio * costs.present


def losses_by_filters(model: nn.Module, choices: Choices | None = None) -> Losses:
    """Returns the share of the energy of each harmonic layer's filters that each choice loses; 0 as it is.

    If all filters of a layer are zero, dropping any part loses everything. Raises InputError if weights are not finite.
    """
    found = {}
    for name, layer in harmonic_layers(model).items():
        energies, lost = layer.energies(), {}
        total, sorted_energies = float(energies.sum()), energies.flatten().sort(descending=True).values
        sums = torch.tensor([i + j for i, j in dct_frequencies(layer.kernel_size[0], layer.level, layer.dc)])
        of = layer.levels() if choices is None else choices.of[name]
        for choice in of:
            dropped = sorted_energies[choice.number :] if isinstance(choice, Pairs) else energies[:, sums >= choice]
            dropped = energies if getattr(choice, 'mixtures', 0) else dropped  # filters alone do not tell
            lost[choice] = float(dropped.sum()) / total if total else float(choice < max(of))
        if not torch.tensor(list(lost.values())).isfinite().all():
            raise InputError(f'{name} has weights or outputs that are not finite: its frequencies cannot be weighed.')
        found[name] = lost
    return found


def choose_levels(losses: Losses, costs: Costs, budget: float) -> dict[str, Any]:
    """Chooses levels for all layers together, so that the network costs at most `budget`.

    Shares kept multiply from layer to layer, so the sum of -ln(1 - loss) should be small. Dynamic programming finds the
    best choice for rounded costs, in steps of 2^-16 of what the budget, at least `costs.least`, leaves above that.
    """
    if costs.present <= budget:
        return {name: max(of) for name, of in losses.items()}
    unit = max(budget - costs.least, torch.finfo(torch.float64).tiny) / _STEPS
    # By steps: the harm of the best choice so far.
    least = torch.zeros(_STEPS + len(losses), dtype=torch.float64, device='cpu')
    picks: dict[str, tuple[Tensor, list[tuple[Any, int]]]] = {}  # by steps: the place of the level; levels and steps
    for name, of in losses.items():
        before, least = least, torch.full_like(least, torch.inf)
        pick, options = torch.zeros_like(least, dtype=torch.uint8), []
        cheapest = min(cost.cost for cost in costs.of[name].values())
        for place, level in enumerate(sorted(of)):
            steps = round(min((costs.of[name][level].cost - cheapest) / unit, len(least)))
            options.append((level, steps))
            harm = before[: len(least) - steps] - math.log(max(1 - of[level], _LEAST))
            pick[steps:].masked_fill_(harm < least[steps:], place)
            least[steps:] = least[steps:].minimum(harm)
        picks[name] = pick, options
    for room in reversed(range(len(least))):  # more than the budget, which rounding may allow, down to less
        chosen: dict[str, Any] = {}
        for name, (pick, options) in reversed(picks.items()):
            chosen[name], steps = options[int(pick[room])]
            room -= steps
        if costs.total(chosen) <= budget * (1 + 1e-12):  # sums differ by their order
            break
    return {name: chosen[name] for name in losses}
