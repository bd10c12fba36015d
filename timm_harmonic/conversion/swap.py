"""Which convolutions of a network can be harmonic, and how they are swapped. Every network goes through here."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Conv2dSame, PatchEmbed, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from ..layers import HarmonicBlock2d, HarmonicConv2d, HarmonicConv2dSame, HarmonicLayer, conv_args
from .energy import COMPUTED, energy_of, has_own_weight, share_of_energy

# Which harmonic layer takes the place of which convolution.
_HARMONIC: dict[type[nn.Module], type[HarmonicConv2d]] = {nn.Conv2d: HarmonicConv2d, Conv2dSame: HarmonicConv2dSame}
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# What holds a network, by class, and what to give in its place.
_WRAPPERS = dict(
    DistributedDataParallel='change network.module before you wrap it',
    FullyShardedDataParallel='change the network before you wrap it',
    DataParallel='change network.module before you wrap it',
    OptimizedModule='change the network before you compile it, or network._orig_mod',
)
# Where torch keeps hooks of a module.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
    '_state_dict_hooks',
    '_state_dict_pre_hooks',
    '_load_state_dict_pre_hooks',
    '_load_state_dict_post_hooks',
)
# What timm calls on a block to fuse it for inference, see timm.models.reparameterize_model.
_FUSING = ('fuse', 'reparameterize', 'switch_to_deploy')


def harmonic_layers(model: nn.Module) -> dict[str, HarmonicLayer]:
    """The harmonic layers of a network by qualified name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HarmonicLayer)}


def check_unwrapped(model: Any) -> None:
    """Raises TypeError for what is no network, or holds one: that would go on with the layers of before."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'a network is wanted, an nn.Module as of timm.create_model(...), got {model!r}.')
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise TypeError(f'{kind} holds the network: {_WRAPPERS[kind]}.')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError('the network is scripted or traced: give the one that it was made from.')


def reasons_to_skip(model: nn.Module) -> dict[str, str]:
    """Why convolutions of any kind have to stay plain, by qualified name in the network's order.

    Empty text: the convolution can be harmonic.
    """
    check_unwrapped(model)
    patches = {id(module.proj) for module in model.modules() if isinstance(module, PatchEmbed)}
    found = {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner if owner in found else f'{owner}.{key}'.lstrip('.'))
    reasons = {}
    for name, conv in found.items():
        others = [
            f'{key} with {other}'
            for key, parameter in (('weight', conv.weight), ('bias', conv.bias))
            for other in owners.get(id(parameter), ())
            if other != name
        ]
        reasons[name] = _reason_to_skip(conv)
        if not reasons[name] and id(conv) in patches:
            reasons[name] = 'patch embedding: timm resizes its filters to the size of the patches'
        elif not reasons[name] and others:
            reasons[name] = f'shares its {others[0]}'
    return reasons


def _reason_to_skip(conv: nn.Module) -> str:
    kind = type(conv).__name__
    if isinstance(conv, _TRANSPOSED):
        return 'transposed'
    if not isinstance(conv, nn.Conv2d):
        return f'{len(conv.kernel_size)}-D'
    if isinstance(conv.weight, nn.UninitializedParameter):
        return 'has no weights yet (lazy): run images through the network first'
    height, width = conv.kernel_size
    if height != width:
        return f'not square ({height} x {width})'
    if height == 1:
        return '1 x 1'
    if isinstance(conv, _STANDARDISED):
        return f'its weights are standardised ({kind})'
    if not has_own_weight(conv):
        return COMPUTED
    if type(conv) not in _HARMONIC:
        return f'{kind} may compute something else than nn.Conv2d'
    return changes_of(conv) or _own_state(conv)


def changes_of(layer: nn.Module) -> str:
    """What somebody has put on a layer that another layer in its place would lack; empty if nothing."""
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return 'has hooks, which would be lost'
    if {'forward', '_conv_forward'} & vars(layer).keys():
        return 'its forward was replaced, which would be lost'
    return ''


def _own_state(conv: nn.Module) -> str:
    """Why a convolution's parameters are not those that nn.Conv2d makes; empty if they are."""
    names = [name for name, _ in (*conv.named_parameters(), *conv.named_buffers()) if name not in ('weight', 'bias')]
    if names or next(conv.children(), None) is not None:
        return 'has parameters, buffers or modules of its own, which would be lost'
    if conv.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f'its weights are {conv.weight.dtype}'
    if conv.weight.shape != (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size):
        return f'its weights {tuple(conv.weight.shape)} are not what its arguments say'
    return ''


def make_harmonic(
    model: nn.Module,
    levels: Mapping[str, int | None],
    *,
    basis: Mapping[str, Any] | None = None,
    stem: str = '',
    keep_filters: bool = False,
) -> None:
    """Swaps convolutions of a network for harmonic layers, in place.

    A block that fuses its convolutions for inference by itself (RepVGG, MobileOne and others) fuses the harmonic layers
    in it first.

    Args:
        model: Network; itself not a convolution.
        levels: Level of each convolution to swap, by qualified name. Other names are ignored.
        basis: normalization and smoothness of the layers, where they are not the defaults.
        stem: Name of the convolution that becomes a `HarmonicBlock2d`, if one does.
        keep_filters: Whether layers take over the filters. Otherwise they start from their own initialisation.
    """
    layers: dict[str, nn.Module] = {}
    options: dict[str, Any] = dict(basis or {})
    for name, reason in reasons_to_skip(model).items():
        if reason or name not in levels:
            continue
        conv: Any = model.get_submodule(name)
        options['level'] = levels[name]
        kind = _HARMONIC[type(conv)]
        if keep_filters:
            layers[name] = layer = kind.from_conv2d(conv, **options)
            if not conv.weight.is_meta:
                whole = conv.weight.detach().to('cpu', torch.float64).square().sum()
                layer.energy_kept = share_of_energy(energy_of(layer).sum(), whole)
        else:
            layers[name] = (HarmonicBlock2d if name == stem else kind)(**conv_args(conv), **options)
    blocks = {name.rpartition('.')[0] for name in replace_layers(model, layers)}
    while blocks - {''}:
        for block in (model.get_submodule(name) for name in blocks - {''}):
            for method in _FUSING:
                if hasattr(block, method) and not isinstance(getattr(block, method), _FuseHarmonicFirst):
                    setattr(block, method, _FuseHarmonicFirst(block, method))
        blocks = {name.rpartition('.')[0] for name in blocks}


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Puts layers into a network, in place, wherever it uses those of these names. Returns all names replaced.

    They may be more than were given: a network may use one layer in several places.
    """
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    places = [(n, new[id(m)]) for n, m in model.named_modules(remove_duplicate=False) if id(m) in new]
    for name, layer in places:
        model.set_submodule(name, layer)
    return [name for name, _ in places]


def in_fusing_blocks(model: nn.Module) -> set[str]:
    """Names of the harmonic layers in blocks that fuse their convolutions by themselves: they end up dense."""
    blocks = [
        name + '.'
        for name, module in model.named_modules()
        if name and not isinstance(module, HarmonicLayer) and any(hasattr(module, method) for method in _FUSING)
    ]
    return {name for name in harmonic_layers(model) if name.startswith(tuple(blocks))}


class _FuseHarmonicFirst:
    """Stands for a block's own method that fuses its convolutions: that method reads filters.

    An object rather than a function, so that a copy of the block gets a copy of it.
    """

    def __init__(self, block: nn.Module, method: str) -> None:
        self.block, self.method = block, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = harmonic_layers(self.block)
        for layer in layers.values():
            layer.form = 'dense'  # the block adds up filters
        replace_layers(self.block, {name: layer.fuse() for name, layer in layers.items()})
        del self.block.__dict__[self.method]
        return getattr(self.block, self.method)(*args, **kwargs)
