"""Making any network harmonic, with its own filters or the nearest ones of a lower level."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from timm.models import get_model_args
from torch import nn

from ..common import InputError
from ..layers import (
    FORMS,
    HarmonicBlock2d,
    HarmonicLayer,
    check_form,
    check_level,
    full_level,
    name_of_basis,
    options_of_basis,
)
from .costs import Form, Pairs, reduced, set_forms
from .running import trainable
from .swap import harmonic_layers, make_harmonic, reasons_to_skip, replace_layers

PatternLevels = Mapping[str, int | None]  # levels by patterns over names; the first pattern that matches counts
Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]

ARCHITECTURE = 'harmonized'  # the registered one: it builds any network of timm and harmonizes it


@trainable
def harmonize(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    normalization: str = 'l1',
    smoothness: float | None = None,
    form: Form | None = None,
    pairs: Mapping[str, int | Sequence[int]] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Makes the k x k convolutions of any network harmonic, k > 1, keeping their filters.

    With all frequencies the network computes the same up to rounding, in evaluation and in training. At a lower level
    each filter becomes the nearest in L2. Grouped, depth-wise and timm's dynamically padded convolutions become
    harmonic as well; `harmonic_report` lists the ones that stay plain, and why. Layers that are harmonic already keep
    their coefficients up to their new level. timm can then save and load its networks as usual (architecture
    `harmonized`). Based on arXiv:2001.06570, whose layers start from new coefficients instead.

    Args:
        model: Network.
        level: The paper's lambda for all layers that `levels` does not name, None for all frequencies. Layers with
            filters too small for it keep all.
        levels: Levels by patterns over qualified names (fnmatch). The first pattern that matches counts.
        include: Patterns, or a predicate of name and convolution: swap only these.
        exclude: Patterns, or a predicate: leave these plain.
        normalization: Of the DCT functions, 'l1' (the authors') or 'ortho'.
        smoothness: None for the authors' functions, or a number from 0 to 10: how much later training favours smooth
            filters, see `HarmonicConv2d`. The present filters do not change.
        form: How layers compute, in training as well: 'dense', or 'separable', which is faster at low levels, or a
            mapping from patterns over qualified names to these. Other layers keep their form; new ones are dense.
        pairs: How many pairs layers keep, by qualified names, see `HarmonicConv2d.at_pairs`; or this and how many
            mixtures, see `at_mixtures`. `truncate` with per='channel' or 'mixture' chooses better ones.
        inplace: Whether to change the network itself rather than a copy.

    Returns:
        The network.

    Raises:
        InputError: If no convolution can become harmonic, a pattern matches nothing, or a level or form is unknown.
        TypeError: If a level or smoothness has another type.
    """
    wanted = plan(model, level=level, levels=levels, include=include, exclude=exclude)
    layers = harmonic_layers(model)
    present = {name: layer.named_basis() for name, layer in layers.items()}
    basis: dict[str, Any] = dict(normalization=normalization, smoothness=smoothness)
    name, new = name_of_basis(**basis), set(wanted) - set(present)
    if (others := set(present.values()) - {name}) and (new or name != 'l1'):
        raise InputError(f"the basis {name!r} differs from the network's harmonic layers: use {min(others)!r}.")
    given = {'*': form} if isinstance(form, str) else {} if form is None else form
    if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(f'form must be one of {FORMS}, or map patterns of names to them, got {form!r}.')
    forms = _by_name('form', given, lambda value, what: check_form(value), wanted, {})
    sizes = {name: of if isinstance(of, (list, tuple)) else [of] for name, of in (pairs or {}).items()}
    for name, of in sizes.items():
        if name not in wanted or isinstance(layers.get(name), HarmonicBlock2d):
            raise InputError(f'pairs: {name!r} is not a convolution of the network that is harmonic or becomes so.')
        if len(of) not in (1, 2) or not all(isinstance(number, int) and number > 0 for number in of):
            raise InputError(f'pairs: {name!r} needs how many pairs, or this and how many mixtures, got {of!r}.')
    if not inplace:
        model = copy.deepcopy(model)
    make_harmonic(model, wanted, basis=basis, keep_filters=True)
    replace_layers(model, {name: layer.at_level(wanted[name]) for name, layer in layers.items() if name in wanted})
    for name, of in sizes.items():
        replace_layers(model, {name: reduced(model.get_submodule(name), Pairs(*map(int, of)))})
    set_forms(model, forms)
    return record_options(model)


def plan(
    model: nn.Module,
    *,
    level: int | None = None,
    levels: PatternLevels | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> dict[str, int]:
    """Returns the levels of the layers that `harmonize` makes harmonic, by name, for the same arguments and errors."""
    skipped = reasons_to_skip(model)
    able = {n: m for n, m in model.named_modules() if isinstance(m, HarmonicLayer) or skipped.get(n) == ''}
    if '' in able:
        raise InputError(f'the network is itself a {type(model).__name__}: see HarmonicConv2d.from_conv2d.')
    if not able:
        counts = [f'{number} x {reason}' for reason, number in Counter(skipped.values()).items()]
        kind, why = type(model).__name__, '; '.join(counts) or 'it has no convolutions'
        raise InputError(f'{kind} has no convolution that can become harmonic: {why}.')
    chosen = _selected('include', '*' if include is None else include, able, skipped)
    chosen -= _selected('exclude', () if exclude is None else exclude, able, skipped)
    if not chosen:
        raise InputError(f'include and exclude leave none of the {len(able)} convolutions that can become harmonic.')
    if levels is not None and not isinstance(levels, Mapping):
        raise TypeError(f'levels must map patterns of names to levels, got {levels!r}. For one for all, pass level.')
    full = {name: full_level(module.kernel_size[0]) for name, module in able.items() if name in chosen}
    top = max(full.values())
    of_layer = _by_name('levels', levels or {}, lambda value, what: check_level(value, top, what), full, skipped)
    common = check_level(level, top)
    return {name: min(of_layer.get(name, common), most) for name, most in full.items()}


def _selected(what: str, selection: Selection, able: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> set[str]:
    if callable(selection):
        return {name for name, module in able.items() if selection(name, module)}
    patterns = (selection,) if isinstance(selection, str) else selection
    return {name for pattern in patterns for name in _matching(what, pattern, able, skipped)}


def _by_name(
    what: str, given: Mapping[str, Any], check: Callable[..., Any], able: Collection[str], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """Returns checked values by the names that their patterns match. The first pattern that matches a name counts."""
    found: dict[str, Any] = {}
    for pattern, value in given.items():
        matching = _matching(what, pattern, able, skipped)
        found = {**dict.fromkeys(matching, check(value, f'{what}: {pattern!r}')), **found}
    return found


def _matching(what: str, pattern: str, able: Collection[str], skipped: Mapping[str, str]) -> list[str]:
    if matching := [name for name in able if fnmatchcase(name, pattern)]:
        return matching
    for name, reason in skipped.items():
        if reason and fnmatchcase(name, pattern):
            raise InputError(f'{what}: {pattern!r} matches only convolutions that stay plain: {name}, {reason}.')
    names = list(able)
    raise InputError(
        f'{what}: {pattern!r} matches none of the {len(names)} convolutions, {names[0]!r} to {names[-1]!r}. '
        "A pattern has to match the whole name, as 'layer1.*'."
    )


def record_options(model: Any) -> nn.Module:
    """Records in a network, if timm built it, that it is `harmonized` now, and how to rebuild it; returns it."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not cfg.get('architecture'):
        return model
    args = get_model_args(model)
    if cfg['architecture'] != ARCHITECTURE:
        args = dict(base_model=cfg['architecture'], **args)
        model.pretrained_cfg = model.default_cfg = dict(cfg, architecture=ARCHITECTURE)
    for option in ('level', 'levels', 'include', 'exclude', 'normalization', 'smoothness', 'form', 'pairs'):
        args.pop(option, None)
    layers = harmonic_layers(model)
    full = {name: full_level(layer.kernel_size[0]) for name, layer in layers.items()}
    if lowered := {name: layer.level for name, layer in layers.items() if layer.level < full[name]}:
        common = max(lowered.values())
        if all(layer.level == min(common, full[name]) for name, layer in layers.items()):
            args['level'] = common
        else:
            args['levels'] = {name: lowered.get(name) for name in layers}
    own = {name: layer for name, layer in layers.items() if layer.kept is not None or layer.mixtures is not None}
    if own:  # the weights say which
        numbers = {name: layer.weight[0].numel() for name, layer in own.items()}
        args['pairs'] = {n: numbers[n] if of.mixtures is None else [numbers[n], of.channels] for n, of in own.items()}
    if separable := [name for name, layer in layers.items() if layer.form == 'separable']:
        args['form'] = 'separable' if len(separable) == len(layers) else dict.fromkeys(separable, 'separable')
    if '' in reasons_to_skip(model).values():  # other convolutions stayed plain by choice
        args['include'] = list(layers)
    layer = next(iter(layers.values()))
    args.update(options_of_basis(layer.normalization, layer.smoothness))
    model._model_args = args
    return model
