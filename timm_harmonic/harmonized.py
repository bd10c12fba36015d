"""The architecture `harmonized`: any convolutional network of timm, made harmonic.

What it computes, and where it is from: `harmonize`; arXiv:2001.06570.
"""

import dataclasses
import difflib
import sys
from functools import partial
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from .checkpoints import CheckpointError, StateDict, check_fit, unwrap
from .conv import HarmonicConv2d
from .convert import ARCHITECTURE, PatternLevels, apply, plan
from .pretrained import build_model
from .swap import harmonic_layers

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

default_cfgs = generate_default_cfgs(
    {
        ARCHITECTURE: {
            **get_pretrained_cfg(_DEFAULT_BASE).to_dict(remove_source=True),
            'architecture': None,
            'tag': None,
            'description': _STAND_IN,
        }
    }
)


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
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds the base, harmonizes it, and loads weights.

    Args:
        pretrained: Whether to load weights: those of the base, which are projected, unless a config or overlay names
            others: a file, a folder, a repository of the Hub or a url. These may be the base's as well.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm.
        base_model: Name of the base in timm, with or without a tag.
        level: See `harmonize`, as are levels, include, exclude and normalization.
        cache_dir: Where downloads are kept.
        **kwargs: For the base.

    Returns:
        The network, or its feature extractor.

    Raises:
        ValueError: If the base is unknown, or `harmonize` refuses.
        CheckpointError: If weights cannot be read or do not fit.
    """
    base = _base_architecture(base_model)
    overlay = dict(pretrained_cfg_overlay or {})
    given = resolve_pretrained_cfg(ARCHITECTURE, pretrained_cfg, overlay)
    named = bool(given.source or given.state_dict or given.has_weights)
    cfg = _config(given, base_model, named)
    from_base = dict(pretrained=pretrained and not named, cache_dir=cache_dir)
    ours = sys.modules[model_entrypoint(base).__module__] if base.startswith('harm') else None
    if ours and normalization != 'l1':
        from_base['normalization'] = normalization  # for the layers that are harmonic in the base
    choose = partial(plan, level=level, levels=levels, include=include, exclude=exclude)
    build = partial(
        build_model,
        variant=ARCHITECTURE,
        pretrained=pretrained and named,
        pretrained_cfg=cfg.to_dict(),
        cache_dir=cache_dir,
    )
    filter_fn = ours.checkpoint_filter_fn if ours else checkpoint_filter_fn

    def make(**kwargs: Any) -> nn.Module:
        model = timm.create_model(base_model, **from_base, **kwargs)
        return _bare(apply(model, choose(model), normalization))

    if not kwargs.pop('features_only', False):
        return build(make, pretrained_filter_fn=filter_fn, **kwargs)

    features = {key: kwargs.pop(key) for key in ('out_indices', 'feature_cls') if key in kwargs}
    template = timm.create_model(base_model, features_only=True, **features, **kwargs)
    if type(template).__name__ in _WRAPPERS:
        plain = timm.create_model(base_model, **kwargs)
        wrap = dict(features_only=True, feature_cfg=_feature_cfg(template, plain))
        return build(make, pretrained_filter_fn=filter_fn, **wrap, **kwargs)

    def make_features(**kwargs: Any) -> nn.Module:
        # A class of its own, which lacks parts of the network: what is harmonic is decided on all of it.
        wanted = choose(timm.create_model(base_model, **kwargs))
        model = timm.create_model(base_model, **from_base, features_only=True, **features, **kwargs)
        return _bare(apply(model, wanted, normalization))

    filter_fn = partial(checkpoint_filter_fn, part=True)
    model = build(make_features, pretrained_filter_fn=filter_fn, pretrained_strict=False, **kwargs)
    model.pretrained_cfg = model.default_cfg = {
        key: value for key, value in model.pretrained_cfg.items() if key not in ('num_classes', 'classifier')
    }
    return model


def _base_architecture(base_model: str) -> str:
    if not isinstance(base_model, str):
        raise TypeError(f'base_model must be the name of a model of timm, got {base_model!r}.')
    base = split_model_name_tag(base_model)[0]
    if base == ARCHITECTURE:
        raise ValueError(f'base_model cannot be {ARCHITECTURE!r} itself: name the network that is to be harmonic.')
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f'; close are {", ".join(close)}' if close else ', see timm.list_models()'
        raise ValueError(f'base_model={base_model!r} is no model of timm{hint}.')
    return base


def _config(given: PretrainedCfg, base_model: str, named: bool) -> PretrainedCfg:
    """The base's config with what was given beside our stand-in; or what was given, if it is another's."""
    if given.description != _STAND_IN:
        return dataclasses.replace(given, architecture=ARCHITECTURE)
    registered = get_pretrained_cfg(ARCHITECTURE)
    fields = [field.name for field in dataclasses.fields(given)]
    changed = {name: getattr(given, name) for name in fields if getattr(given, name) != getattr(registered, name)}
    elsewhere = dict(url=None, file=None, hf_hub_id=None, hf_hub_filename=None, tag=None) if named else {}
    changed = {'custom_load': False, **elsewhere, **changed, 'architecture': ARCHITECTURE}
    return dataclasses.replace(get_pretrained_cfg(base_model), **changed)


def _bare(model: nn.Module) -> nn.Module:
    """Without the arguments that the base was made with: timm notes those of the whole."""
    model._model_args = {}
    return model


def _feature_cfg(template: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """How timm wraps the base for its features, read off a wrapped one, which keeps no record of it."""
    kind = _WRAPPERS[type(template).__name__]
    cfg = dict(feature_cls=kind, out_indices=template.feature_info.out_indices)
    if kind == 'getter':
        return dict(cfg, out_indices=template.out_indices)
    if kind == 'hook':
        cfg['no_rewrite'] = 'body' in template
    own = {name for name, _ in plain.named_children()} | {'body'}
    return dict(cfg, flatten_sequential=any(name not in own for name, _ in template.named_children()))


# The authors published no such network: there are no names but ours.
KEY_NAMES: dict[str, str] = {}


def checkpoint_filter_fn(checkpoint: StateDict, model: nn.Module, part: bool = False) -> StateDict:
    """Brings a state dict of a harmonized network, or of its plain base, into the network's layout.

    Args:
        checkpoint: What was saved; filters in the place of coefficients are projected.
        model: Network to load into, with its `pretrained_cfg`.
        part: Whether it is only a part of the network, so that the checkpoint may hold more.

    Returns:
        State dict in the model's layout.

    Raises:
        CheckpointError: If it does not fit, naming the parameters.
    """
    state = dict(unwrap(checkpoint))
    for name, layer in harmonic_layers(model).items():
        weight = state.get(f'{name}.weight')
        if weight is None or not isinstance(layer, HarmonicConv2d):
            continue
        weight = state[f'{name}.weight'] = layer.project(weight)
        if weight.ndim == 4 and weight.shape[2] != layer.weight.shape[2] and weight.shape[3] == 1:
            raise CheckpointError(
                f'{name}.weight of the checkpoint has {weight.shape[2]} coefficients a filter, the network '
                f'{layer.weight.shape[2]} (level {layer.level}): build it with the level or levels of the checkpoint, '
                'which a folder that was saved with it knows, and truncate it then.'
            )
    target = model.state_dict()
    cfg = model.pretrained_cfg
    if part:
        state = {key: value for key, value in state.items() if key in target}
    check_fit(state, target, cfg.get('classifier'), model._traits.get('first_conv', cfg.get('first_conv')))
    return state
