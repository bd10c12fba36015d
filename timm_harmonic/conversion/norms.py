"""The batch normalisations of a network: which there are, behind which layers, and their statistics."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import HarmonicBlock2d
from .running import evaluating, watching

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def norms_of(model: nn.Module) -> list[Any]:
    """The batch normalisations of a network whose statistics follow the data, but for those inside harmonic blocks.

    The statistics of a harmonic block's responses do not change with the levels. A momentum of 0 freezes them.
    """
    inside = {id(module.bn) for module in model.modules() if isinstance(module, HarmonicBlock2d)}
    norms = [module for module in model.modules() if isinstance(module, _NORMS) and id(module) not in inside]
    return [norm for norm in norms if norm.track_running_stats and norm.momentum != 0]


def norms_behind(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """Modules with a running mean that take the very output of a harmonic layer, by the layer's name."""
    found: dict[str, nn.Module] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        outputs[name] = output

    def follow(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.update({name: module for name, output in outputs.items() if inputs and inputs[0] is output})

    norms = [m for m in model.modules() if isinstance(getattr(m, 'running_mean', None), Tensor)]
    handles = [norm.register_forward_pre_hook(follow) for norm in norms]
    try:
        with watching(model, note), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def by_batch(model: nn.Module) -> Iterator[None]:
    """Has a network normalise by the statistics of each batch, and leave its running ones as they are."""
    norms = norms_of(model)
    before = [(norm.training, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for norm, (training, momentum, count) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
            norm.num_batches_tracked.copy_(count)


def estimate_statistics(model: nn.Module, parts: Sequence[Tensor]) -> None:
    """Estimates the statistics of a network's batch normalisation anew, as their mean over batches, in place.

    As torch.optim.swa_utils.update_bn does, but nothing else is in training: no dropout. What no image reaches in
    evaluation, as a head that only training has, keeps its statistics.
    """
    norms = norms_of(model)
    before = [(norm.training, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None
        try:
            for part in parts if norms else ():
                model(part)
        finally:
            for norm, (training, momentum, state) in zip(norms, before, strict=True):
                norm.training, norm.momentum = training, momentum
                if not norm.num_batches_tracked:
                    norm.load_state_dict(state)
