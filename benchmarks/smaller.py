"""Smaller networks in other ways, to compare with: pruned channels and narrower networks."""

import copy
from collections.abc import Iterable
from typing import Any

import timm
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from timm_harmonic.small_data.training import NAMED

CHANNELS = (32, 64, 128, 256)  # twice the quickstart's: in narrower layers there is no time to gain
_SHARES = [i / 40 for i in range(2, 41)]  # of the channels


def network(num_classes: int, share: float = 1.0, **options: Any) -> nn.Module:
    """The quickstart's network at twice its width, its stages this much narrower; plain without other options."""
    channels = tuple(max(1, round(c * share)) for c in CHANNELS)
    options = dict(NAMED['harm0'], **options) | dict(channels=channels)
    return timm.create_model('harm_resnet18', num_classes=num_classes, in_chans=1, **options)


def narrower(num_classes: int) -> list[nn.Module]:
    """Such networks from the narrowest to the whole, without training."""
    return [network(num_classes, share) for share in _SHARES]


def pruned(model: nn.Module, images: Tensor, grouped: bool) -> list[nn.Module]:
    """Copies of a plain network that lost channels, from few to all of them left, the same share in each layer.

    By Torch-Pruning (arXiv:2301.12900). Those with the smallest L2 norm go first: of their filters in the first of the
    layers that lose them, or grouped, of everything that goes with a channel.
    """
    import torch_pruning

    reduction = 'mean' if grouped else 'first'
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction=reduction)
    found = []
    for share in _SHARES:
        small = copy.deepcopy(model)
        options = dict(importance=importance, pruning_ratio=1 - share, ignored_layers=[small.get_classifier()])
        torch_pruning.pruner.BasePruner(small, example_inputs=images[:1], **options).step()
        found.append(small.eval())
    return found


def with_statistics(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Re-estimates the batch-norm statistics, as `refit` does for truncated networks."""
    update_bn(batches, model)
    return model.eval()
