"""From plain networks to harmonic ones: which convolutions are exchanged, by what, and the options that say so."""

from collections.abc import Callable, Sequence

from torch import nn

from .block import HarmonicBlock2d
from .conv import HarmonicConv2d, conv_args

__all__ = ['check_channels', 'expand_levels', 'make_harmonic', 'swap_convs']

Levels = int | Sequence[int | None] | None


def swap_convs(model: nn.Module, make: Callable[[str, nn.Conv2d], nn.Module | None]) -> None:
    """Replaces convolutions of a network, in place.

    Every plain nn.Conv2d with square filters larger than 1 x 1 is offered. Subclasses are not: they change the
    arithmetic (standardised weights, dynamic padding).

    Args:
        model: Network; itself not a convolution.
        make: Called with a convolution's qualified name and the convolution; returns its replacement, or None
            to leave it.
    """
    for name, conv in list(model.named_modules()):
        if type(conv) is nn.Conv2d and conv.kernel_size[0] == conv.kernel_size[1] > 1:
            layer = make(name, conv)
            if layer is not None:
                model.set_submodule(name, layer)


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
        layer = HarmonicBlock2d if name == root else HarmonicConv2d
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
