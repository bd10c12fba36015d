"""Shared by the model files: levels of the stages, which convolutions become harmonic, entry points."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import register_model
from torch import nn

from ..common import InputError
from ..conversion.swap import make_harmonic, reasons_to_skip
from ..layers import check_level, full_level, name_of_basis
from .weights import build_model

StageLevels = int | Sequence[int | None] | None  # for all stages, or one per stage; None keeps all frequencies

_TOP = full_level(3)  # the filters of every stage are 3 x 3


def levels_of_stages(levels: StageLevels, stages: int) -> tuple[int | None, ...]:
    """Expands the option `levels` to one level per stage. Raises TypeError or InputError unless that is possible."""
    entries = (levels,) * stages if levels is None or isinstance(levels, int) else levels
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f'levels must be None, an integer, or {stages} of (integer or None), got {levels!r}.')
    if len(entries) != stages:
        raise InputError(f'levels must have {stages} entries, one per stage, got {len(entries)}: {levels!r}.')
    for level in entries:
        check_level(level, _TOP, f'levels={levels!r}: a level')
    return tuple(entries)


def check_channels(num_classes: int, in_chans: int) -> None:
    """Raises InputError for sizes with which torch builds a network that fails later."""
    if num_classes < 0:
        raise InputError(f'num_classes must be 0 (no classifier) or more, got {num_classes}.')
    if in_chans < 1:
        raise InputError(f'in_chans must be at least 1, got {in_chans}.')


def make_network_harmonic(
    model: nn.Module,
    stem: str,
    level_of: Callable[[str], int | None],
    harmonic_stem: bool,
    harmonic_blocks: bool,
    basis: Mapping[str, Any],
) -> None:
    """Makes a new network harmonic in place: the `stem` a HarmonicBlock2d, the others by `level_of` their names."""
    for option, value in (('harmonic_stem', harmonic_stem), ('harmonic_blocks', harmonic_blocks)):
        if not isinstance(value, bool):
            raise TypeError(f'{option} must be True or False, got {value!r}.')
    name_of_basis(**basis)  # checks the options even if nothing becomes harmonic
    harmonic = [name for name in reasons_to_skip(model) if (harmonic_stem if name == stem else harmonic_blocks)]
    make_harmonic(model, {name: level_of(name) for name in harmonic}, basis=basis, stem=stem)


def tap_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Resolves timm's indices of `count` features: None for all, n for the last n, or a list. Raises InputError."""
    indices = count if indices is None else indices
    places = range(-indices, 0) if isinstance(indices, int) else indices
    if not places or not all(-count <= place < count for place in places):
        allowed = f'from {-count} to {count - 1}, or one number of the last features, 1 to {count}'
        raise InputError(f'feature indices must be {allowed}, got {indices!r}.')
    return [place % count for place in places]


def register(
    model_cls: type[nn.Module],
    architectures: Mapping[str, dict[str, Any]],
    convert: Callable[..., Any],
    taps: Callable[[dict[str, Any]], int],
    **feature_cfg: Any,
) -> None:
    """Registers architectures in timm, by name and options, as entry points `name(pretrained=False, **kwargs)`.

    `convert` makes checkpoints fit, and `taps` counts the features of a network with given options.
    """

    def entrypoint(name: str) -> Callable[..., nn.Module]:
        def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            if 'level' in kwargs:
                raise TypeError(f'{name} takes levels, not level: did you mean levels={kwargs["level"]!r}?')
            args = {**architectures[name], **kwargs}
            features = dict(feature_cfg, out_indices=tuple(range(taps(args))))
            return build_model(model_cls, name, pretrained, pretrained_filter_fn=convert, feature_cfg=features, **args)

        build.__name__ = build.__qualname__ = name
        build.__module__ = model_cls.__module__  # timm files a model under its module
        build.__doc__ = f'Builds the architecture {name}, see docs/models.md.'
        return build

    for name in architectures:
        setattr(sys.modules[model_cls.__module__], name, register_model(entrypoint(name)))
