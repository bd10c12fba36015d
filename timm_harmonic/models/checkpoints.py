"""Checkpoints: reading files as data, the authors' parameter layout, other numbers of input channels."""

import argparse
import os
import pickle
import re
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..common import TimmHarmonicError, first_line
from ..conversion.swap import harmonic_layers
from ..layers import HarmonicConv2d, HarmonicLayer, dct_spectrum

StateDict = dict[str, Any]
Names = str | Sequence[str] | None

# Where training scripts keep parameters in what they save: timm its averaged ones, and everyone the last ones (`params`
# in the authors' scripts for CIFAR and STL-10).
_AVERAGED, _LAST = ('state_dict_ema', 'model_ema'), ('state_dict', 'model', 'params')


class CheckpointError(TimmHarmonicError):
    """A file or a state dict does not fit the model; the message says where."""


def read_checkpoint(path: str | os.PathLike) -> StateDict:
    """What a file of safetensors or torch.save holds, on the CPU: tensors and plain Python values, never code.

    Raises FileNotFoundError if there is no file, CheckpointError if it is a web page, damaged, not a checkpoint, or
    would run code.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path!r}.')
    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in what timm's train.py saves
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the readers raise anything
        if _is_web_page(path):
            problem = 'is a web page, not a checkpoint: download the file itself again.'
        elif isinstance(error, pickle.UnpicklingError):
            problem = (
                'was not loaded: it is no checkpoint, or it holds more than tensors and plain values and could run '
                f'code. Download it again, or save its state dict alone. ({first_line(error)})'
            )
        else:
            reason = f'{type(error).__name__}: {first_line(error)}'
            problem = f'is truncated or damaged, or no checkpoint: download or save it again. ({reason})'
        raise CheckpointError(f'{path!r} {problem}') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path!r} holds a {type(checkpoint).__name__}, not a state dict.')
    return checkpoint


def _is_web_page(path: str) -> bool:
    with open(path, 'rb') as file:
        return re.match(rb'\s*<[!?a-zA-Z]', file.read(64)) is not None


def unwrap(checkpoint: StateDict, use_ema: bool | None = None) -> StateDict:
    """The state dict in what a training script saved, without the prefixes of wrapped modules.

    `use_ema` says whether to take averaged parameters; None takes them if there are any, as timm does. Raises
    CheckpointError if there are none of the kind that is asked for.
    """
    averaged = [checkpoint[key] for key in _AVERAGED if isinstance(checkpoint.get(key), dict)]
    last = [checkpoint[key] for key in _LAST if isinstance(checkpoint.get(key), dict)]
    if use_ema and not averaged:
        raise CheckpointError(f'the checkpoint has no averaged weights ({" or ".join(_AVERAGED)}).')
    if use_ema is False and averaged and not last:
        raise CheckpointError('the checkpoint has averaged weights (EMA) only.')
    found = (last if use_ema is False else averaged + last) or [checkpoint]
    state = _check_names(found[0])
    for key, value in state.items():
        _check_tensor(key, value)
    return state


def _check_names(state: StateDict) -> StateDict:
    """The state dict without prefixes. Raises CheckpointError for keys that are no text or meet in one name."""
    if strange := [key for key in state if not isinstance(key, str)]:
        raise CheckpointError(f'the checkpoint has a key {strange[0]!r}, which is no name of a parameter.')
    clean = clean_state_dict(state)
    if len(clean) != len(state):
        raise CheckpointError('the checkpoint has one parameter under two names, with and without the prefix module.')
    return clean


def _check_tensor(key: str, value: Any) -> None:
    """Raises CheckpointError for what is no dense tensor, or would take much more memory than its numbers do."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f'{key} of the checkpoint is a {type(value).__name__}, not a tensor.')
    if value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f'{key} of the checkpoint is a sparse or quantised tensor: save it as a dense one.')
    if not value.is_meta and value.untyped_storage().nbytes() < value.nbytes:
        raise CheckpointError(
            f'{key} {tuple(value.shape)} of the checkpoint repeats fewer numbers than its shape has: save it with '
            '.contiguous(), if that is what it should be.'
        )


def convert_state_dict(
    checkpoint: StateDict, model: nn.Module, *, names: dict[str, str], norms: Sequence[str]
) -> StateDict:
    """Brings a state dict into a model's layout. One that is in it already is returned as it is.

    Accepts bare and wrapped state dicts ('state_dict' and the like), with and without `module.`, the authors' names
    (harm1, harm2, classifier.N), shapes and frozen `.dct` tensors. Adapts the statistics of a stem with normalised
    responses to the model's input channels. timm then adapts the stem's weight and drops another classifier.

    `names` are regular expressions over parameter names with their replacements, `norms` the batch-norms that see the
    output of a stem without a bias. Raises CheckpointError if a key or shape fits nothing, a parameter is missing, or
    the basis is another one.
    """
    target, layers = model.state_dict(), harmonic_layers(model)
    stem = model.pretrained_cfg['first_conv']
    state = {}
    for key, value in rename_keys(unwrap(checkpoint), names).items():
        name, _, attribute = key.rpartition('.')
        if attribute == 'dct' and name in layers:
            _check_basis(key, value, layers[name])
            continue
        if attribute == 'weight' and name in layers:
            value = _coefficients_4d(value, layers[name].basis.shape[0])
        elif key in target and value.numel() == target[key].numel() and attribute == 'weight' and value.ndim == 2:
            value = value.reshape(target[key].shape)  # a linear layer that is a convolution here
        state[key] = value
    if stem in layers:
        _adapt_stem(state, stem, layers[stem], norms, model.pretrained_cfg['input_size'][0])
    check_fit(state, model, model.pretrained_cfg['classifier'], stem)
    return state


def rename_keys(state: StateDict, names: dict[str, str]) -> StateDict:
    """A state dict with regular expressions over its keys replaced, one after the other."""
    for pattern, replacement in names.items():
        renamed = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        if len(renamed) != len(state):
            raise CheckpointError("the checkpoint has one parameter under two names, the authors' and ours.")
        state = renamed
    return state


def _coefficients_4d(value: Tensor, count: int) -> Tensor:
    """(O, I * P, 1, 1) or (O, I, P, 1, 1), the authors' shapes, as (O, I, P, 1); anything else as it is."""
    if value.ndim == 5 and tuple(value.shape[2:]) == (count, 1, 1):
        return value[..., 0]
    if value.ndim == 4 and tuple(value.shape[2:]) == (1, 1) and value.shape[1] % count == 0:
        return value.reshape(value.shape[0], -1, count, 1)
    return value


def _check_basis(key: str, dct: Tensor, layer: HarmonicLayer) -> None:
    """The authors keep (1, P, k, k), or (C * P, 1, k, k) where responses are normalised."""
    count, side = layer.basis.shape[:2]
    fits = dct.is_floating_point() and dct.numel() and dct.numel() % layer.basis.numel() == 0
    stored = dct.reshape(-1, count, side, side) if fits else None
    if stored is None or not torch.allclose(stored, layer.basis.to(dct).expand_as(stored), rtol=0, atol=1e-6):
        raise CheckpointError(
            f"{key} {tuple(dct.shape)} is another basis than the model's {tuple(layer.basis.shape)} "
            f'(level={layer.level}, dc={layer.dc}, {layer.named_basis()}).'
        )


def _adapt_stem(state: StateDict, stem: str, layer: HarmonicLayer, norms: Sequence[str], declared: int) -> None:
    """Adapts the response statistics of a stem, as timm adapts the weight of a convolution.

    More channels repeat the source's. One channel answers as a gray image in all source channels would: timm sums the
    weights, so they are brought to a common scale first, and the means' share goes into the next shift.
    """
    weight, mean, var = (state.get(f'{stem}.{key}') for key in ('weight', 'bn.running_mean', 'bn.running_var'))
    count, channels = layer.basis.shape[0], layer.in_channels
    if weight is None or mean is None or var is None or weight.shape[2:] != (count, 1) or mean.numel() % count:
        return  # check_fit reports these with everything else that does not fit
    source = mean.numel() // count
    if source == channels:
        return
    if source != declared:
        raise CheckpointError(
            f'{stem}.weight {tuple(weight.shape)} has {source} input channels, but the config says {declared}: '
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
        spectrum = dct_spectrum(layer.kernel_size[0], layer.level, layer.dc, layer.smoothness)
        shift = (weight64 * spectrum * (means - means.mean(0)).double()).sum((1, 2))
        state[f'{stem}.weight'] = (weight64 * (common + layer.bn.eps).sqrt()).unsqueeze(-1).to(weight)
        means, variances = means.mean(0), common.to(var)
        biased = f'{stem}.bias' in state
        for key in [f'{stem}.bias'] if biased else [f'{norm}.running_mean' for norm in norms]:
            state[key] = (state[key].double() + (-shift if biased else shift)).to(state[key])
    state[f'{stem}.bn.running_mean'] = means.reshape(-1).clone()
    state[f'{stem}.bn.running_var'] = variances.reshape(-1).clone()


def check_fit(state: StateDict, model: nn.Module, classifiers: Names, stems: Names) -> None:
    """Raises CheckpointError, naming what does not fit, unless every key and shape of a state dict fits a network.

    Left out is what timm adapts: classifiers and the stems' input channels, named as in timm's configs. Plain filters
    fit a harmonic convolution, which projects them when it loads them.
    """
    target = model.state_dict()
    heads = {f'{name}.{what}' for name in names_of(classifiers) for what in ('weight', 'bias')}
    first = {f'{name}.weight' for name in names_of(stems)}
    modules = model.named_modules(remove_duplicate=False)  # a network may use one layer in several places
    projected = {f'{n}.weight': m.kernel_size for n, m in modules if isinstance(m, HarmonicConv2d)}

    def misfit(key: str) -> bool:
        ours, theirs = list(target[key].shape), list(state[key].shape)
        if key in projected and theirs[2:] == list(projected[key]):
            ours[2:] = theirs[2:]
        if key in first and len(ours) == len(theirs) == 4:
            ours[1] = theirs[1] = 0
        return ours != theirs

    layers = harmonic_layers(model)
    names = {f'{name}.basis_code' for name in layers}
    not_needed = ('num_batches_tracked', *names)
    problems = {
        'another basis': [
            f'{name}.weight: {problem}; build the network with that'
            for name, layer in layers.items()
            if f'{name}.weight' in state
            and list(state[f'{name}.weight'].shape[2:]) != list(projected.get(f'{name}.weight', ()))
            and (problem := layer.other_basis(state.get(f'{name}.basis_code')))
        ],
        'missing': [k for k in target if k not in state and k not in heads and not k.endswith(not_needed)],
        'unexpected': [k for k in state if k not in target and k not in heads and k not in names],
        'no real numbers': [
            f'{k} in {state[k].dtype}'
            for k in state
            if k in target and target[k].is_floating_point() and not state[k].is_floating_point()
        ],
        'wrong shape': [
            f'{k} {tuple(state[k].shape)} for {tuple(target[k].shape)}'
            for k in state
            if k in target and k not in heads and k not in names and misfit(k)
        ],
    }
    if any(problems.values()):
        found = '; '.join(f'{what}: {_shorten(items)}' for what, items in problems.items() if items)
        raise CheckpointError(f'the checkpoint does not fit the model, nothing was loaded. {found}.')


def names_of(names: Names) -> Sequence[str]:
    """One name, several or none, as timm's configs have them, as a sequence."""
    return (names,) if isinstance(names, str) else names or ()


def _shorten(items: list[str], limit: int = 5) -> str:
    return ', '.join(items[:limit]) + (f' and {len(items) - limit} more' if len(items) > limit else '')
