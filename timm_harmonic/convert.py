"""Any network made harmonic: with the same filters, or the nearest of lower level."""

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .conv import HarmonicLayer
from .swap import HARMONIC, harmonic_layers, replace_layers, swap_convs, why_not

__all__ = ['ARCHITECTURE', 'PatternLevels', 'Selection', 'apply', 'describe', 'harmonize', 'plan']

PatternLevels = Mapping[str, int | None]
Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]

ARCHITECTURE = 'harmonized'  # the registered one that builds any network of timm and harmonizes it


def harmonize(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    normalization: str = 'l1',
    inplace: bool = False,
) -> nn.Module:
    """Exchanges the k x k convolutions of any network, k > 1, for harmonic ones with the same filters.

    At full level the network computes the same, in evaluation and in training, up to rounding; at a lower level each
    filter becomes the nearest in L2. Grouped and depth-wise convolutions are exchanged as well, and timm's dynamically
    padded ones; what is left alone, and why, is in `harmonic_report`. Layers that are harmonic already keep their
    coefficients, and lose those above their level. A network of timm can be saved and published as it is then
    (architecture `harmonized`). Based on arXiv:2001.06570, whose layers start from new coefficients instead.

    Args:
        model: Network.
        level: The paper's lambda for all layers that `levels` says nothing about, None for all frequencies. A layer
            whose filters are too small for it keeps all.
        levels: Levels by patterns over qualified names (fnmatch), the first that matches counts.
        include: Patterns, or a predicate of name and convolution: only these are exchanged.
        exclude: Patterns, or a predicate: these are not.
        normalization: Of the DCT functions, 'l1' (the authors') or 'ortho'.
        inplace: Whether the network itself is changed, rather than a copy.

    Returns:
        The network.

    Raises:
        ValueError: If nothing can be exchanged, a pattern matches nothing, or a level is out of range.
        TypeError: If a level is not an integer.
    """
    wanted = plan(model, level=level, levels=levels, include=include, exclude=exclude)
    present = {name: layer.normalization for name, layer in harmonic_layers(model).items()}
    if set(wanted) - set(present) and set(present.values()) - {normalization}:
        raise ValueError(
            f'normalization={normalization!r} would be mixed with that of the harmonic layers that are there: '
            f'use {next(iter(present.values()))!r}.'
        )
    if not inplace:
        # What is going to be replaced is not copied: the copy has it in common with the network until then.
        model = copy.deepcopy(model, {id(layer): layer for layer in map(model.get_submodule, wanted)})
    return apply(model, wanted, normalization)


def apply(model: nn.Module, wanted: Mapping[str, int | None], normalization: str = 'l1') -> nn.Module:
    """Exchanges the convolutions of a plan that are in a network, in place; those that are not are passed over.

    Args:
        model: Network.
        wanted: What `plan` returns for this network, or for one that it is a part of.
        normalization: 'l1' or 'ortho'.

    Returns:
        The network, with what `timm.create_model` needs to build it anew.
    """

    def make(name: str, conv: nn.Conv2d) -> nn.Module | None:
        if name not in wanted:
            return None
        return HARMONIC[type(conv)].from_conv2d(conv, level=wanted[name], normalization=normalization)

    lower = {name: layer.truncated(wanted[name]) for name, layer in harmonic_layers(model).items() if name in wanted}
    swap_convs(model, make)
    replace_layers(model, lower)
    return describe(model)


def plan(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> dict[str, int | None]:
    """Which layers `harmonize` makes harmonic, and their levels; None where a level keeps all frequencies.

    Arguments and errors are those of `harmonize`.
    """
    refused = why_not(model)
    able = {n: m for n, m in model.named_modules() if isinstance(m, HarmonicLayer) or refused.get(n) == ''}
    if '' in able:
        raise ValueError(f'the network is itself a {type(model).__name__}: see HarmonicConv2d.from_conv2d.')
    if not able:
        raise ValueError(f'{type(model).__name__} has no convolution that can be harmonic: {_summary(refused)}.')
    chosen = {
        name: module
        for name, module in able.items()
        if (include is None or _selects(include, name, module))
        and not (exclude is not None and _selects(exclude, name, module))
    }
    for what, selection in (('include', include), ('exclude', exclude)):
        for pattern in _patterns(selection):
            _check_pattern(what, pattern, able, refused)
    if not chosen:
        raise ValueError(f'include and exclude leave none of the {len(able)} convolutions that can be harmonic.')
    if levels is not None and not isinstance(levels, Mapping):
        raise TypeError(f'levels must map patterns of names to levels, got {levels!r}; level is one for all.')
    for pattern in levels or {}:
        _check_pattern('levels', pattern, chosen, refused)
    full = {name: 2 * module.kernel_size[0] - 1 for name, module in chosen.items()}
    for what, value in (('level', level), *(levels or {}).items()):
        _check_level(what, value, max(full.values()))
    found = {}
    for name in chosen:
        value = next((v for pattern, v in (levels or {}).items() if fnmatchcase(name, pattern)), level)
        found[name] = None if value is None or value >= full[name] else value
    return found


def _patterns(selection: Selection | None) -> Sequence[str]:
    if selection is None or callable(selection):
        return ()
    return (selection,) if isinstance(selection, str) else selection


def _selects(selection: Selection, name: str, module: nn.Module) -> bool:
    if callable(selection):
        return bool(selection(name, module))
    return any(fnmatchcase(name, pattern) for pattern in _patterns(selection))


def _check_pattern(what: str, pattern: str, able: Mapping[str, nn.Module], refused: Mapping[str, str]) -> None:
    if any(fnmatchcase(name, pattern) for name in able):
        return
    for name, reason in refused.items():
        if reason and fnmatchcase(name, pattern):
            raise ValueError(f'{what}: {pattern!r} matches only what is left alone: {name}, {reason}.')
    names = list(able)
    raise ValueError(
        f'{what}: {pattern!r} matches none of the {len(names)} convolutions, which are {names[0]!r} to {names[-1]!r}. '
        "Patterns are matched against whole names, as 'layer1.*'."
    )


def _check_level(what: str, level: int | None, top: int) -> None:
    if level is None:
        return
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(f'{what}: a level must be an integer or None, got {level!r}.')
    if not 1 <= level <= top:
        raise ValueError(f'{what}: a level must be from 1 to {top}, which keeps all frequencies, got {level}.')


def _summary(refused: Mapping[str, str]) -> str:
    """How many convolutions there are for each reason."""
    counts: dict[str, int] = {}
    for reason in refused.values():
        counts[reason] = counts.get(reason, 0) + 1
    return '; '.join(f'{number} x {reason}' for reason, number in counts.items()) or 'it has no convolutions'


def describe(model: nn.Module) -> nn.Module:
    """Records in a network of timm that it is `harmonized` now, and with which arguments it can be built anew.

    Args:
        model: Network with harmonic layers; one that timm did not build is left as it is.

    Returns:
        The network.
    """
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not cfg.get('architecture'):
        return model
    args = dict(getattr(model, '_model_args', {}))
    if cfg['architecture'] != ARCHITECTURE:
        args = dict(base_model=cfg['architecture'], **args)
        model.pretrained_cfg = model.default_cfg = dict(cfg, architecture=ARCHITECTURE)
    for option in ('level', 'levels', 'include', 'exclude', 'normalization'):
        args.pop(option, None)
    layers = harmonic_layers(model)
    levels = {name: None if layer.level == layer.full_level else layer.level for name, layer in layers.items()}
    common = max((level for level in levels.values() if level), default=None)
    if common:
        same = all((levels[n] or layer.full_level) == min(common, layer.full_level) for n, layer in layers.items())
        args.update(dict(level=common) if same else dict(levels=levels))
    if '' in why_not(model).values():  # others could be harmonic, and are not
        args['include'] = list(layers)
    if any(layer.normalization != 'l1' for layer in layers.values()):
        args['normalization'] = next(iter(layers.values())).normalization
    model._model_args = args
    return model
