"""Channels pruned by Torch-Pruning (arXiv:2301.12900) to a budget of multiply-adds, and which of them are left."""

import copy
import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_harmonic.conversion.costs import count_macs

from .least_squares import Wanted

__all__ = ['SETTINGS', 'Pruned', 'pruned_to']

# What ranks channels, and whether all layers lose the same share of them.
SETTINGS = [
    (importance, alike)
    for importance in ('magnitude', 'group norm', 'Taylor')
    for alike in ('same share', 'global')
]  # fmt: skip
_MULTIPLE, _MOST = 8, 0.9  # channels left, and the largest share that a layer may lose
_STEPS = 8  # of the search for the share that meets the budget
_GRADIENT = 16  # images


class Pruned(NamedTuple):
    """A network without some of its channels, and what its convolutions should compute."""

    model: nn.Module
    wanted: Wanted


def pruned_to(
    model: nn.Module, setting: tuple[str, str], parts: Sequence[Tensor], share: float, last: nn.Module
) -> Pruned:
    """Prunes the largest network that takes a share of the multiply-adds. The last layer keeps its outputs.

    Channels go by the norm of their filters, of all weights that go with them, or by the change of the outputs' energy
    that a Taylor series predicts for the images. Convolutions have biases, and come in the order in which they run.
    """
    images, most = parts[0][:1], share * count_macs(model, parts[0][:1])
    name = next(name for name, module in model.named_modules() if module is last)
    marked = copy.deepcopy(model)
    if setting[0] == 'Taylor':
        for image in parts[0][:_GRADIENT].split(1):
            marked(image).square().sum().backward()
    for conv in _convolutions(marked).values():
        conv.bias.data = torch.arange(len(conv.bias)).to(conv.bias)  # which channels are left: no norm counts it
    low, high, best = 0.0, 1.0, None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _pruned(marked, setting, middle, images, name)
        low, high, best = (low, middle, found) if count_macs(found, images) <= most else (middle, high, best)
    if best is None:
        raise ValueError(f'no pruned network takes {share:g} of the multiply-adds')
    left = {name: conv.bias.detach().long() for name, conv in _convolutions(best).items()}
    for name, conv in _convolutions(best).items():
        bias: Any = model.get_submodule(name).bias
        conv.bias.data = bias.detach()[left[name]].clone()
    best.zero_grad()
    return Pruned(best, {name: (name, channels) for name, channels in left.items()})


def _convolutions(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def _pruned(marked: nn.Module, setting: tuple[str, str], share: float, images: Tensor, last: str) -> nn.Module:
    import torch_pruning

    ranking = torch_pruning.importance
    small, (importance, alike) = copy.deepcopy(marked), setting
    for mine, its in zip(small.parameters(), marked.parameters(), strict=True):
        mine.grad = its.grad  # which a copy lacks
    options = dict(
        importance=dict(
            magnitude=lambda: ranking.GroupMagnitudeImportance(p=2, group_reduction='first'),
            **{'group norm': lambda: ranking.GroupMagnitudeImportance(p=2)},
            Taylor=lambda: ranking.GroupTaylorImportance(),
        )[importance](),
        pruning_ratio=share,
        global_pruning=alike == 'global',
        max_pruning_ratio=_MOST,
        round_to=_MULTIPLE,
        ignored_layers=[small.get_submodule(last)],
    )
    torch_pruning.pruner.BasePruner(small, images, **options).step()
    gc.collect()  # its graphs refer to each other
    return small.eval()
