"""Checkpoints: reading files as data, the authors' parameter layout, other numbers of input channels."""

import argparse
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..common import TimmHarmonicError, in_short
from ..conversion.swap import harmonic_layers
from ..layers import HarmonicBlock2d, HarmonicConv2d, HarmonicLayer
from ..layers.dct import dct_spectrum, options_of_code

StateDict = dict[str, Any]
Names = str | Sequence[str] | None

# Where training scripts keep averaged parameters and the last ones (`params`: the authors' for CIFAR and STL-10).
_AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'ema')
_LAST = ('state_dict', 'model', 'params', 'model_state_dict', 'net', 'network', 'weights', 'module')
# What torch puts into names, at any depth, when it compiles a module, shards it or recomputes its activations.
_WRAPPERS = re.compile(r'(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# What keys tell of why a state dict does not fit, and what to do.
_TELLTALES = {
    r'\.aux_bn\.': 'It was trained with --split-bn: save it without the keys of aux_bn, which evaluation does not use.',
    r'weight_(orig|g)$|\.parametrizations\.': 'A weight is computed (pruning, weight_norm or the like): make that '
    'permanent before you save.',
    r'conv1\.bn\.weight$': "timm's unfreeze gave the stem's normalisation a scale and a shift: freeze it by bn.eval().",
}
_OTHER_FUNCTIONS = (
    'If harmonic layers keep other functions, build the network with the level, levels and pairs of the checkpoint, '
    'as a folder that was saved with it does, then truncate it.'
)
_BASIS = '.basis_code'  # the state dict's entry for a layer's basis, missing if it is the authors'


class CheckpointError(TimmHarmonicError):
    """Weights cannot be found or read, or do not fit the model; the message says which and why."""


def read_checkpoint(path: str | os.PathLike) -> StateDict:
    """Reads a file of safetensors or torch.save onto the CPU: tensors and plain Python values, never code.

    Raises CheckpointError if the file is missing, damaged, not a checkpoint, or would run code.
    """
    path = os.fspath(path)
    try:
        with open(path, 'rb') as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f'no checkpoint at {path!r}: {error.strerror}.') from error
    try:
        if path.endswith('.safetensors'):
            # It opens no path that is not UTF-8.
            checkpoint: Any = load_file(path) if path.isascii() else load(Path(path).read_bytes())
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # train.py of timm saves its options
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # the readers raise anything for bytes that are not a checkpoint
        if re.match(rb'\s*<[!?a-zA-Z]', start):
            problem = 'is a web page, not a checkpoint: download the file itself again.'
        elif isinstance(error, pickle.UnpicklingError):
            needed = re.search(r'GLOBAL ([\w.]+)', str(error))
            problem = (
                'was not loaded: it is not a checkpoint, or it holds more than tensors and plain values and could run '
                f'code{f" ({needed[1]})" if needed else ""}. Download it again; or, in the environment that wrote it, '
                "save the state dict alone: torch.save(model.state_dict(), 'weights.pth'). In Lightning, the module's."
            )
        else:
            place = os.path.realpath(path)  # the Hub's client downloads a file again only without a link's target
            problem = f'is truncated or damaged, or not a checkpoint: remove {place}, download or save it again.'
            problem += f' ({in_short(error)})'
        raise CheckpointError(f'{path!r} {problem}') from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        kind = 'nothing' if checkpoint == {} else f'a {type(checkpoint).__name__}'
        raise CheckpointError(f'{path!r} holds {kind}, not a state dict.')
    return checkpoint


def unwrap(checkpoint: StateDict, use_ema: bool | None = None) -> StateDict:
    """The state dict in what a training script saved, without the prefixes of wrapped modules.

    Averaged parameters are taken by `use_ema`; None takes them if they exist, as timm does. Raises CheckpointError if
    they do not exist, the choice is ambiguous, or a key or value is not a parameter's.
    """
    held = [k for k, v in checkpoint.items() if isinstance(v, dict) and any(isinstance(i, Tensor) for i in v.values())]
    averaged, last = ([key for key in keys if key in held] for keys in (_AVERAGED, _LAST))
    if not averaged and not last and not any(isinstance(value, Tensor) and value.ndim for value in checkpoint.values()):
        last = held
    if use_ema and not averaged:
        raise CheckpointError(f'the checkpoint has no averaged weights ({" or ".join(_AVERAGED)}).')
    if use_ema is False and averaged and not last:
        raise CheckpointError('the checkpoint has averaged weights (EMA) only: take them by --use-ema.')
    chosen = averaged if averaged and use_ema is not False else last
    if len(chosen) > 1 and chosen[0] not in ('state_dict', 'state_dict_ema'):  # timm takes these first
        raise CheckpointError(f'the checkpoint has several state dicts: save {" or ".join(map(str, chosen))} alone.')
    state = checkpoint[chosen[0]] if chosen else checkpoint
    if strange := [key for key in state if not isinstance(key, str)]:
        raise CheckpointError(f'the checkpoint has the key {strange[0]!r}, which is not the name of a parameter.')
    clean = clean_state_dict({_WRAPPERS.sub('', key): value for key, value in state.items()})
    if len(clean) != len(state):
        raise CheckpointError('the checkpoint has one parameter under two names, with and without the prefix module.')
    clean.pop('n_averaged', None)  # of torch.optim.swa_utils.AveragedModel
    for key, value in clean.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f'{key} of the checkpoint is a {type(value).__name__}, not a tensor.')
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f'{key} of the checkpoint is a sparse or quantised tensor: save it as a dense one.')
        if not value.is_meta and value.untyped_storage().nbytes() < value.nbytes:  # small files may fill the memory
            shape = tuple(value.shape)
            raise CheckpointError(f'{key} {shape} of the checkpoint is an expanded tensor: save it with .contiguous().')
    return clean


def convert_state_dict(
    checkpoint: StateDict, model: nn.Module, *, names: dict[str, str], norms: Sequence[str]
) -> StateDict:
    """Converts a checkpoint, see `unwrap`, from the authors' names, shapes and `.dct` tensors to a model's layout.

    Adapts the statistics of a stem with normalised responses to the model's input channels; timm then adapts the stem's
    weight and drops a classifier of other classes. `names` are regular expressions for the authors' names, with their
    replacements; `norms` are the batch-norms that follow a stem without a bias. Raises CheckpointError for a misfit.
    """
    target, layers = model.state_dict(), harmonic_layers(model)
    stem = model.pretrained_cfg['first_conv']
    state = {}
    for key, value in fit_keys(unwrap(checkpoint), model, names).items():
        name, _, attribute = key.rpartition('.')
        if attribute == 'dct' and name in layers:
            _check_basis(key, value, layers[name])
            continue
        if attribute == 'weight' and name in layers and layers[name].kept is None:
            count = layers[name].basis.shape[0]  # the authors have (O, I * P, 1, 1) or (O, I, P, 1, 1)
            if value.shape[2:] == (count, 1, 1) or (value.shape[2:] == (1, 1) and value.shape[1] % count == 0):
                value = value.reshape(value.shape[0], -1, count, 1)
        elif attribute == 'weight' and value.ndim == 2 and key in target and value.numel() == target[key].numel():
            value = value.reshape(target[key].shape)  # a linear layer of the authors, a 1 x 1 or 7 x 7 convolution here
        state[key] = value
    if stem in layers:
        _adapt_stem(state, stem, layers[stem], norms, model.pretrained_cfg['input_size'][0])
    check_fit(state, model, model.pretrained_cfg['classifier'], stem)
    return state


def fit_keys(state: StateDict, model: nn.Module, names: dict[str, str]) -> StateDict:
    """Renames the authors' keys by `names`, and drops a prefix such as `model.` if all keys have it and none fits."""
    own, bare = model.state_dict().keys(), state
    while not own & (renamed := rename_keys(bare, names)).keys():
        first = {key.partition('.')[0] for key in bare}
        if len(first) != 1 or not all('.' in key for key in bare):
            return rename_keys(state, names)
        bare = {key.partition('.')[2]: value for key, value in bare.items()}
    return renamed


def rename_keys(state: StateDict, names: dict[str, str]) -> StateDict:
    """Replaces regular expressions in the keys of a state dict, in order."""
    for pattern, replacement in names.items():
        renamed = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        if len(renamed) != len(state):
            raise CheckpointError("the checkpoint has one parameter under two names, the authors' and ours.")
        state = renamed
    return state


def _check_basis(key: str, dct: Tensor, layer: HarmonicLayer) -> None:
    """Compares the authors' (1, P, k, k), or (C * P, 1, k, k) where responses are normalised, with ours."""
    count, side = layer.basis.shape[:2]
    fits = dct.is_floating_point() and dct.numel() and dct.numel() % layer.basis.numel() == 0
    stored = dct.reshape(-1, count, side, side) if fits else None
    if stored is None or not torch.allclose(stored, layer.basis.to(dct).expand_as(stored), rtol=0, atol=1e-6):
        raise CheckpointError(
            f"{key} {tuple(dct.shape)} is not the model's basis {tuple(layer.basis.shape)} "
            f'(level={layer.level}, dc={layer.dc}, {layer.named_basis()}).'
        )


def _adapt_stem(state: StateDict, stem: str, layer: HarmonicLayer, norms: Sequence[str], declared: int) -> None:
    """Adapts the response statistics of a stem, as timm adapts the weight of a convolution.

    Additional channels repeat the source's. One channel responds as all source channels would to the same gray image:
    timm sums the weights, so they are brought to a common scale first, and the next shift absorbs the means.
    """
    if isinstance(layer, HarmonicBlock2d):
        layer.fit_norm(state, f'{stem}.')
    weight, mean, var = (state.get(f'{stem}.{key}') for key in ('weight', 'bn.running_mean', 'bn.running_var'))
    count, channels = layer.basis.shape[0], layer.in_channels
    if weight is None or mean is None or var is None or weight.shape[2:] != (count, 1) or mean.numel() % count:
        return  # check_fit reports these with the other misfits
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
    """Raises CheckpointError, naming the misfits, unless every key and shape of a state dict fits a network.

    Classifiers, and the input channels of stems, may differ: timm adapts them. They are named as in timm's configs.
    Plain filters fit a harmonic convolution, which projects them when it loads them.
    """
    target, layers = model.state_dict(), harmonic_layers(model)
    heads = {f'{name}.{what}' for name in _names_of(classifiers) for what in ('weight', 'bias')}
    first = {f'{name}.weight' for name in _names_of(stems)}
    modules = model.named_modules(remove_duplicate=False)  # a network may use one layer in several places
    sides = {f'{n}.weight': list(m.kernel_size) for n, m in modules if isinstance(m, HarmonicConv2d)}
    basis_keys = {f'{name}{_BASIS}' for name in layers}
    optional = ('num_batches_tracked', _BASIS)
    common = [key for key in state if key in target and key not in basis_keys]

    def plain(key: str) -> bool:
        return key in sides and list(state[key].shape[2:]) == sides[key]

    def misfit(key: str) -> bool:
        ours, theirs = list(target[key].shape), list(state[key].shape)
        if plain(key):
            ours[2:] = theirs[2:]
        if key in first and len(ours) == len(theirs) == 4:
            ours[1] = theirs[1] = 0
        return key not in heads and ours != theirs

    problems = {
        'another basis': [
            f'{key}: {problem}; build the network with that'
            for name, layer in layers.items()
            if (key := f'{name}.weight') in state
            and not plain(key)
            and (problem := layer.other_basis(state.get(f'{name}{_BASIS}')))
        ],
        'missing': [k for k in target if k not in state and k not in heads and not k.endswith(optional)],
        'unexpected': [k for k in state if k not in target and k not in heads and k not in basis_keys],
        'not real numbers': [
            f'{k} in {state[k].dtype}'
            for k in common
            if target[k].is_floating_point() and not state[k].is_floating_point()
        ],
        'wrong shape': [f'{k} {tuple(state[k].shape)} for {tuple(target[k].shape)}' for k in common if misfit(k)],
    }
    if any(problems.values()):
        found = '; '.join(f'{what}: {_shorten(items)}' for what, items in problems.items() if items)
        hints = [hint for telltale, hint in _TELLTALES.items() if any(re.search(telltale, key) for key in state)]
        hints += [_OTHER_FUNCTIONS] * any(key in sides and misfit(key) for key in common)
        hint = ' '.join(['', *hints]) or _hint_of_prefix(state, problems['missing'])
        raise CheckpointError(f'the checkpoint does not fit the model, nothing was loaded. {found}.{hint}')


def sizes_of(state: StateDict, model: nn.Module, missing: str) -> dict[str, int]:
    """Classes and input channels of a state dict, by the first and the last layer of its network."""
    first, last = (next(iter(_names_of(model.pretrained_cfg[key])), '') for key in ('first_conv', 'classifier'))
    stem, classifier = model.get_submodule(first), state.get(f'{last}.weight')
    statistics, weight = state.get(f'{first}.bn.running_mean'), state.get(f'{first}.weight')
    for key, value, least in ((f'{first}.weight', weight, 2), (f'{last}.weight', classifier, 1)):
        if value is not None and value.ndim < least:
            raise CheckpointError(f'{key} of the checkpoint has shape {tuple(value.shape)}.')
    if statistics is not None and hasattr(stem, 'basis'):
        channels = statistics.numel() // stem.basis.shape[0]
    elif not first or isinstance(stem, nn.Linear):  # shapes do not tell
        channels = model.in_chans
    elif weight is not None:
        channels = weight.shape[1] * stem.groups
    else:
        known = [name for name, _ in model.named_parameters() if not name.startswith(f'{last}.')]
        raise CheckpointError(missing.format(f'{first}.weight') + _hint_of_prefix(state, known))
    return dict(num_classes=0 if classifier is None else len(classifier), in_chans=channels)


def _hint_of_prefix(state: StateDict, missing: Sequence[str]) -> str:
    """What to do if a state dict has the missing keys with a prefix, besides other keys; otherwise ''."""
    prefixes = [key.removesuffix(missing[0]) for key in state if missing and key.endswith(f'.{missing[0]}')]
    found = [prefix for prefix in prefixes if all(f'{prefix}{key}' in state for key in missing)]
    place = ' or '.join(map(repr, found))
    return f' The missing keys have the prefix {place}: save the state dict of that module alone.' * bool(found)


def basis_options(state: StateDict) -> dict[str, Any]:
    """Returns the options of a network's basis from its state dict; none if it is the authors'."""
    found = [options_of_code(value) for key, value in state.items() if key.endswith(_BASIS)]
    return found[0] if found and all(options == found[0] for options in found) else {}


def _names_of(names: Names) -> Sequence[str]:
    """The names in an entry of timm's configs, which may be one name, several, or None."""
    return (names,) if isinstance(names, str) else names or ()


def _shorten(items: list[str], limit: int = 5) -> str:
    return ', '.join(items[:limit]) + (f' and {len(items) - limit} more' if len(items) > limit else '')
