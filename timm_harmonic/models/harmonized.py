"""The architecture `harmonized`: any convolutional network of timm, made harmonic by `harmonize` (arXiv:2001.06570)."""

import contextlib
import dataclasses
import difflib
import sys
from functools import partial
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_model_traits,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from ..common import InputError
from ..conversion.energy import kept_at
from ..conversion.forms import Form, check_patterns
from ..conversion.harmonize import ARCHITECTURE, PatternLevels, apply_plan, plan
from ..conversion.swap import harmonic_layers
from ..layers import HarmonicConv2d, name_of_basis, options_of_basis
from .checkpoints import CheckpointError, StateDict, check_fit, unwrap
from .weights import build_model

__all__ = ['checkpoint_filter_fn', 'harmonized']

_DEFAULT_BASE = 'resnet50'
_STAND_IN = 'the config of base_model takes the place of this one'
# How timm wraps a network for its features, by class and by name.
_WRAPPERS = {
    'FeatureListNet': 'list',
    'FeatureDictNet': 'dict',
    'FeatureHookNet': 'hook',
    'FeatureGetterNet': 'getter',
}
# The authors published no such network, so parameters have our names only.
KEY_NAMES: dict[str, str] = {}

_cfg = get_pretrained_cfg(_DEFAULT_BASE).to_dict(remove_source=True)
default_cfgs = generate_default_cfgs({ARCHITECTURE: dict(_cfg, architecture=None, tag=None, description=_STAND_IN)})


@register_model
def harmonized(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any convolutional network of timm, by base_model, with harmonic layers; options are those of `harmonize`."""
    return _create(pretrained, **kwargs)


def _create(
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    *,
    base_model: str = _DEFAULT_BASE,
    level: int | None = None,
    levels: PatternLevels | None = None,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    normalization: str = 'l1',
    smoothness: float | None = None,
    form: Form | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds the base, harmonizes it, and loads weights.

    These are the base's, which are projected, unless a config or overlay names a file, a folder, a repository of the
    Hub or a url. What is there may be plain or harmonic.
    """
    base, form = _base_architecture(base_model), {} if form is None else form
    given = resolve_pretrained_cfg(ARCHITECTURE, pretrained_cfg, dict(pretrained_cfg_overlay or {}))
    named = bool(given.source or given.state_dict or given.has_weights)
    ours: Any = sys.modules[model_entrypoint(base).__module__] if base.startswith('harm') else None
    basis = options_of_basis(name_of_basis(normalization, smoothness))
    extra = basis if ours else {}  # the basis is also for layers that are harmonic in the base
    create_base = partial(timm.create_model, base_model, cache_dir=cache_dir, pretrained=pretrained and not named)
    choose = partial(plan, level=level, levels=levels, include=include, exclude=exclude)

    of_base: dict[str, Any] = {}

    def make(**kwargs: Any) -> nn.Module:
        of_base.update(kwargs)
        model = create_base(**extra, **kwargs)
        wanted = choose(model)
        check_patterns(form, wanted)
        return _without_args(apply_plan(model, wanted, basis, form))

    def make_features(**kwargs: Any) -> nn.Module:
        # A class of its own lacks parts of the network. The choice is made on the complete one.
        wanted = choose(timm.create_model(base_model, **kwargs))
        check_patterns(form, wanted)
        model = create_base(features_only=True, **features, **extra, **kwargs)
        return _without_args(apply_plan(model, wanted, basis, form))

    def fitting(checkpoint: StateDict, model: nn.Module) -> StateDict:
        """The state dict of a network whose base is ours, or of that base, in which more functions may be kept."""
        try:
            return ours.checkpoint_filter_fn(checkpoint, model)
        except CheckpointError as error:
            # Lowered with its own channels and then adapted: the other way, what is left out would leave a shift.
            for channels in dict.fromkeys((model.pretrained_cfg['input_size'][0], of_base.get('in_chans', 3))):
                whole: Any = timm.create_model(base_model, **extra, **{**of_base, 'in_chans': channels})
                whole.pretrained_cfg = model.pretrained_cfg
                with contextlib.suppress(CheckpointError):
                    lowered = _lowered(ours.checkpoint_filter_fn(checkpoint, whole), whole, model)
                    return ours.checkpoint_filter_fn(lowered, model)
            raise error

    loading = dict(pretrained=pretrained and named, cache_dir=cache_dir)
    cfg = _config(given, base_model, named).to_dict()
    build: Any = partial(build_model, variant=ARCHITECTURE, pretrained_cfg=cfg, **loading)
    filter_fn = fitting if ours else checkpoint_filter_fn
    if not kwargs.pop('features_only', False):
        return build(make, pretrained_filter_fn=filter_fn, **kwargs)
    features: dict[str, Any] = {key: kwargs.pop(key) for key in ('out_indices', 'feature_cls') if key in kwargs}
    if (feature_cfg := _feature_cfg(base_model, features, kwargs)) is not None:
        return build(make, pretrained_filter_fn=filter_fn, features_only=True, feature_cfg=feature_cfg, **kwargs)
    filter_fn = partial(checkpoint_filter_fn, part=True)
    model = build(make_features, pretrained_filter_fn=filter_fn, pretrained_strict=False, **kwargs)
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in ('num_classes', 'classifier')}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def _base_architecture(base_model: str) -> str:
    if not isinstance(base_model, str):
        raise TypeError(f'base_model must be the name of a model of timm, got {base_model!r}.')
    base = split_model_name_tag(base_model)[0]
    if base == ARCHITECTURE:
        raise InputError(f'base_model cannot be {ARCHITECTURE!r} itself: name the network to make harmonic.')
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f'; close are {", ".join(close)}' if close else ', see timm.list_models()'
        raise InputError(f'base_model={base_model!r} is no model of timm{hint}.')
    return base


def _config(given: PretrainedCfg, base_model: str, named: bool) -> PretrainedCfg:
    """The base's config with what the caller changed in our stand-in, or the config that came with the weights."""
    if given.description != _STAND_IN:
        return dataclasses.replace(given, architecture=ARCHITECTURE)
    registered = get_pretrained_cfg(ARCHITECTURE)
    fields = [field.name for field in dataclasses.fields(given)]
    changed = {name: getattr(given, name) for name in fields if getattr(given, name) != getattr(registered, name)}
    elsewhere = dict(url=None, file=None, hf_hub_id=None, hf_hub_filename=None, tag=None) if named else {}
    changed = {'custom_load': False, **elsewhere, **changed, 'architecture': ARCHITECTURE}
    return dataclasses.replace(get_pretrained_cfg(base_model), **changed)


def _lowered(state: StateDict, whole: nn.Module, model: nn.Module) -> StateDict:
    """A state dict of `whole`, without the coefficients and statistics of functions that `model` leaves out."""
    lower = harmonic_layers(model)
    for name, layer in harmonic_layers(whole).items():
        if lower[name].level < layer.level:
            kept, factors = kept_at(layer, lower[name].level)
            weight = state[f'{name}.weight']
            state[f'{name}.weight'] = (weight[:, :, kept] * factors[:, None]).to(weight)
            for key in (f'{name}.bn.running_mean', f'{name}.bn.running_var'):
                if key in state:
                    state[key] = state[key].reshape(-1, len(layer.basis))[:, kept].flatten()
    return state


def _without_args(model: Any) -> nn.Module:
    """Drops the arguments that the base was made with: timm notes those of the whole."""
    model._model_args = {}
    return model


def _feature_cfg(base_model: str, features: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """How timm wraps the base for its features, or None if it has a class of its own for them.

    timm keeps no record of it, so this is read off a wrapped base.
    """
    template = timm.create_model(base_model, features_only=True, **features, **kwargs)
    kind = _WRAPPERS.get(type(template).__name__)
    if kind is None:
        return None
    if kind == 'getter':
        return dict(feature_cls=kind, out_indices=template.out_indices)
    cfg = dict(feature_cls=kind, out_indices=template.feature_info.out_indices)
    if kind == 'hook':
        cfg['no_rewrite'] = 'body' in template
    own = {name for name, _ in timm.create_model(base_model, **kwargs).named_children()} | {'body'}
    return dict(cfg, flatten_sequential=any(name not in own for name, _ in template.named_children()))


def checkpoint_filter_fn(checkpoint: StateDict, model: nn.Module, part: bool = False) -> StateDict:
    """The state dict of a harmonized network, or of its plain base, which the layers project when they load it.

    `part` says that the model is a part of the network, so that the checkpoint may hold more. Raises CheckpointError if
    it does not fit, naming the parameters.
    """
    state, cfg = unwrap(checkpoint), model.pretrained_cfg
    for name, layer in harmonic_layers(model).items():
        weight = state.get(f'{name}.weight')
        if weight is None or not isinstance(layer, HarmonicConv2d) or weight.ndim != 4 or weight.shape[3] != 1:
            continue
        if weight.shape[2] != layer.weight.shape[2]:
            raise CheckpointError(
                f'{name}.weight of the checkpoint has {weight.shape[2]} coefficients per filter, the network '
                f'{layer.weight.shape[2]} (level {layer.level}): build it with the level or levels of the checkpoint, '
                'as a folder that was saved with it does, and truncate it then.'
            )
    if part:
        target = model.state_dict()
        state = {key: value for key, value in state.items() if key in target}
    check_fit(state, model, cfg.get('classifier'), get_model_traits(model).get('first_conv', cfg.get('first_conv')))
    return state
