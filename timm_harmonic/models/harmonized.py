"""The architecture `harmonized`: any convolutional network of timm, made harmonic by `harmonize` (arXiv:2001.06570)."""

import contextlib
import dataclasses
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
from ..conversion.costs import Form
from ..conversion.harmonize import ARCHITECTURE, PatternLevels, harmonize
from ..conversion.swap import harmonic_layers
from ..layers import options_of_basis
from .checkpoints import CheckpointError, StateDict, check_fit, fit_keys, unwrap
from .weights import build_model

_DEFAULT_BASE = 'resnet50'
_STAND_IN = 'the config of base_model replaces this one'
KEY_NAMES: dict[str, str] = {}  # the authors published no such network

_cfg = get_pretrained_cfg(_DEFAULT_BASE).to_dict(remove_source=True)
default_cfgs = generate_default_cfgs({ARCHITECTURE: dict(_cfg, architecture=None, tag=None, description=_STAND_IN)})


@register_model
def harmonized(
    pretrained: bool = False,
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
    pairs: dict[str, int | list[int]] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Any convolutional network of timm, by base_model, with harmonic layers; options are those of `harmonize`.

    The weights are the base's, which the layers project, unless a config or an overlay names a file, a folder, a
    repository of the Hub or a url. Those may hold a plain or a harmonic network. Features are timm's intermediates.
    """
    base = _base_architecture(base_model)
    given = resolve_pretrained_cfg(ARCHITECTURE, pretrained_cfg, dict(pretrained_cfg_overlay or {}))
    named = bool(given.source or given.state_dict or given.has_weights)
    ours: Any = sys.modules[model_entrypoint(base).__module__] if base.startswith('harm') else None
    basis: dict[str, Any] = dict(normalization=normalization, smoothness=smoothness)
    # The basis also counts for layers that are harmonic in the base.
    create_base = partial(timm.create_model, base_model, **(options_of_basis(**basis) if ours else {}))
    of_base: dict[str, Any] = {}

    def make(**kwargs: Any) -> nn.Module:
        of_base.update(kwargs)
        model: Any = create_base(cache_dir=cache_dir, pretrained=pretrained and not named, **kwargs)
        chosen: dict[str, Any] = dict(level=level, levels=levels, include=include, exclude=exclude)
        model = harmonize(model, **chosen, **basis, form=form, pairs=pairs, inplace=True)
        model._model_args = {}  # timm notes the options of the whole
        return model

    def fitting(checkpoint: StateDict, model: nn.Module) -> StateDict:
        """Fits the state dict of a network whose base is ours, or of that base, which may keep more functions."""
        try:
            return ours.checkpoint_filter_fn(checkpoint, model)
        except CheckpointError as error:
            # Lowered with its own channels and then adapted: in the other order, what is left out would leave a shift.
            for channels in dict.fromkeys((model.pretrained_cfg['input_size'][0], of_base.get('in_chans', 3))):
                whole: Any = create_base(**{**of_base, 'in_chans': channels})
                whole.pretrained_cfg = model.pretrained_cfg
                with contextlib.suppress(CheckpointError):
                    lowered = _lowered(ours.checkpoint_filter_fn(checkpoint, whole), whole, model)
                    return ours.checkpoint_filter_fn(lowered, model)
            raise error

    built: Any = build_model(
        make,
        ARCHITECTURE,
        pretrained and named,
        pretrained_cfg=_config(given, base_model, named).to_dict(),
        pretrained_filter_fn=fitting if ours else checkpoint_filter_fn,
        feature_cfg={} if 'feature_cls' in kwargs else dict(feature_cls='getter', out_indices=None),
        cache_dir=cache_dir,
        **kwargs,
    )
    if not hasattr(built, 'set_grad_checkpointing'):  # timm's net of intermediates leaves it to the model
        built.set_grad_checkpointing = built.model.set_grad_checkpointing
    return built


def _base_architecture(base_model: str) -> str:
    if not isinstance(base_model, str):
        raise TypeError(f'base_model must be the name of a model of timm, got {base_model!r}.')
    base = split_model_name_tag(base_model)[0]
    if base == ARCHITECTURE:
        raise InputError(f'base_model cannot be {ARCHITECTURE!r} itself: name the network to make harmonic.')
    if not timm.is_model(base):
        raise InputError(f'timm has no model base_model={base_model!r}, see timm.list_models().')
    return base


def _config(given: PretrainedCfg, base_model: str, named: bool) -> PretrainedCfg:
    """Returns the base's config with the caller's changes to our stand-in, or the config that came with the weights."""
    if given.description != _STAND_IN:
        return dataclasses.replace(given, architecture=ARCHITECTURE)
    registered = get_pretrained_cfg(ARCHITECTURE)
    changed = {name: value for name, value in vars(given).items() if value != getattr(registered, name)}
    elsewhere = dict(url=None, file=None, hf_hub_id=None, hf_hub_filename=None, tag=None) if named else {}
    changed = {'custom_load': False, **elsewhere, **changed, 'architecture': ARCHITECTURE}
    return dataclasses.replace(get_pretrained_cfg(base_model), **changed)


def _lowered(state: StateDict, whole: nn.Module, model: nn.Module) -> StateDict:
    """Drops the coefficients and statistics of functions that `model` leaves out from a state dict of `whole`."""
    lower = harmonic_layers(model)
    for name, layer in harmonic_layers(whole).items():
        if lower[name].level < layer.level:
            kept, factors = layer.kept_at(lower[name].level)
            weight = state[f'{name}.weight']
            state[f'{name}.weight'] = (weight[:, :, kept] * factors[:, None]).to(weight)
            for key in (f'{name}.bn.running_mean', f'{name}.bn.running_var'):
                if key in state:
                    state[key] = state[key].reshape(-1, len(layer.basis))[:, kept].flatten()
    return state


def checkpoint_filter_fn(checkpoint: StateDict, model: nn.Module) -> StateDict:
    """Checks the state dict of a harmonized network, or of its plain base, whose filters the layers project."""
    state, cfg = fit_keys(unwrap(checkpoint), model, {}), model.pretrained_cfg
    check_fit(state, model, cfg.get('classifier'), get_model_traits(model).get('first_conv', cfg.get('first_conv')))
    return state
