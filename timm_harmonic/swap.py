"""Which convolutions of a network can be exchanged for harmonic ones, and how they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.layers import Conv2dSame, PatchEmbed, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from .block import HarmonicBlock2d
from .conv import HarmonicConv2d, HarmonicLayer, conv_args
from .same import HarmonicConv2dSame

__all__ = [
    'HARMONIC',
    'Levels',
    'check_channels',
    'expand_levels',
    'harmonic_layers',
    'make_harmonic',
    'replace_layers',
    'swap_convs',
    'why_not',
]

Levels = int | Sequence[int | None] | None

# What takes the place of which convolution.
HARMONIC = {nn.Conv2d: HarmonicConv2d, Conv2dSame: HarmonicConv2dSame}
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# What timm calls on a block to fold it for inference, see timm.models.reparameterize_model.
_FOLDING = ('fuse', 'reparameterize', 'switch_to_deploy')


class _HarmonicFirst:
    """A block's own folding, which reads filters: the harmonic layers in it are folded before.

    An object rather than a function, so that copying the block copies it along.
    """

    def __init__(self, block: nn.Module, method: str) -> None:
        self.block, self.method = block, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replace_layers(self.block, {name: layer.fuse() for name, layer in harmonic_layers(self.block).items()})
        del self.block.__dict__[self.method]
        return getattr(self.block, self.method)(*args, **kwargs)


def harmonic_layers(model: nn.Module) -> dict[str, HarmonicLayer]:
    """The harmonic layers of a network by qualified name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HarmonicLayer)}


def why_not(model: nn.Module) -> dict[str, str]:
    """Why convolutions cannot be exchanged for harmonic ones.

    Args:
        model: Network.

    Returns:
        A reason for every convolution of any kind, by qualified name in the network's order; empty if nothing speaks
        against it.
    """
    patches = {id(module.proj) for module in model.modules() if isinstance(module, PatchEmbed)}
    found = {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
    owners: dict[int, list[str]] = {}
    for name, conv in found.items():
        owners.setdefault(id(conv.weight), []).append(name)
    reasons = {}
    for name, conv in found.items():
        others = [other for other in owners[id(conv.weight)] if other != name]
        reasons[name] = _why_not(conv)
        if not reasons[name] and id(conv) in patches:
            reasons[name] = 'patch embedding, whose filters timm resamples to the size of the patches'
        elif not reasons[name] and others:
            reasons[name] = f'shares its weight with {others[0]}'
    return reasons


def _why_not(conv: nn.Module) -> str:
    kind = type(conv).__name__
    if isinstance(conv, _TRANSPOSED):
        return 'transposed'
    if not isinstance(conv, nn.Conv2d):
        return f'{len(conv.kernel_size)}-D'
    height, width = conv.kernel_size
    if height != width:
        return f'not square ({height} x {width})'
    if height == 1:
        return '1 x 1'
    if isinstance(conv, _STANDARDISED):
        return f'its weights are standardised ({kind})'
    if 'weight' not in dict(conv.named_parameters(recurse=False)):
        return 'its weight is computed (weight_norm, spectral_norm, pruning or the like): make that permanent first'
    if type(conv) not in HARMONIC:
        return f'{kind} may compute something else than nn.Conv2d'
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks:
        return 'has hooks, which would be lost'
    return ''


def swap_convs(model: nn.Module, make: Callable[[str, nn.Conv2d], nn.Module | None]) -> None:
    """Replaces convolutions of a network, in place.

    Every convolution that `why_not` has nothing against is offered. A block that folds its convolutions by itself for
    inference (RepVGG, MobileOne and others) folds the harmonic layers in it first.

    Args:
        model: Network; itself not a convolution.
        make: Called with a convolution's qualified name and the convolution; returns its replacement, or None
            to leave it.
    """
    layers = {}
    for name, reason in why_not(model).items():
        if not reason:
            layer = make(name, model.get_submodule(name))
            if layer is not None:
                layers[name] = layer
    blocks = {name.rpartition('.')[0] for name in replace_layers(model, layers)}
    while blocks - {''}:
        for block in (model.get_submodule(name) for name in blocks - {''}):
            for method in _FOLDING:
                if hasattr(block, method) and not isinstance(getattr(block, method), _HarmonicFirst):
                    setattr(block, method, _HarmonicFirst(block, method))
        blocks = {name.rpartition('.')[0] for name in blocks}


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Puts layers into a network, in place, wherever it uses what is there now.

    Args:
        model: Network.
        layers: New layers by qualified name.

    Returns:
        All names under which something was replaced: a network may use one layer in several places.
    """
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    places = [(n, new[id(m)]) for n, m in model.named_modules(remove_duplicate=False) if id(m) in new]
    for name, layer in places:
        model.set_submodule(name, layer)
    return [name for name, _ in places]


def make_harmonic(
    model: nn.Module,
    root: str,
    level_of: Callable[[str], int | None],
    *,
    within: str = '',
    harmonic_stem: bool = True,
    harmonic_blocks: bool = True,
    normalization: str = 'l1',
) -> None:
    """Makes a newly built network harmonic, in place: the replaced layers start from their own initialisation.

    Args:
        model: Network.
        root: Name of its first convolution, which becomes a `HarmonicBlock2d`.
        level_of: Level of the layer that replaces the convolution of this name.
        within: Beginning of the names of the convolutions that are considered.
        harmonic_stem: Whether the root is replaced.
        harmonic_blocks: Whether the other convolutions are replaced, by `HarmonicConv2d`.
        normalization: 'l1' or 'ortho'.
    """

    def make(name: str, conv: nn.Conv2d) -> nn.Module | None:
        wanted = harmonic_stem if name == root else harmonic_blocks
        if not wanted or not name.startswith(within):
            return None
        layer = HarmonicBlock2d if name == root else HARMONIC[type(conv)]
        return layer(**conv_args(conv), level=level_of(name), normalization=normalization)

    swap_convs(model, make)


def expand_levels(levels: Levels, stages: int) -> tuple[int | None, ...]:
    """Levels of all stages from what the user gave: None, one integer for all, or one entry a stage.

    Raises:
        TypeError: If levels, or an entry, is neither an integer nor None.
        ValueError: If the number of entries is not the number of stages.
    """
    if levels is None or (isinstance(levels, int) and not isinstance(levels, bool)):
        return (levels,) * stages
    if isinstance(levels, (str, bool)) or not isinstance(levels, Sequence):
        raise TypeError(f'levels must be None, an integer, or {stages} of (integer or None), got {levels!r}.')
    if len(levels) != stages:
        raise ValueError(f'levels must have {stages} entries, one a stage, got {len(levels)}: {levels!r}.')
    for level in levels:
        if level is not None and (not isinstance(level, int) or isinstance(level, bool)):
            raise TypeError(f'each of levels must be an integer or None, got {level!r} in {levels!r}.')
    return tuple(levels)


def check_channels(num_classes: int, in_chans: int) -> None:
    """Refuses sizes that torch would accept here and fail on later.

    Raises:
        ValueError: If num_classes < 0 or in_chans < 1.
    """
    if num_classes < 0:
        raise ValueError(f'num_classes must be 0 (no classifier) or more, got {num_classes}.')
    if in_chans < 1:
        raise ValueError(f'in_chans must be at least 1, got {in_chans}.')
