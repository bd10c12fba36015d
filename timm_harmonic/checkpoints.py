"""Loading weights: the authors' parameter layout, other numbers of input channels, and files that are not weights."""

import argparse
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from .block import HarmonicBlock2d
from .conv import HarmonicConv2d

__all__ = [
    'CheckpointError',
    'StateDict',
    'check_fit',
    'convert_state_dict',
    'first_line',
    'names_of',
    'read_checkpoint',
    'rename_keys',
    'unwrap',
]

StateDict = dict[str, Any]

# Where training scripts keep the parameters in what they save: timm its averaged ones, and anyone the others.
_AVERAGED, _LAST = ('state_dict_ema', 'model_ema'), ('state_dict', 'model')


class CheckpointError(RuntimeError):
    """A file or a state dict that is not what the model needs; the message says in what."""


def read_checkpoint(path: str | os.PathLike) -> StateDict:
    """Reads a checkpoint as data: tensors and plain Python values, never code.

    Args:
        path: A .safetensors file, or one that torch.save wrote.

    Returns:
        What the file holds, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is a web page, damaged, not a checkpoint, or would run code.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path!r}.')
    with open(path, 'rb') as file:
        if re.match(rb'\s*<[!?a-zA-Z]', file.read(64)):  # a lone < may be the size of a header
            raise CheckpointError(f'{path!r} is a web page, not a checkpoint: download the file itself again.')
    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in what timm's train.py saves
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{path!r} was not loaded: it is no checkpoint, or it holds more than tensors and plain values and '
            f'could run code. Download it again, or save its state dict alone. ({first_line(error)})'
        ) from error
    except (EOFError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f'{path!r} is truncated or damaged: download or save it again. ({first_line(error)})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path!r} holds a {type(checkpoint).__name__}, not a state dict.')
    return checkpoint


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unwrap(checkpoint: StateDict, use_ema: bool | None = None) -> StateDict:
    """The parameters in what a training script saved, without the prefixes of wrapped modules.

    Args:
        checkpoint: What was saved: a state dict, or a dictionary that holds one.
        use_ema: Whether to take the averaged ones; None takes them where there are any, as timm does.

    Returns:
        The state dict.

    Raises:
        CheckpointError: If there are none of the kind that is asked for.
    """
    averaged = [checkpoint[key] for key in _AVERAGED if isinstance(checkpoint.get(key), dict)]
    last = [checkpoint[key] for key in _LAST if isinstance(checkpoint.get(key), dict)]
    if use_ema and not averaged:
        raise CheckpointError(f'the checkpoint has no averaged weights ({" or ".join(_AVERAGED)}).')
    if use_ema is False and averaged and not last:
        raise CheckpointError('the checkpoint has averaged weights (EMA) only.')
    found = (last if use_ema is False else averaged + last) or [checkpoint]
    return clean_state_dict(found[0])


def convert_state_dict(checkpoint: StateDict, model: nn.Module, *, names: dict[str, str], norm: str) -> StateDict:
    """Brings a state dict into a model's layout; one that is in it already is returned as it is.

    Accepted: bare or wrapped ('state_dict' and the like), with and without `module.`, the authors' names
    (harm1, harm2, classifier.N), shapes and frozen `.dct` tensors. The statistics of a normalised root layer are
    adapted to the model's input channels. timm adapts the root's weight and drops another classifier afterwards.

    Args:
        checkpoint: What was saved.
        model: Network to load into, with its `pretrained_cfg`.
        names: Regular expressions over parameter names and what they become.
        norm: Name of the batch-norm that follows the root layer, for a root without a bias.

    Returns:
        State dict in the model's layout.

    Raises:
        CheckpointError: If a key or shape fits nothing, a parameter is missing, or the frozen basis is another one.
    """
    target = model.state_dict()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (HarmonicConv2d, HarmonicBlock2d))}
    root = model.pretrained_cfg['first_conv']
    state = {}
    for key, value in rename_keys(unwrap(checkpoint), names).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f'{key} of the checkpoint is a {type(value).__name__}, not a tensor.')
        name, _, attribute = key.rpartition('.')
        if attribute == 'dct' and name in layers:
            _check_basis(key, value, layers[name])
            continue
        if attribute == 'weight' and name in layers:
            value = _coefficients_4d(value, layers[name].basis.shape[0])
        elif key in target and value.numel() == target[key].numel() and attribute == 'weight' and value.ndim == 2:
            value = value.reshape(target[key].shape)  # a linear layer that is a convolution here
        state[key] = value
    if root in layers:
        _adapt_root(state, root, layers[root], norm, model.pretrained_cfg['input_size'][0])
    check_fit(state, target, model.pretrained_cfg['classifier'], root)
    return state


def rename_keys(state: StateDict, names: dict[str, str]) -> StateDict:
    """A state dict with regular expressions over its keys replaced, one after the other."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _coefficients_4d(value: Tensor, count: int) -> Tensor:
    """(O, I * P, 1, 1) or (O, I, P, 1, 1), the authors' shapes, as (O, I, P, 1); anything else as it is."""
    if value.ndim == 5 and tuple(value.shape[2:]) == (count, 1, 1):
        return value[..., 0]
    if value.ndim == 4 and tuple(value.shape[2:]) == (1, 1) and value.shape[1] % count == 0:
        return value.reshape(value.shape[0], -1, count, 1)
    return value


def _check_basis(key: str, dct: Tensor, layer: nn.Module) -> None:
    """The authors keep (1, P, k, k), or (C * P, 1, k, k) where responses are normalised."""
    count, side = layer.basis.shape[:2]
    stored = dct.reshape(-1, count, side, side) if dct.numel() % layer.basis.numel() == 0 else None
    if stored is None or not torch.allclose(stored, layer.basis.to(dct).expand_as(stored), rtol=0, atol=1e-6):
        raise CheckpointError(
            f"{key} {tuple(dct.shape)} is another basis than the model's {tuple(layer.basis.shape)} "
            f'(level={layer.level}, dc={layer.dc}, normalization={layer.normalization!r}).'
        )


def _adapt_root(state: StateDict, root: str, layer: nn.Module, norm: str, declared: int) -> None:
    """Adapts the response statistics of a normalised root, as timm adapts the weight of a convolution.

    More channels repeat the source's. One channel answers as a gray image fed to all source channels: timm sums the
    weights, so they are brought to the common scale first, and the means' share goes into the next shift.
    """
    weight, mean, var = (state.get(f'{root}.{key}') for key in ('weight', 'bn.running_mean', 'bn.running_var'))
    count, channels = layer.basis.shape[0], layer.in_channels
    if weight is None or mean is None or var is None or weight.ndim != 4 or mean.numel() % count:
        return  # reported with everything else that does not fit
    source = mean.numel() // count
    if source == channels:
        return
    if source != declared:
        raise CheckpointError(
            f'{root}.weight {tuple(weight.shape)} has {source} input channels, but the config says {declared}: '
            f'declare it by pretrained_cfg_overlay=dict(input_size=({source}, H, W)).'
        )
    means, variances = mean.reshape(source, count), var.reshape(source, count)
    if channels > 1:
        index = torch.arange(channels) % source
        means, variances = means[index], variances[index]
    else:
        scale = (variances.double() + layer.bn.eps).sqrt()  # (C, P)
        common = variances.double().mean(0, keepdim=True)
        weight64 = weight.double()[..., 0] / scale  # (O, C, P)
        shift = (weight64 * (means - means.mean(0)).double()).sum((1, 2))
        state[f'{root}.weight'] = (weight64 * (common + layer.bn.eps).sqrt()).unsqueeze(-1).to(weight)
        means, variances = means.mean(0), common.to(var)
        key, sign = (f'{root}.bias', -1) if f'{root}.bias' in state else (f'{norm}.running_mean', 1)
        state[key] = (state[key].double() + sign * shift).to(state[key])
    state[f'{root}.bn.running_mean'] = means.reshape(-1).clone()
    state[f'{root}.bn.running_var'] = variances.reshape(-1).clone()


Names = str | Sequence[str] | None


def check_fit(state: StateDict, target: StateDict, classifiers: Names, roots: Names) -> None:
    """Every key and shape must fit, but for those that timm adapts: classifiers, and the roots' input channels.

    Args:
        state: State dict to load.
        target: State dict of the network.
        classifiers: Name or names of the network's last layers, as in timm's configs.
        roots: Name or names of its first ones.

    Raises:
        CheckpointError: If something does not fit, naming it.
    """
    heads = {f'{name}.{what}' for name in names_of(classifiers) for what in ('weight', 'bias')}
    stems = {f'{name}.weight' for name in names_of(roots)}

    def misfit(key: str) -> bool:
        ours, theirs = list(target[key].shape), list(state[key].shape)
        if key in stems and len(ours) == len(theirs) == 4:
            ours[1] = theirs[1] = 0
        return ours != theirs

    problems = {
        'missing': [k for k in target if k not in state and k not in heads and not k.endswith('num_batches_tracked')],
        'unexpected': [k for k in state if k not in target and k not in heads],
        'wrong shape': [
            f'{k} {tuple(state[k].shape)} for {tuple(target[k].shape)}'
            for k in state
            if k in target and k not in heads and misfit(k)
        ],
    }
    if any(problems.values()):
        found = '; '.join(f'{what}: {_shorten(items)}' for what, items in problems.items() if items)
        raise CheckpointError(f'the checkpoint does not fit the model, nothing was loaded. {found}.')


def names_of(names: Names) -> Sequence[str]:
    """One name, several or none, as timm's configs have them, as a sequence."""
    return (names,) if isinstance(names, str) else names or ()


def _shorten(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    return ', '.join(items[:limit]) + (f' and {len(items) - limit} more' if len(items) > limit else '')
