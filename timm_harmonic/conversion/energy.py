"""One harmonic layer at a lower level, and the energy that its filters have at each frequency."""

import copy

import torch
from torch import Tensor, nn

from ..common import InputError
from ..layers import (
    HarmonicBlock2d,
    HarmonicLayer,
    check_level,
    dct_frequencies,
    dct_spectrum,
    format_of,
    full_level,
)

COMPUTED = 'its weight is computed (weight_norm, spectral_norm, pruning or the like): make that permanent first'


def has_own_weight(layer: nn.Module) -> bool:
    """Whether the weight is a parameter, rather than computed from others."""
    return 'weight' in dict(layer.named_parameters(recurse=False))


def energy_of(layer: HarmonicLayer) -> Tensor:
    """Energy of a layer's filters at each kept frequency, summed over all filters: (P,), float64, on the CPU.

    DCT functions are orthogonal, so the energies add up to the squared norm of `filters()`.
    """
    functions = layer.basis.detach().to('cpu', torch.float64).square().sum((1, 2))
    return layer.coefficients().detach().to('cpu', torch.float64).square().sum((0, 1, 3)) * functions


def levels_of(layer: HarmonicLayer) -> range:
    """Levels that a layer can have, from its own downwards."""
    return range(layer.level, 0 if layer.dc else 1, -1)


def functions_at(layer: HarmonicLayer, level: int) -> int:
    """How many functions a layer keeps at a level."""
    return len(dct_frequencies(layer.kernel_size[0], level, layer.dc))


def share_of_energy(energy: Tensor, of: Tensor) -> float:
    """What share one sum of energies is of another. Of none it is all."""
    return float(energy / of) if of != 0 else 1.0


def energy_kept(layer: HarmonicLayer) -> float | None:
    """Share of the filters' energy that truncation left, None if that is unknown, as for loaded coefficients."""
    return 1.0 if layer.level == full_level(layer.kernel_size[0]) else layer.energy_kept


def at_level(layer: HarmonicLayer, level: int | None) -> HarmonicLayer:
    """A copy of a layer without the frequencies i + j >= level. Each filter becomes the nearest in L2.

    A level that is not below the layer's drops nothing. Raises ValueError if level is out of range, nothing would be
    left, the weight is computed, or it is unknown how the layer's normalisation leaves out responses.
    """
    if not has_own_weight(layer):
        raise InputError(f'cannot truncate {layer}: {COMPUTED}.')
    new = copy.deepcopy(layer)
    side = layer.kernel_size[0]
    level = min(layer.level, check_level(level, full_level(side)))
    if level == layer.level:
        return new
    kept, factors = kept_at(layer, level)
    if isinstance(new, HarmonicBlock2d):
        _keep_responses(new, kept)
    weight = (layer.weight.detach()[:, :, kept] * factors.to(layer.basis)[:, None]).to(layer.weight)
    # A clone, because by its strides torch may take the format for another, and then refuses to change it.
    weight = weight.clone(memory_format=format_of(layer.weight))
    new.weight = nn.Parameter(weight, layer.weight.requires_grad)
    new.level, new.milliseconds = level, None
    new.init_non_persistent_buffers()
    before = energy_kept(layer)
    if before is not None and not layer.weight.is_meta:
        new.energy_kept = before * share_of_energy(energy_of(new).sum(), energy_of(layer).sum())
    return new


def kept_at(layer: HarmonicLayer, level: int) -> tuple[list[int], Tensor]:
    """Places of the functions that a layer keeps at a lower level, and what their coefficients are multiplied by.

    The spectrum is relative to the functions that a layer keeps, so the coefficients change with it.
    """
    side, dc = layer.kernel_size[0], layer.dc
    present = dct_frequencies(side, layer.level, dc)
    kept = [present.index(pair) for pair in dct_frequencies(side, level, dc)]
    before, after = (dct_spectrum(side, of, dc, layer.smoothness) for of in (layer.level, level))
    return kept, before[kept] / after


def _keep_responses(block: HarmonicBlock2d, kept: list[int]) -> None:
    """Leaves a block's normalisation with the responses to these functions."""
    bn, count = block.bn, block.weight.shape[2]
    if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) or next(bn.children(), None) is not None:
        raise InputError(f'cannot truncate: it is unknown how {type(bn).__name__} leaves out responses.')
    index = torch.arange(bn.num_features, device=block.weight.device).reshape(-1, count)[:, kept].flatten()
    for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
        if tensor is not None:
            tensor.data = tensor.data[index]
    bn.num_features = len(index)
