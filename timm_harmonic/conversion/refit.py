"""Refitting a truncated network to the complete one, on images without labels and without a gradient."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common import InputError
from ..common.progress import progress
from ..layers import HarmonicLayer, dct_frequencies, full_level
from .energy import COMPUTED, has_own_weight, levels_of
from .losses import Losses, losses_by_filters
from .moments import Moments, Samples, by_group, coefficients_of
from .norms import by_batch, estimate_statistics, norms_behind
from .running import Use, check_changeable, evaluating, images_in, trainable, uses_of, watching
from .swap import check_unwrapped, harmonic_layers

_BYTES = 2**31  # of images that are kept
_SUMS = 2**30  # bytes of sums that are there at a time, where levels are compared
_BATCH = 32  # images that run through a network together
_HELD_OUT = 4  # one of so many images judges
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e9)  # the last leaves the coefficients as they are
_RIDGE = 1e-2  # where levels are compared


@trainable
def refit(
    model: nn.Module, small: nn.Module, data: Iterable[Any], *, batches: int | None = None, inplace: bool = False
) -> nn.Module:
    """Fits the coefficients of a truncated network to what the complete one computes, on unlabelled images.

    Layer after layer, in the order in which they run: least squares of the complete network's output of the layer on
    the responses that the truncated layer keeps, to the input that it has in the truncated network. So a layer makes up
    for what those before it left out. A ridge pulls to the present coefficients. How strong it is, and whether a layer
    is changed at all, every fourth image decides. The last fit is to all images, unless that is worse for those. Then
    the statistics of batch normalisation are estimated anew, where the network has any. On the images that decide, what
    comes out is never further from the complete network's output than the truncated network is: it is the best of that,
    of it with new statistics, and of the refitted one.

    The images are kept in memory, 2 GiB at most. Layers take their sums of products one after the other, float64: for F
    features and o outputs of a group 16 (F + o)^2 bytes, 196 MiB for 512 channels at level 3 of 3 x 3, and about as
    much again while they are added up and solved.

    Args:
        model: Complete network. Layers that are harmonic in `small` may be plain in it.
        small: The same network, truncated.
        data: Batches of images (B, C, H, W), alone or first in a tuple or list. Labels are not used.
        batches: How many are read at most. Data without an end need it.
        inplace: Whether to change `small` itself rather than a copy.

    Returns:
        The refitted network.

    Raises:
        ValueError: If the networks do not fit together, there are fewer than eight images or more than 2 GiB of them,
            a batch is empty or not finite, or what a layer computes on it is not. Nothing is changed then.
        TypeError: If one of them is no network, or data are no batches.
    """
    _check_pair(model, small)
    if inplace:
        check_changeable(small)
    parts = data if isinstance(data, Parts) else read_images(data, next(small.parameters()), batches)
    _check_outputs(model, small, parts[0])
    fitted, counted = copy.deepcopy(small), copy.deepcopy(small)
    with torch.no_grad(), evaluating(model), evaluating(small), evaluating(fitted):
        norms, uses = norms_behind(fitted, parts[0]), uses_of(fitted, parts[0])
        layers = harmonic_layers(fitted)
        lowered = [name for name in uses if uses[name] and layers[name].level < full_level(layers[name].kernel_size[0])]
        for name in progress(lowered, desc='refit', unit='layer', leave=False):
            _refit_layer(model, fitted, name, uses[name], parts, norms.get(name))
        for network in (fitted, counted):
            estimate_statistics(network, parts)
        errors = {network: output_error(model, network, parts) for network in (small, counted, fitted)}
        if not math.isfinite(errors[small]):
            raise InputError('the networks give values that are not finite on the data.')
        best = min(errors, key=lambda network: math.inf if math.isnan(errors[network]) else errors[network])
    if not inplace:
        return copy.deepcopy(small) if best is small else best
    if best is not small:
        small.load_state_dict(best.state_dict())
    return small


class Parts(list[Tensor]):
    """Images that were read by `read_images`."""


def read_images(data: Iterable[Any], like: Tensor, batches: int | None = None) -> Parts:
    """All images of data, see `images_in`, in parts of about 32 of one size.

    Raises ValueError if there are fewer than eight, more than 2 GiB, or a single one of its size.
    """
    read: list[Tensor] = []
    total = 0
    for images in images_in(data, like, batches):
        read.append(images)
        total += images.nbytes
        if total > _BYTES:
            raise InputError(f'data have more than {_BYTES / 2**30:g} GiB of images, which are kept: pass batches.')
    if (count := sum(map(len, read))) < 2 * _HELD_OUT:
        raise InputError(f'refitting needs at least {2 * _HELD_OUT} images, data have {count}.')
    parts = Parts()
    for size in dict.fromkeys(images.shape[1:] for images in read):
        alike = torch.cat([images for images in read if images.shape[1:] == size])
        if len(alike) == 1:
            raise InputError(f'data have a single image of size {tuple(size)}: refitting needs two at least of each.')
        # In any order, but always the same one: folders are read class by class, and a batch is to be like all images.
        order = torch.randperm(len(alike), generator=torch.Generator().manual_seed(0))
        parts += alike[order.to(alike.device)].tensor_split(-(-len(alike) // _BATCH))
    return parts


def losses_by_refit(model: nn.Module, parts: Sequence[Tensor]) -> Losses:
    """Share of each harmonic layer's output that refitting it leaves over at each level, on images that judge.

    Every layer has its complete input. The mean squared error is divided by the output's variance, and averaged over
    output channels. One run gives the sums for all levels of a layer; there are as many runs as the sums need to stay
    below 1 GiB, or to hold one layer. `parts` are of `read_images`. A layer that no image reaches is judged by its
    filters.
    """
    layers, found = harmonic_layers(model), losses_by_filters(model)
    with torch.no_grad(), evaluating(model):
        uses, norms = uses_of(model, parts[0]), norms_behind(model, parts[0])
        for names in _batches_of_layers({name: layers[name] for name in uses if uses[name]}):
            samples = {name: Samples(layers[name], _positions(uses[name], parts)) for name in names}
            for part, judges in _with_judges(parts):
                with watching(model, partial(_add, samples, judges), names):
                    model(part)
            for name in names:
                samples[name].check(name)
                intercept = layers[name].bias is not None or name in norms
                found[name] = _losses_of(layers[name], samples.pop(name), intercept)
    return found


def _add(
    samples: dict[str, Samples], judges: Tensor, name: str, layer: HarmonicLayer, x: Tensor, output: Tensor
) -> None:
    samples[name].add(x, output, judges)


def _losses_of(layer: HarmonicLayer, samples: Samples, intercept: bool) -> dict[int, float]:
    side, channels = layer.kernel_size[0], layer.in_channels // layer.groups
    present = dct_frequencies(side, layer.level, layer.dc)
    lost = {layer.level: 0.0}
    for level in levels_of(layer)[1:]:
        kept = torch.tensor([present.index(pair) for pair in dct_frequencies(side, level, layer.dc)])
        places = (len(present) * torch.arange(channels)[:, None] + kept).flatten()
        start = by_group(layer.weight[:, :, kept.to(layer.weight.device)], layer.groups)
        fit, judge = samples.fit.of(places), samples.judge.of(places)
        lost[level] = min(1.0, _relative(judge, *fit.solve(start, _RIDGE, intercept)))
    return lost


def _batches_of_layers(layers: dict[str, HarmonicLayer]) -> Iterator[list[str]]:
    """Names of layers whose sums are there together."""
    names: list[str] = []
    total = 0
    for name, layer in layers.items():
        features, outputs = (channels // layer.groups for channels in (layer.in_channels, layer.out_channels))
        size = 2 * 8 * layer.groups * (features * len(layer.basis) + outputs + 1) ** 2
        if names and total + size > _SUMS:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _refit_layer(
    model: nn.Module, small: nn.Module, name: str, uses: Sequence[Use], parts: Sequence[Tensor], norm: Any
) -> None:
    """Fits one layer of a truncated network, in place. `norm` is what normalises its output, if anything does."""
    layer: Any = small.get_submodule(name)
    samples = Samples(layer, _positions(uses, parts))
    for part, judges in _with_judges(parts):
        wanted = [output for _, output in _run_to(model, name, len(uses), part)]
        with by_batch(small):
            given = [x for x, _ in _run_to(small, name, len(uses), part)]
        for x, output in zip(given, wanted, strict=True):
            samples.add(x, output, judges)
    samples.check(name)
    start = by_group(layer.weight, layer.groups)
    nothing = start.new_zeros(layer.groups, start.shape[2])
    present = nothing if layer.bias is None else layer.bias.to(start).reshape(nothing.shape)
    intercept = layer.bias is not None or norm is not None
    errors = {ridge: _relative(samples.judge, *samples.fit.solve(start, ridge, intercept)) for ridge in _RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= _relative(samples.judge, start, present):
        return
    # By all images, unless that is worse for those that judge.
    solved = [moments.solve(start, best, intercept) for moments in (samples.fit.plus(samples.judge), samples.fit)]
    weight, bias = min(solved, key=lambda of: _relative(samples.judge, *of))
    layer.weight.copy_(coefficients_of(weight, layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(bias.flatten())
    elif norm is not None:
        norm.running_mean.sub_(bias.flatten().to(norm.running_mean))
    layer.energy_kept = None  # the filters are no longer those of the complete network


def _positions(uses: Sequence[Use], parts: Sequence[Tensor]) -> int:
    """Positions of a layer's output over all images, by its uses for the first part of them."""
    return sum(use.positions for use in uses) * sum(map(len, parts)) // len(parts[0])


def _relative(judge: Moments, weight: Tensor, bias: Tensor) -> float:
    """Error over the outputs' variance, mean over the outputs that vary."""
    variance = judge.variance()
    alive = variance > 1e-12 * variance.max()
    return float((judge.error(weight, bias)[alive] / variance[alive]).mean()) if alive.any() else 0.0


def _with_judges(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of the images, and which of their images judge (B,)."""
    first = 0
    for part in parts:
        yield part, (first + torch.arange(len(part))) % _HELD_OUT == _HELD_OUT - 1
        first += len(part)


class _Enough(Exception):
    """Raised to end a run whose rest is not needed."""


def _run_to(model: nn.Module, name: str, uses: int, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Runs images through a network up to a module, which is used so many times: its inputs and outputs."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        # What follows may work in place.
        found.append((x.clone() if uses > 1 else x, output.clone()))
        if len(found) == uses:
            raise _Enough

    with watching(model, note, [name]), suppress(_Enough):
        model(images)
    return found


def output_error(model: nn.Module, small: nn.Module, parts: Sequence[Tensor]) -> float:
    """Squared error of a network's outputs on the images that judge, over the variance of another network's.

    The variance is that within each part.
    """
    error, variance = 0.0, 0.0
    with torch.no_grad(), evaluating(model), evaluating(small):
        for part, judges in _with_judges(parts):
            images = part[judges.to(part.device)]
            if not len(images):  # of a batch that is smaller than four
                continue
            for wanted, found in zip(_outputs(model, images), _outputs(small, images), strict=True):
                error += float((found.double() - wanted.double()).square().sum())
                variance += float((wanted.double() - wanted.double().mean()).square().sum())
    return error / max(variance, torch.finfo(torch.float64).tiny)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The tensors of numbers that a network returns."""
    return [x for x in tree_leaves(model(images)) if isinstance(x, Tensor) and x.is_floating_point()]


def _check_outputs(model: nn.Module, small: nn.Module, images: Tensor) -> None:
    """Raises ValueError if the networks' outputs cannot be compared."""
    with torch.no_grad(), evaluating(model), evaluating(small):
        wanted, found = _outputs(model, images), _outputs(small, images)
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (wanted, found)]
    if not wanted or shapes[0] != shapes[1]:
        raise InputError(f'the networks must return tensors of the same shapes, got {shapes[0]} and {shapes[1]}.')
    if not all(x.isfinite().all() for x in wanted + found):
        raise InputError('the networks give values that are not finite on the data.')


def _check_pair(model: nn.Module, small: nn.Module) -> None:
    for network in (model, small):
        check_unwrapped(network)
    layers = harmonic_layers(small)
    if not layers:
        raise InputError(f'{type(small).__name__} has no harmonic layers: nothing can be refitted.')
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        other: Any = modules.get(name)
        alike = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'dilation', 'groups')
        if other is None or any(getattr(other, key, None) != getattr(layer, key) for key in alike):
            raise InputError(
                f'{name} of the truncated network is not in the complete one: it must be the same network.'
            )
        if isinstance(other, HarmonicLayer) and other.level < layer.level:
            raise InputError(f'{name} of the complete network keeps less than that of the truncated one: swap them.')
        if not has_own_weight(layer):
            raise InputError(f'cannot refit {name}: {COMPUTED}.')
    first, second = (next(network.parameters()) for network in (model, small))
    if (first.device, first.dtype) != (second.device, second.dtype):
        raise InputError(
            f'the networks must be on one device and of one dtype, got {first.dtype} on {first.device} and '
            f'{second.dtype} on {second.device}.'
        )
