"""What harmonic layers cost at each level: parameters, multiply-adds and time, each in the cheaper of two forms."""

import copy
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..common import explained
from ..layers import HarmonicLayer
from .running import Use, uses_of
from .swap import harmonic_layers, in_fusing_blocks, make_plain
from .timing import time_of, times_of_layers

Form = str | Mapping[str, str]  # of all layers, or by patterns over names; the first pattern that matches counts

# `forms_by_rule`: the share of the dense form's multiply-adds, and the channels in each group of the 1 x 1 convolution;
# with fewer, fixed filters take longer than they save.
_SHARE, _CHANNELS = 0.5, dict(torch=128, onnxruntime=64)


class Pairs(NamedTuple):
    """A choice of what a layer keeps, as levels are: pairs of channel and function, of mixtures if there are any."""

    number: int
    mixtures: int = 0


class Cost(NamedTuple):
    """What a layer costs at a level, in its cheaper form. Parameters do not depend on the form."""

    cost: float
    form: str = 'dense'
    milliseconds: dict[str, float] | None = None  # by form, if they were measured


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a network's harmonic layers, by name and level, and of everything else in it."""

    rest: float
    of: dict[str, dict[Any, Cost]]

    def total(self, levels: Mapping[str, Any]) -> float:
        """Returns the cost of the network with each layer at a level."""
        return self.rest + sum(self.of[name][level].cost for name, level in levels.items())

    @property
    def present(self) -> float:
        """Cost of the network as it is."""
        return self.total({name: max(of) for name, of in self.of.items()})

    @property
    def least(self) -> float:
        """Cost with every layer at its cheapest level."""
        return self.rest + sum(min(of.cost for of in by_level.values()) for by_level in self.of.values())


def costs_of(
    model: nn.Module,
    cost: str,
    images: Tensor | None = None,
    runtime: str = 'torch',
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> Costs:
    """Returns the costs of a fused network: 'parameters', 'macs' (multiply-adds of one image), 'time' (of all images).

    The rest is the whole dense network less its dense layers. It includes layers in blocks that fuse their own
    convolutions: their levels do not change what the block costs. Time is measured in a runtime, see `deploy`.
    `choices` are those of each layer, by default levels.
    """
    layers = harmonic_layers(model)
    choices = {name: layer.levels() for name, layer in layers.items()} if choices is None else choices
    if cost == 'parameters':
        of: dict[str, dict[Any, Cost]] = {}
        for name, layer in layers.items():
            width, of[name] = layer.out_channels // layer.groups, {}
            for choice in choices[name]:
                number, mixtures = sizes(layer, choice)
                of[name][choice] = Cost(width * number + mixtures * layer.in_channels)
        present = sum(p.numel() for p in model.parameters())
        return Costs(present - sum(costs[max(costs)].cost for costs in of.values()), of)
    assert images is not None
    uses, within = uses_of(model, images), in_fusing_blocks(model)
    of = {name: {chosen: Cost(0.0) for chosen in of_layer} for name, of_layer in choices.items()}
    used = {name: layer for name, layer in layers.items() if uses[name] and name not in within}
    plain = make_plain(model, {})
    if cost == 'macs':
        rest = float(count_macs(plain, images))
        for name, layer in used.items():
            rest -= multiply_adds(layer, layer.level, 'dense', uses[name]) / len(images)
            for chosen in choices[name]:
                form = 'separable' if _saves(layer, chosen) else 'dense'
                of[name][chosen] = Cost(multiply_adds(layer, chosen, form, uses[name]) / len(images), form)
        return Costs(rest, of)
    of |= _time_choices({name: (layer, choices[name]) for name, layer in used.items()}, uses, runtime)
    inside = sum((costs[max(costs)].milliseconds or {})['dense'] for name, costs in of.items() if name in used)
    return Costs(max(0.0, time_of(plain, images, runtime) - inside), of)


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Counts a network's multiply-adds for one image, as torch does: convolutions and matrix products.

    Raises InputError if the network cannot run on shapes alone.
    """
    # On the meta device, because fused kernels of attention and recurrent layers are not counted everywhere. Without
    # gradients, because torch's counter cannot follow modules that get a parameter as their input.
    shapes = copy.deepcopy(model).eval().requires_grad_(False).to('meta')
    problem, composed = f'the multiply-adds of {type(model).__name__} cannot be counted', sdpa_kernel(SDPBackend.MATH)
    with explained(problem, Exception), torch.no_grad(), composed, FlopCounterMode(display=False) as counter:
        shapes(images.detach().to('meta'))
    return counter.get_total_flops() // 2 // len(images)


def multiply_adds(layer: HarmonicLayer, choice: Any, form: str, uses: Sequence[Use] | None = None) -> int:
    """Counts a layer's multiply-adds in these uses, or else behind the mixtures at one position."""
    area, width = layer.kernel_size[0] ** 2, layer.out_channels // layer.groups
    number, mixtures = sizes(layer, choice)
    each = area * (mixtures or layer.in_channels) * width if form == 'dense' else number * (area + width)
    if uses is None:
        return each
    return each * sum(use.positions for use in uses) + mixtures * sum(use.shape.numel() for use in uses)


def sizes(layer: HarmonicLayer, choice: Any) -> tuple[int, int]:
    """Returns the numbers of responses and of mixtures, 0 for none, that a layer has with a choice."""
    pairs = choice if isinstance(choice, Pairs) else Pairs(layer.groups * len(layer.columns_at(choice)))
    return pairs.number, pairs.mixtures or (0 if layer.mixtures is None else layer.channels)


def reduced(layer: Any, choice: Any, kept: Mapping[Any, Any] | None = None) -> HarmonicLayer:
    """Returns a copy of a layer with a choice: as `kept` says, else any mixtures and the pairs with the most energy."""
    if not isinstance(choice, Pairs):
        return layer.at_level(choice)
    any_mixtures = [torch.eye(choice.mixtures, layer.in_channels)] if choice.mixtures else None
    mixed, pairs = (kept or {}).get(choice, (any_mixtures, choice.number))
    return (layer if mixed is None else layer.at_mixtures(*mixed)).at_pairs(pairs)


def _saves(layer: HarmonicLayer, choice: Any) -> bool:
    return multiply_adds(layer, choice, 'separable') < multiply_adds(layer, choice, 'dense')


def forms_by_rule(model: nn.Module, runtime: str = 'torch') -> dict[str, str]:
    """Chooses a form for each harmonic layer by the rule of `deploy`: what is faster on most CPUs."""
    found = {}
    for name, layer in harmonic_layers(model).items():
        separable, dense = (multiply_adds(layer, layer.level, form) for form in ('separable', 'dense'))
        wide = min(layer.channels, layer.out_channels) // layer.groups >= _CHANNELS[runtime]
        fast = separable <= _SHARE * dense and (len(layer.basis) == 1 or wide)
        found[name] = 'separable' if fast else 'dense'
    return {**found, **dict.fromkeys(in_fusing_blocks(model), 'dense')}


def forms_by_time(model: nn.Module, images: Tensor, runtime: str = 'torch') -> dict[str, str]:
    """Chooses a form for each harmonic layer by timing both, see `deploy`; layers that are timed note their times."""
    layers, uses, dense = harmonic_layers(model), uses_of(model, images), in_fusing_blocks(model)
    found = dict.fromkeys(layers, 'dense')
    able = [name for name, layer in layers.items() if uses[name] and name not in dense and _saves(layer, layer.level)]
    timed = _time_choices({name: (layers[name], [layers[name].level]) for name in able}, uses, runtime)
    for name, times in timed.items():
        _, found[name], layers[name].milliseconds = times[layers[name].level]
    return found


def _time_choices(
    layers: Mapping[str, tuple[HarmonicLayer, Sequence[Any]]], uses: Mapping[str, list[Use]], runtime: str
) -> dict[str, dict[Any, Cost]]:
    """Times layers with choices, in both forms where the separable one takes fewer multiply-adds, on their own inputs.

    Equal layers with equal inputs are timed once. Times are those of all uses of a layer, which are taken to be alike.
    """
    done: dict[tuple[object, ...], dict[Any, Cost]] = {}
    found: dict[str, dict[Any, Cost]] = {}
    for name, (layer, choices) in layers.items():
        use, number = uses[name][0], len(uses[name])
        key = (type(layer), layer.extra_repr(), tuple(choices), use, number)
        if key not in done:
            # Choices differ in their dense form by their mixtures alone.
            dense = {of: f'dense {of.mixtures}' if isinstance(of, Pairs) else 'dense' for of in choices}
            modules = {form: _fused(layer, choice, 'dense') for choice, form in dense.items()}
            modules |= {f'separable {of}': _fused(layer, of, 'separable') for of in choices if _saves(layer, of)}
            times = times_of_layers(modules, use.draw(), runtime)
            middle = {form: number * statistics.median(of) for form, of in times.items()}
            done[key] = {}
            for choice in choices:
                by_form, form = {'dense': middle[dense[choice]]}, 'dense'
                if (other := f'separable {choice}') in times:
                    by_form['separable'] = middle[other]
                    ratios = [a / b for a, b in zip(times[other], times[dense[choice]], strict=True)]
                    if statistics.quantiles(ratios, n=4)[2] < 1:  # by more than the noise
                        form = 'separable'
                done[key][choice] = Cost(by_form[form], form, by_form)
        found[name] = done[key]
    return found


def _fused(layer: HarmonicLayer, choice: Any, form: str) -> nn.Module:
    low: Any = reduced(layer, choice)
    low.form = form
    return low.fuse().eval()


def set_forms(model: nn.Module, forms: Mapping[str, str]) -> None:
    layers = harmonic_layers(model)
    for name, form in forms.items():
        layers[name].form = form
