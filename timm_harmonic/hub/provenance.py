"""Where weights come from: an authors' file, a training run of timm, or the weights that timm has."""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import get_pretrained_cfg, list_pretrained, model_entrypoint
from torch import nn

from ..layers import options_of_basis, read_name
from ..models.checkpoints import (
    CheckpointError,
    StateDict,
    first_line,
    names_of,
    read_checkpoint,
    rename_keys,
    unwrap,
)
from ..models.download import pinned_sha256, released_digits, sha256_of
from ..models.paper import REPOSITORY

# What names weights among the arguments of timm.create_model.
_SOURCES = {
    'cache_dir',
    'checkpoint_path',
    'pretrained',
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'pretrained_strict',
}


class HubError(RuntimeError):
    """A folder or a repository is not what it should be; the message says where."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where weights come from. What does not apply is empty."""

    file: str = ''  # name of the source file
    sha256: str = ''  # of the source file, 64 hex digits
    url: str = ''  # where the authors released the source file
    notes: tuple[str, ...] = ()  # what the paper says about the weights
    epoch: int | None = None  # of the training run, counted from 0
    averaged: bool = False  # whether the file's averaged weights were taken
    run: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the training run
    summary: dict[str, str] = dataclasses.field(default_factory=dict)  # its figures of that epoch, from summary.csv
    base: str = ''  # the weights of timm that were compressed, without a file


def key_names(model_name: str) -> dict[str, str] | None:
    """The authors' names of an architecture's parameters; None if it is not one of ours."""
    if ':' in model_name:
        return {}  # a repository or a folder has our names
    return getattr(sys.modules[model_entrypoint(model_name).__module__], 'KEY_NAMES', None)


def read_source(path: Path, model_name: str, use_ema: bool | None = None) -> tuple[Provenance, StateDict]:
    """What is known of a checkpoint, and its state dict by our names of parameters. Raises as what it calls does."""
    content = read_checkpoint(path)
    state = rename_keys(unwrap(content, use_ema), key_names(model_name) or {})
    return provenance_of(path, content, model_name, use_ema), state


def options_of_run(source: Provenance) -> dict[str, Any]:
    """The network's options in a training run, without what names the weights that it began from."""
    return {key: value for key, value in (source.run.get('model_kwargs') or {}).items() if key not in _SOURCES}


def provenance_of(path: Path, content: StateDict, model_name: str, use_ema: bool | None) -> Provenance:
    """What is known of a checkpoint: by its hash if it is a released one, else by the run that it lies beside."""
    digest = sha256_of(path)
    if released := _released(path, digest, model_name):
        return released
    run = _run_options(path, content)
    trained = str(run.get('model', model_name))
    if ':' not in trained and trained.partition('.')[0] != model_name:  # a repository or folder may have any name
        raise HubError(f'{path.name} was trained as {trained}, by the options of its run, not as {model_name}.')
    epoch = content.get('epoch') if isinstance(content.get('epoch'), int) else None
    return Provenance(
        path.name,
        digest,
        epoch=epoch,
        averaged=bool(use_ema) or ('state_dict_ema' in content and 'state_dict' not in content),
        run=run,
        summary=_summary(path.parent / 'summary.csv', epoch) if run else {},
    )


def _released(path: Path, digest: str, model_name: str) -> Provenance | None:
    for name in list_pretrained(['harm*', f'{model_name}.*']):
        cfg = get_pretrained_cfg(name)
        digits = released_digits(cfg.url or '')
        if digits and digest.startswith(digits) and cfg.origin_url == REPOSITORY:
            if cfg.architecture != model_name:
                raise HubError(f'{path.name} is the released {name}, not {model_name}.')
            notes = tuple(note for note in cfg.notes if not pinned_sha256(note))
            return Provenance(path.name, digest, url=cfg.url, notes=notes)
    return None


def _run_options(path: Path, content: StateDict) -> dict[str, Any]:
    """Options of the training run: args.yaml beside the checkpoint, or those that timm's train.py saved in it."""
    options = path.parent / 'args.yaml'
    if not options.is_file():
        return dict(vars(content['args'])) if isinstance(content.get('args'), argparse.Namespace) else {}
    try:
        run = yaml.safe_load(options.read_text(encoding='utf-8'))
    except (yaml.YAMLError, ValueError) as error:
        raise HubError(f'{options} is damaged: {first_line(error)}') from error
    if not isinstance(run, dict):
        raise HubError(f'{options} holds no options, but a {type(run).__name__}.')
    if not isinstance(run.get('model_kwargs') or {}, dict):
        raise HubError(f'{options} has model_kwargs {run["model_kwargs"]!r}: they must be NAME: VALUE.')
    if run.get('input_size') is not None:  # it counts in train.py; timm refuses to save a network with both
        run.pop('img_size', None)
    return run


def _summary(path: Path, epoch: int | None) -> dict[str, str]:
    """The run's figures of an epoch, by the last row that it has in summary.csv."""
    if epoch is None or not path.is_file():
        return {}
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(epoch)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise HubError(f'{path} is damaged: {first_line(error)}') from error
    # A row that is too long has its rest under None.
    figures = {key: value for key, value in (rows or [{}])[-1].items() if key and key.startswith('eval_') and value}
    try:
        return {key: str(float(value)) for key, value in figures.items()}
    except (TypeError, ValueError) as error:
        raise HubError(f'{path} has a figure that is no number in epoch {epoch}: {first_line(error)}') from error


def create_trained(model_name: str, **kwargs: Any) -> nn.Module:
    """A network of timm with the weights that its name stands for, in evaluation.

    A folder or a repository has a config by somebody else, which may hold anything: raises HubError if no network can
    be made of it, CheckpointError if its weights do not fit, OSError if something cannot be read.
    """
    try:
        model = timm.create_model(model_name, pretrained=True, **kwargs).eval()
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        if ':' not in model_name:
            raise
        raise HubError(
            f'no network can be made of {model_name}, by its config.json: {type(error).__name__}: {first_line(error)}'
        ) from error
    theirs, ours = model.pretrained_cfg.get('num_classes'), kwargs.get('num_classes')
    if ours and theirs != ours:  # timm leaves the classifier random then
        raise HubError(f'{model_name} has weights of {theirs} classes, not of {ours}.')
    return model


def build_loaded(model_name: str, state: StateDict, source: Provenance, model_kwargs: dict[str, Any]) -> nn.Module:
    """The network that parameters belong to, loaded with them, in evaluation.

    Their shapes say classes and channels, and their basis is part of them.

    `model_kwargs` replace the training run's. Raises CheckpointError if the parameters do not fit, HubError if an
    option contradicts them.
    """
    if given := sorted(_SOURCES & model_kwargs.keys()):
        raise HubError(f'{given[0]} is no option of a network: the weights are those of {source.file}.')
    kwargs = {**_basis_of(state), **options_of_run(source), **model_kwargs}
    if kwargs.get('features_only'):
        raise HubError('leave features_only out, and give it to timm.create_model later: a folder has a whole network.')
    if source.run.get('gp'):
        kwargs.setdefault('global_pool', source.run['gp'])
    try:
        with torch.device('meta'):
            blank = timm.create_model(model_name, **kwargs)
    except Exception as error:  # timm asserts some options, and looks up others
        shown = ', '.join(f'{key}={value!r}' for key, value in kwargs.items()) or 'no options'
        raise HubError(
            f'{model_name} cannot be built with {shown}: {type(error).__name__}: {first_line(error)}'
        ) from error
    shapes = _shapes(blank, state, f'{source.file} has no {{}}: it is not a {model_name}.')
    for key, value in shapes.items():
        if kwargs.setdefault(key, value) != value:
            raise HubError(f'{source.file} has {key}={value}, not {kwargs[key]}.')
    overlay = dict(
        state_dict=state,
        source=None,
        num_classes=shapes['num_classes'],
        input_size=(shapes['in_chans'], *blank.pretrained_cfg['input_size'][1:]),
        notes=source.notes or None,
    )
    if not source.url:
        overlay.update(tag=None, url=None, hf_hub_id=None, origin_url=None, license=None)
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg.pop('state_dict', None)
    return model.eval()


def _basis_of(state: StateDict) -> dict[str, Any]:
    """The options of the basis that coefficients refer to, where it is not the authors'."""
    names = {read_name(value) for key, value in state.items() if key.endswith('.basis_name')}
    return options_of_basis(names.pop()) if len(names) == 1 else {}


def _shapes(blank: nn.Module, state: StateDict, missing: str) -> dict[str, int]:
    """Classes and input channels of parameters, by the first and the last layer of their network."""
    (first, *_), (last, *_) = (names_of(blank.pretrained_cfg[key]) for key in ('first_conv', 'classifier'))
    stem, classifier = blank.get_submodule(first), state.get(f'{last}.weight')
    statistics, weight = state.get(f'{first}.bn.running_mean'), state.get(f'{first}.weight')
    for key, value, least in ((f'{first}.weight', weight, 2), (f'{last}.weight', classifier, 1)):
        if value is not None and value.ndim < least:
            raise CheckpointError(f'{key} of the checkpoint has shape {tuple(value.shape)}.')
    if statistics is not None and hasattr(stem, 'basis'):
        channels = statistics.numel() // stem.basis.shape[0]
    elif weight is not None:
        channels = weight.shape[1] * stem.groups
    else:
        raise CheckpointError(missing.format(f'{first}.weight'))
    return dict(num_classes=0 if classifier is None else len(classifier), in_chans=channels)
