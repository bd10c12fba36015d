"""What a network costs with its layers at any level: in parameters, in multiply-adds, or in time on a device."""

import dataclasses
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers import HarmonicLayer
from .deploy import deploy
from .energy import functions_at, levels_of
from .forms import multiply_adds, saves, time_levels
from .running import evaluating, uses_of
from .swap import harmonic_layers, in_fusing_blocks
from .timing import times_of


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of the harmonic layers of a network, by name and level, and of everything else in it.

    They are those of the better form, which is in `forms`; parameters do not depend on it.
    """

    unit: str
    rest: float
    of: dict[str, dict[int, float]]
    forms: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    milliseconds: dict[str, dict[int, dict[str, float]]] = dataclasses.field(default_factory=dict)  # by form

    def total(self, levels: Mapping[str, int]) -> float:
        """Cost of the network with every layer at a level."""
        return self.rest + sum(self.of[name][level] for name, level in levels.items())

    @property
    def present(self) -> float:
        """Cost of the network as it is."""
        return self.total({name: max(of) for name, of in self.of.items()})

    @property
    def least(self) -> float:
        """Cost with every layer at its cheapest level."""
        return self.rest + sum(min(of.values()) for of in self.of.values())

    def text(self, cost: float) -> str:
        """A cost with its unit."""
        return f'{cost:.3g} ms' if self.unit == 'ms' else f'{round(cost):,} {self.unit}'


def parameter_costs(model: nn.Module) -> Costs:
    """Parameters, all those of the network counted."""
    layers = harmonic_layers(model)
    of: dict[str, dict[int, float]] = {n: {lv: parameters_at(x, lv) for lv in levels_of(x)} for n, x in layers.items()}
    present = sum(p.numel() for p in model.parameters())
    return Costs('parameters', present - sum(sizes[max(sizes)] for sizes in of.values()), of)


def mac_costs(model: nn.Module, images: Tensor) -> Costs:
    """Multiply-adds for one image of the fused network, counted by running images through it.

    What is not in the layers is the dense network's less that of its dense layers. A layer in a block that fuses by
    itself is in there too: no level of it changes what the block costs.
    """
    uses = uses_of(model, images)
    of: dict[str, dict[int, float]] = {}
    forms: dict[str, dict[int, str]] = {}
    within = in_fusing_blocks(model)
    rest = float(count_macs(deploy(model, form='dense'), images))
    for name, layer in harmonic_layers(model).items():
        if name in within:
            of[name], forms[name] = dict.fromkeys(levels_of(layer), 0.0), dict.fromkeys(levels_of(layer), 'dense')
            continue
        positions = sum(use.positions for use in uses[name])
        rest -= multiply_adds(layer, layer.level, 'dense', positions) / len(images)
        forms[name] = {lv: 'separable' if saves(layer, lv) else 'dense' for lv in levels_of(layer)}
        of[name] = {lv: multiply_adds(layer, lv, form, positions) / len(images) for lv, form in forms[name].items()}
    return Costs('multiply-adds', rest, of, forms)


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of a network for one image, as torch counts them: convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, evaluating(model), torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2 // len(images)


def time_costs(model: nn.Module, images: Tensor) -> Costs:
    """Milliseconds for a batch of images, in evaluation, fused, on the device of the network, see `time_levels`.

    What is not in the layers is the time of the whole fused network less that of its dense layers. A layer in a block
    that fuses by itself is in there too, as in `mac_costs`.
    """
    layers, uses, within = harmonic_layers(model), uses_of(model, images), in_fusing_blocks(model)
    used = {n: (layer, list(levels_of(layer))) for n, layer in layers.items() if uses[n] and n not in within}
    measured = time_levels(used, uses)
    of: dict[str, dict[int, float]] = {}
    forms: dict[str, dict[int, str]] = {}
    milliseconds: dict[str, dict[int, dict[str, float]]] = {}
    for name, layer in layers.items():
        if name not in measured:
            of[name], forms[name] = dict.fromkeys(levels_of(layer), 0.0), dict.fromkeys(levels_of(layer), 'dense')
            continue
        milliseconds[name] = {level: times for level, (times, _) in measured[name].items()}
        forms[name] = {level: better for level, (_, better) in measured[name].items()}
        of[name] = {level: times[better] for level, (times, better) in measured[name].items()}
    whole = statistics.median(times_of({'plain': deploy(model, form='dense')}, images)['plain'])
    inside = sum(times[max(times)]['dense'] for times in milliseconds.values())
    return Costs('ms', max(0.0, whole - inside), of, forms, milliseconds)


def parameters_at(layer: HarmonicLayer, level: int) -> int:
    """Coefficients that a layer has at a level."""
    return layer.weight.numel() // layer.weight.shape[2] * functions_at(layer, level)
