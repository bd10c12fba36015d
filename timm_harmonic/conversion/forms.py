"""Which form each harmonic layer computes in: as named, by a rule, or by the time that both take on a device."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..common import InputError
from ..layers import FORMS, HarmonicLayer, check_form
from .energy import at_level, functions_at
from .running import Use, uses_of
from .swap import harmonic_layers, in_fusing_blocks
from .timing import faster, times_of

Form = str | Mapping[str, str]  # for all layers, or by patterns over names; the first pattern that matches counts

# Without a measurement: the share of the dense form's multiply-adds that the separable form may have, and the channels
# of each group that the 1 x 1 convolution must have where functions other than the constant are kept.
_SHARE, _CHANNELS = 0.5, 64


def multiply_adds(layer: HarmonicLayer, level: int, form: str, positions: int = 1) -> int:
    """Multiply-adds of a layer at a level in a form, for so many positions of its output.

    Average pooling counts as filters do.
    """
    side, count = layer.kernel_size[0], functions_at(layer, level)
    pairs = layer.out_channels * layer.in_channels // layer.groups
    if form == 'dense':
        return positions * side**2 * pairs
    return positions * count * (side**2 * layer.in_channels + pairs)


def saves(layer: HarmonicLayer, level: int) -> bool:
    """Whether a layer has fewer multiply-adds in separable form at a level."""
    return multiply_adds(layer, level, 'separable') < multiply_adds(layer, level, 'dense')


def forms_by_rule(model: nn.Module) -> dict[str, str]:
    """A form for each harmonic layer without a measurement.

    Separable if that is at most half of the multiply-adds, and the layer keeps the constant function alone or has 64
    channels in each group: with fewer, fixed filters take longer than they save on the CPUs that we know.
    """
    found = {}
    for name, layer in harmonic_layers(model).items():
        separable, dense = (multiply_adds(layer, layer.level, form) for form in ('separable', 'dense'))
        fewer = separable <= _SHARE * dense
        wide = min(layer.in_channels, layer.out_channels) // layer.groups >= _CHANNELS
        found[name] = 'separable' if fewer and (layer.pool_padding is not None or wide) else 'dense'
    return {**found, **dict.fromkeys(in_fusing_blocks(model), 'dense')}


def forms_by_time(model: nn.Module, images: Tensor) -> dict[str, str]:
    """A form for each harmonic layer, by the time that it takes in both with its input on these images.

    Separable only where it is faster by more than the noise. Layers whose separable form has fewer multiply-adds are
    measured, and their `milliseconds` set.
    """
    layers, uses, dense = harmonic_layers(model), uses_of(model, images), in_fusing_blocks(model)
    found = dict.fromkeys(layers, 'dense')
    able = [name for name, layer in layers.items() if uses[name] and name not in dense and saves(layer, layer.level)]
    for name, times in time_levels({name: (layers[name], [layers[name].level]) for name in able}, uses).items():
        layers[name].milliseconds, found[name] = times[layers[name].level]
    return found


# By level: milliseconds by form, and the better form.
LevelTimes = dict[int, tuple[dict[str, float], str]]


def time_levels(
    layers: Mapping[str, tuple[HarmonicLayer, Sequence[int]]], uses: Mapping[str, list[Use]]
) -> dict[str, LevelTimes]:
    """Times layers at levels, in both forms where the separable one has fewer multiply-adds, with their own input.

    What the dense form takes is the same at all levels. Equal layers with equal inputs are timed once. Times are of all
    uses of a layer, which are taken to be alike.
    """
    done: dict[tuple[object, ...], LevelTimes] = {}
    found: dict[str, LevelTimes] = {}
    for name, (layer, levels) in layers.items():
        use, number = uses[name][0], len(uses[name])
        key = (type(layer), layer.extra_repr(), tuple(levels), use, number)
        if key not in done:
            modules = {'dense': _fused(layer, layer.level, 'dense')}
            modules |= {f'separable {lv}': _fused(layer, lv, 'separable') for lv in levels if saves(layer, lv)}
            times = times_of(modules, use.draw())
            middle = {form: number * statistics.median(of) for form, of in times.items()}
            done[key] = {}
            for level in levels:
                other = f'separable {level}'
                by_form = {'dense': middle['dense']} | ({'separable': middle[other]} if other in times else {})
                better = other in times and faster(times[other], times['dense'])
                done[key][level] = by_form, 'separable' if better else 'dense'
        found[name] = done[key]
    return found


def _fused(layer: HarmonicLayer, level: int, form: str) -> nn.Module:
    """The plain modules of a layer at a level in a form."""
    low: Any = at_level(layer, level)
    low.form = form
    return low.fuse().eval()


def forms_by_names(names: Sequence[str], form: Form) -> dict[str, str]:
    """Forms of layers by their names: one for all, or those of the patterns that match."""
    if isinstance(form, str):
        return dict.fromkeys(names, check_form(form))
    found = {name: next((value for p, value in form.items() if fnmatchcase(name, p)), '') for name in names}
    return {name: check_form(value) for name, value in found.items() if value}


def check_patterns(form: Form, names: Iterable[str]) -> None:
    """Checks forms. Raises ValueError if one is none that there is, or a pattern matches none of the names."""
    if isinstance(form, str):
        check_form(form)
        return
    if not isinstance(form, Mapping):
        raise TypeError(f'form must be one of {FORMS}, or map patterns of names to them, got {form!r}.')
    for pattern, value in form.items():
        check_form(value)
        if not isinstance(pattern, str):
            raise TypeError(f'form must map patterns of names, got {pattern!r}.')
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f'form: {pattern!r} matches none of the harmonic layers.')


def set_forms(model: nn.Module, forms: Mapping[str, str]) -> None:
    """Gives harmonic layers their forms, in place."""
    layers = harmonic_layers(model)
    for name, form in forms.items():
        layers[name].form = form
