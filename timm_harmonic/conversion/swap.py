"""Which convolutions of a network can become harmonic, and the one way in which layers are swapped."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame, PatchEmbed, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models import reparameterize_model
from torch import nn

from ..common import InputError
from ..layers import (
    COMPUTED,
    HarmonicBlock2d,
    HarmonicConv2d,
    HarmonicConv2dSame,
    HarmonicLayer,
    computes_weight,
    conv_args,
    owns_weight,
)

# The harmonic layer that replaces each kind of convolution.
_HARMONIC: dict[type[nn.Module], type[HarmonicConv2d]] = {nn.Conv2d: HarmonicConv2d, Conv2dSame: HarmonicConv2dSame}
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# Classes that wrap a network, and what to pass instead.
_WRAPPED = 'change network.module before you wrap it'
_WRAPPERS = dict(DistributedDataParallel=_WRAPPED, FullyShardedDataParallel=_WRAPPED, DataParallel=_WRAPPED)
_WRAPPERS |= dict(OptimizedModule='change the network before you compile it, or network._orig_mod')
# The attributes in which torch keeps a module's hooks: those of running, then those of saving and loading.
_RUN_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
_STATE_HOOKS = ('_state_dict_hooks', '_state_dict_pre_hooks')
_LOAD_HOOKS = ('_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')
# The methods by which timm fuses a block for inference, see timm.models.reparameterize_model.
_FUSING = ('fuse', 'reparameterize', 'switch_to_deploy')


def harmonic_layers(model: nn.Module) -> dict[str, HarmonicLayer]:
    """Returns the harmonic layers of a network by qualified name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HarmonicLayer)}


def check_unwrapped(model: Any) -> None:
    """Raises TypeError unless `model` is a bare network: a wrapper would keep using the old layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'expected a network (nn.Module), as timm.create_model returns it, got {model!r}.')
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise TypeError(f'{kind} holds the network: {_WRAPPERS[kind]}.')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError('the network is scripted or traced: pass the original network.')


def reasons_to_skip(model: nn.Module) -> dict[str, str]:
    """Explains why each convolution has to stay plain, by name in the network's order; empty if it can be harmonic."""
    check_unwrapped(model)
    patches = {id(module.proj) for module in model.modules() if isinstance(module, PatchEmbed)}
    found = {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner if owner in found else f'{owner}.{key}'.lstrip('.'))
    reasons = {}
    for name, conv in found.items():
        shared = [
            f'shares its {key} with {other}'
            for key, parameter in conv.named_parameters(recurse=False)
            for other in owners[id(parameter)]
            if other != name
        ]
        patch = 'patch embedding: timm resizes its filters to the patches' if id(conv) in patches else ''
        reasons[name] = _reason_to_skip(conv) or patch or next(iter(shared), '')
    return reasons


def _reason_to_skip(conv: nn.Module) -> str:
    kind = type(conv).__name__
    if isinstance(conv, _TRANSPOSED):
        return 'transposed'
    if not isinstance(conv, nn.Conv2d):
        return f'{len(conv.kernel_size)}-D'
    if isinstance(conv.weight, nn.UninitializedParameter):
        return 'has no weights yet (lazy): run an image through the network first'
    height, width = conv.kernel_size
    if height != width:
        return f'not square ({height} x {width})'
    if height == 1:
        return '1 x 1'
    if isinstance(conv, _STANDARDISED):
        return f'its weights are standardised ({kind})'
    if not owns_weight(conv):
        return COMPUTED
    if type(conv) not in _HARMONIC:
        return f'{kind} may compute something other than nn.Conv2d'
    if changed := changes_of(conv):
        return changed
    names = [name for name, _ in (*conv.named_parameters(), *conv.named_buffers()) if name not in ('weight', 'bias')]
    if names or next(conv.children(), None) is not None:
        return 'has parameters, buffers or modules of its own, which would be lost'
    if conv.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f'its weights are {conv.weight.dtype}'
    if conv.weight.shape != (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size):
        return f'its weights {tuple(conv.weight.shape)} contradict its arguments'
    return ''


def changes_of(layer: nn.Module, kinds: Sequence[str] = (*_RUN_HOOKS, *_STATE_HOOKS, *_LOAD_HOOKS)) -> str:
    """Names what replacing a layer would lose: hooks of these kinds or a forward of its own. Empty if nothing.

    Hooks that compute its parameters do not count: fusing takes their result.
    """
    if any(not computes_weight(hook) for kind in kinds for hook in getattr(layer, kind).values()):
        return 'has hooks, which would be lost'
    if {'forward', '_conv_forward'} & vars(layer).keys():
        return 'its forward was replaced, which would be lost'
    return ''


def make_harmonic(
    model: nn.Module,
    levels: Mapping[str, int | None],
    *,
    basis: Mapping[str, Any] | None = None,
    stem: str = '',
    keep_filters: bool = False,
) -> None:
    """Replaces convolutions of a network by harmonic layers, in place: those that `levels` names and that can be.

    Layers take over the filters with `keep_filters`, else they start from their own initialisation, and that named
    `stem` becomes a `HarmonicBlock2d`. `basis` has their normalization and smoothness. Blocks that fuse their own
    convolutions for inference (RepVGG, MobileOne and others) will fuse their harmonic layers first.
    """
    layers: dict[str, nn.Module] = {}
    for name, reason in reasons_to_skip(model).items():
        if reason or name not in levels:
            continue
        conv: Any = model.get_submodule(name)
        kind, options = _HARMONIC[type(conv)], dict(basis or {}, level=levels[name])
        if keep_filters:
            layers[name] = layer = kind.from_conv2d(conv, **options)
            if layer.energy_kept is None and not conv.weight.is_meta:
                whole = float(conv.weight.detach().to('cpu', torch.float64).square().sum())
                layer.energy_kept = float(layer.energies().sum()) / whole if whole else 1.0
        else:
            layers[name] = (HarmonicBlock2d if name == stem else kind)(**conv_args(conv), **options)
    for name in replace_layers(model, layers):
        while name := name.rpartition('.')[0]:
            block = model.get_submodule(name)
            for method in _FUSING:
                if hasattr(block, method) and not isinstance(getattr(block, method), _FuseHarmonicFirst):
                    setattr(block, method, _FuseHarmonicFirst(block, method))


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Replaces layers of a network by name, in place, wherever it uses them. Returns all names replaced."""
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    places = [(n, new[id(m)]) for n, m in model.named_modules(remove_duplicate=False) if id(m) in new]
    for name, layer in places:
        model.set_submodule(name, layer)
    return [name for name, _ in places]


def in_fusing_blocks(model: nn.Module) -> set[str]:
    """Returns the names of harmonic layers in blocks that fuse their own convolutions: these end up dense."""
    blocks = [
        name + '.'
        for name, module in model.named_modules()
        if name and not isinstance(module, HarmonicLayer) and any(hasattr(module, method) for method in _FUSING)
    ]
    return {name for name in harmonic_layers(model) if name.startswith(tuple(blocks))}


class _FuseHarmonicFirst:
    """Fuses harmonic layers before the block's method reads their filters; an object, so that copies get their own."""

    def __init__(self, block: nn.Module, method: str) -> None:
        self.block, self.method = block, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = harmonic_layers(self.block)
        for layer in layers.values():
            layer.form = 'dense'  # the block adds up filters
        replace_layers(self.block, {name: layer.fuse(whole=True) for name, layer in layers.items()})
        del self.block.__dict__[self.method]
        return getattr(self.block, self.method)(*args, **kwargs)


def make_plain(model: nn.Module, forms: Mapping[str, str]) -> nn.Module:
    """Returns a plain copy of a network in evaluation, with harmonic layers fused in these forms (else dense)."""
    plain = copy.deepcopy(model).eval()
    layers, within = harmonic_layers(plain), in_fusing_blocks(plain)
    for name, layer in layers.items():
        layer.form = forms.get(name, 'dense')
        if reason := changes_of(layer, _RUN_HOOKS):
            raise InputError(f'cannot deploy {name or type(layer).__name__}: {reason}. Remove that first.')
    if isinstance(plain, HarmonicLayer):
        return plain.fuse()
    # Not left to timm's function alone: it does not see a layer that one module has under two names.
    replace_layers(plain, {name: layer.fuse() for name, layer in layers.items() if name not in within})
    return reparameterize_model(plain, inplace=True)
