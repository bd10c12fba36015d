"""Refitting a truncated network to the complete one by least squares, on unlabelled images and without a gradient."""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..common import InputError
from ..common.device import float64_device
from ..common.progress import progress
from ..layers import COMPUTED, HarmonicBlock2d, HarmonicLayer, owns_weight
from .running import HELD_OUT, Use, check_changeable, evaluating, read_images, suspended, trainable, uses_of, watching
from .swap import check_unwrapped, harmonic_layers

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e9)  # the last keeps the coefficients
_RIDGE = 1e-2  # while levels are compared
_ELEMENTS = 2**24  # of features held at a time: 128 MiB in float64
_SUMS = 2**27  # of a layer at most: 1 GiB in float64, for 10,000 features without groups
_BLOCK = 640  # rows of the symmetric sums that are added together
# Random positions suffice: this many for each feature of a group, and at least this many for a group, of this many
# images or bytes of images at least.
POSITIONS, FEWEST, _IMAGES, _BYTES = 64, 2**14, 64, 2**26
_NOT_FINITE = 'the networks give values that are not finite on the data.'
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Moments:
    """Sums of products of F features, o outputs and 1 by group of a layer: (groups, F + o + 1, F + o + 1), float64.

    Least squares needs nothing else, whatever the number of images.
    """

    def __init__(self, features: int, sums: Tensor) -> None:
        self.features, self._sums = features, sums
        self._blocks: list[slice] = []  # whose lower half is old, until `sums` is read

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Adds rows: features (groups, N, F) and outputs (groups, N, o) in float64."""
        both = torch.cat([features, outputs, torch.ones_like(outputs[..., :1])], 2)
        self._blocks = [slice(first, first + _BLOCK) for first in range(0, both.shape[2], _BLOCK)]
        for block in self._blocks:
            self._sums[:, block, block.start :].baddbmm_(both[:, :, block].mT, both[:, :, block.start :])

    @property
    def sums(self) -> Tensor:
        while self._blocks:
            block = self._blocks.pop()
            self._sums[:, block.stop :, block] = self._sums[:, block, block.stop :].mT
        return self._sums

    @property
    def rows(self) -> float:
        return float(self.sums[0, -1, -1])

    def plus(self, other: 'Moments') -> 'Moments':
        """Returns the sums over the rows of both."""
        return Moments(self.features, self.sums + other.sums)

    def of(self, kept: Tensor) -> 'Moments':
        """Returns the sums for some of the features, by their places."""
        places = torch.cat([kept, torch.arange(self.features, self.sums.shape[1])]).to(self.sums.device)
        return Moments(len(kept), self.sums[:, places][:, :, places])

    def mixed(self, mixtures: Tensor) -> 'Moments':
        """Returns the sums with mixtures (M, C) of the channels in the features (C * P), for a layer without groups."""

        def rows(sums: Tensor) -> Tensor:
            features = mixtures @ sums[: self.features].reshape(mixtures.shape[1], -1)
            return torch.cat([features.view(-1, sums.shape[1]), sums[self.features :]])

        count = len(mixtures) * self.features // mixtures.shape[1]
        return Moments(count, rows(rows(self.sums[0]).t())[None])

    def variance(self) -> Tensor:
        """Returns the variance of the outputs, (groups, o)."""
        means = self.sums[:, self.features : -1, -1] / self.rows
        squares = self.sums.diagonal(dim1=1, dim2=2)[:, self.features : -1] / self.rows
        return (squares - means.square()).clamp_min(0)

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Returns the mean squared error (groups, o) of weights (groups, F, o) and biases (groups, o)."""
        identity = torch.eye(weight.shape[2]).to(weight).expand(len(weight), -1, -1)
        residual = torch.cat([-weight, identity, -bias[:, None]], 1)
        return (residual * (self.sums @ residual)).sum(1).clamp_min(0) / self.rows

    def products(self, intercept: bool) -> tuple[Tensor, Tensor]:
        """Returns sums of products (groups, F, F) of features and (groups, F, o) with outputs, less those of means."""
        both = self.sums[:, : self.features, :-1].clone()
        if intercept:
            both -= self.sums[:, : self.features, -1:] @ self.sums[:, :-1, -1:].transpose(1, 2) / self.rows
        return both[..., : self.features], both[..., self.features :]

    def solve(self, start: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """Solves least squares for weights (groups, F, o) and biases (groups, o), which are 0 without intercept.

        The ridge pulls the weights towards `start`, by this share of each feature's energy, or of the mean energy if
        that is more: large weights of features that are rarely active would not survive 8 bits.
        """
        ff, fy = self.products(intercept)
        f, y = self.sums[:, : self.features, -1:], self.sums[:, self.features : -1, -1:]
        energy = ff.diagonal(dim1=1, dim2=2)
        energy = energy.maximum(energy.mean(1, keepdim=True)) + torch.finfo(ff.dtype).tiny
        change = fy - ff @ start
        ff.diagonal(dim1=1, dim2=2).add_(ridge * energy)
        weight = start + torch.cholesky_solve(change, torch.linalg.cholesky(ff))
        bias = (y - weight.transpose(1, 2) @ f)[..., 0] / self.rows
        return weight, bias if intercept else torch.zeros_like(bias)


def rows_of(values: Tensor, groups: int) -> Tensor:
    """Reshapes channels (B, groups * c, N) into rows (groups, B * N, c) in float64."""
    values = values.to(float64_device(values.device), torch.float64)
    return values.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def by_group(weight: Tensor, groups: int) -> Tensor:
    """Reshapes coefficients (O, C / groups, P, 1) into weights (groups, F, o) in float64."""
    rows = weight.detach().to(float64_device(weight.device), torch.float64).flatten(1)
    return rows.unflatten(0, (groups, -1)).transpose(1, 2)


class Samples:
    """Moments of a layer on the images that it is fitted to and, apart, on the held-out ones.

    A random share of the positions of its output counts. The layer computes in float32 at least.
    """

    def __init__(self, layer: HarmonicLayer, share: float) -> None:
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.layer: Any = layer if dtype == layer.weight.dtype else copy.deepcopy(layer).to(dtype)
        count = layer.weight[0].numel()  # what one output mixes
        size = count + layer.out_channels // layer.groups + 1
        sums = torch.zeros(layer.groups, size, size, dtype=torch.float64, device=float64_device(layer.weight.device))
        self.fit, self.test = Moments(count, sums), Moments(count, sums.clone())
        self.share = share
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, outputs: Tensor, held_out: Tensor) -> None:
        """Adds inputs (B, C, H, W) and outputs (B, O, H', W'); `held_out` (B,) marks the held-out images."""
        number = outputs[0, 0].numel()
        size = number * self.layer.groups * self.fit.features
        for part in torch.arange(len(x)).split(max(1, _ELEMENTS // size)):
            features = self.layer.features(x[part].to(self.layer.weight.dtype)).flatten(2)
            wanted = outputs[part].flatten(2)
            places = torch.randperm(number, generator=self.generator)[: max(1, round(self.share * number))]
            for moments, chosen in ((self.fit, ~held_out[part]), (self.test, held_out[part])):
                if chosen.any():
                    both = (v[chosen][:, :, places.to(v.device)] for v in (features, wanted))
                    moments.add(*(rows_of(values, self.layer.groups) for values in both))


@trainable
def refit(
    model: nn.Module, small: nn.Module, data: Iterable[Any], *, batches: int | None = None, inplace: bool = False
) -> nn.Module:
    """Fits the coefficients of a truncated network to what the complete one computes, on unlabelled images.

    It fits layer after layer, in the order in which they run: least squares of the complete network's output of the
    layer on the responses that the truncated layer keeps, for its input in the truncated network. Each layer thus
    compensates for those before it. A ridge pulls towards the present coefficients. Every fourth image is held out to
    choose the ridge, and whether a layer changes at all, and then judges four networks: the truncated and the refitted
    one, each as it is and with statistics of batch normalisation re-estimated. The winner is fitted to all images. On
    other images it is likely, not certain, that the result is nearer to the complete network, too.

    Both networks run about once. Images stay in memory, 2 GiB at most, and what the networks hold between two layers
    for the first 64 MiB of them: limit `batches` if that is too much. One layer at a time needs sums of 16 (F + o)^2
    bytes for F features and o outputs of a group, and as much to solve them; with more than 2 GiB of sums it stays.

    Args:
        model: Complete network. Layers that are harmonic in `small` may be plain in it.
        small: The same network, truncated.
        data: Batches of images (B, C, H, W), alone or first in a tuple or list. Labels are not used.
        batches: The most batches to read. Endless data need it.
        inplace: Whether to change `small` itself rather than a copy.

    Returns:
        The refitted network.

    Raises:
        InputError: If the networks do not match, `data` hold fewer than eight images or more than 2 GiB of them, a
            batch is empty or not finite, or a layer's output on it is not. Nothing has changed then.
        TypeError: If an argument is not a network, or `data` are not batches.
    """
    for network in (model, small):
        check_unwrapped(network)
    layers = harmonic_layers(small)
    if not layers:
        raise InputError(f'{type(small).__name__} has no harmonic layers: nothing can be refitted.')
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        other: Any = modules.get(name)
        alike = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'dilation', 'groups')
        if any(getattr(other, key, None) != getattr(layer, key) for key in alike):
            raise InputError(f'{name} of the truncated network has no equal in the complete one: use the same network.')
        if isinstance(other, HarmonicLayer) and other.weight.numel() < layer.weight.numel():
            raise InputError(f'{name} keeps less in the complete network than in the truncated one: swap them.')
        if not owns_weight(layer):
            raise InputError(f'cannot refit {name}: {COMPUTED}.')
    first, second = (f'{p.dtype} on {p.device}' for p in (next(model.parameters()), next(small.parameters())))
    if first != second:
        raise InputError(f'the networks must be on one device and of one dtype, got {first} and {second}.')
    if inplace:
        check_changeable(small)
    best = refitted(model, small, read_images(data, next(small.parameters()), batches))
    return take_over(small, best) if inplace else best


def take_over(model: nn.Module, best: nn.Module) -> nn.Module:
    """Gives a network all that refitting changed in a copy of it, in place; returns it."""
    energies = {name: layer.energy_kept for name, layer in harmonic_layers(best).items()}
    model.load_state_dict(best.state_dict())  # which makes the energies unknown
    for name, layer in harmonic_layers(model).items():
        layer.energy_kept = energies[name]
    return model


def refitted(model: nn.Module, small: nn.Module, parts: Sequence[Tensor]) -> nn.Module:
    """Returns a refitted copy of a truncated network, see `refit`, on images of `read_images`."""
    unfitted, fitted, final = (copy.deepcopy(small) for _ in range(3))  # `final` is fitted to the held-out images too
    with torch.no_grad(), evaluating(model):
        with evaluating(small):
            outputs = [_outputs(network, parts[0]) for network in (model, small)]
        wanted, found = ([tuple(x.shape) for x in of] for of in outputs)
        if not wanted or wanted != found:
            raise InputError(f'the networks must return tensors of the same shapes, got {wanted} and {found}.')
        if not all(x.isfinite().all() for of in outputs for x in of):
            raise InputError(_NOT_FINITE)
        layers, norms, uses = harmonic_layers(fitted), norms_behind(fitted, parts[0]), uses_of(fitted, parts[0])
        lowered = {name: of for name, of in _fittable(layers, uses).items() if not layers[name].is_complete()}
        complete = {name: module for name, module in model.named_modules() if isinstance(module, _NORMS)}
        for name, norm in [of for network in (fitted, final) for of in _norms_of(network).items() if of[0] in complete]:
            norm.load_state_dict(dict(complete[name].named_buffers()), strict=False)  # of the outputs that are fitted
        shares, steps = _shares(layers, lowered, parts)
        with evaluating(fitted), suspended(model, parts, steps) as whole, suspended(fitted, parts, steps) as cut:
            for name in progress(lowered, desc='refit', unit='layer', leave=False):
                samples = _samples(name, layers[name], model.get_submodule(name), shares[name], parts, whole, cut)
                if solved := solve_layer(layers[name], samples, name in norms):
                    for network, solution in zip((fitted, final), solved, strict=True):
                        _set_weights(network, name, norms.get(name), *solution)
        fit = [part[~mask] for part, mask in _with_held_out(parts) if (~mask).sum() > 1]  # one has no statistics
        errors: dict[tuple[nn.Module, bool], float] = {}
        for judged, result in ((small, unfitted), (fitted, final)):
            errors[result, False] = output_error(model, judged, parts)
            estimate_statistics(judged := copy.deepcopy(judged), fit)
            errors[result, True] = output_error(model, judged, parts)
        if not math.isfinite(next(iter(errors.values()))):
            raise InputError(_NOT_FINITE)
        best, counted = min(errors, key=lambda of: math.inf if math.isnan(errors[of]) else errors[of])
        if counted:
            estimate_statistics(best, parts)
    return best


def losses_by_images(
    model: nn.Module, parts: Sequence[Tensor], choosers: Sequence[Callable[..., Any]], refit: bool
) -> list[dict[str, dict[Any, float]]]:
    """Returns the share of each harmonic layer's output on images that becomes error, for each choice.

    Every layer gets its complete input, so this is the error that the layer itself makes. A frequency that is rare in
    the input, or that cancels between channels, counts for little. The mean squared error is divided by the output's
    variance, because normalisation divides each channel by its own deviation, and averaged over output channels. With
    `refit` it is what refitting leaves over on held-out images, 1 at most; else the ratio r becomes r / (1 + r).

    `parts` are images of `read_images`, see `refit` for the memory; choosers are `Choices.weighed`. Layers that `refit`
    passes over, and those whose output does not vary, are left out.
    """
    layers = harmonic_layers(model)
    found: list[dict[str, dict[Any, float]]] = [{} for _ in choosers]
    with torch.no_grad(), evaluating(model):
        uses, norms = uses_of(model, parts[0]), norms_behind(model, parts[0])
        reached = _fittable(layers, uses)
        shares, steps = _shares(layers, reached, parts)
        with suspended(model, parts, steps) as runs:
            for name in progress(reached, desc='weigh', unit='layer', leave=False):
                layer, (present, bias) = layers[name], _weights_of(layers[name])
                samples = _samples(name, layer, layer, shares[name], parts, runs)
                intercept = layer.bias is not None or name in norms
                if not samples.fit.variance().any():
                    continue
                for losses, weighed in zip(found, choosers, strict=True):
                    losses[name] = {}
                    for mixed, fit, choices in weighed(name, samples.fit, intercept):
                        test, weight = samples.test, present
                        if mixed is not None:
                            test = test.mixed(mixed[0])
                            weight = (mixed[1] @ weight.reshape(layer.channels, -1)).view(1, fit.features, -1)
                        for choice, places in choices.items():
                            kept = weight[:, places.to(weight.device)]
                            if len(places) == present.shape[1]:
                                losses[name][choice] = 0.0
                            elif refit:
                                solution = fit.of(places).solve(kept, _RIDGE, intercept)
                                losses[name][choice] = min(1.0, relative_error(test.of(places), *solution))
                            else:
                                ratio = relative_error(fit.plus(test).of(places), kept, bias)
                                losses[name][choice] = ratio / (1 + ratio)
    return found


def _fittable(layers: Mapping[str, Any], uses: Mapping[str, list[Use]]) -> dict[str, list[Use]]:
    """Returns the uses of layers that images reach and whose sums do not take too much memory."""
    sums = {n: of.groups * (of.weight[0].numel() + of.out_channels // of.groups + 1) ** 2 for n, of in layers.items()}
    return {name: of for name, of in uses.items() if of and sums[name] <= _SUMS}


def _shares(
    layers: Mapping[str, Any], uses: Mapping[str, Sequence[Use]], parts: Sequence[Tensor]
) -> tuple[dict[str, tuple[int, float]], list[dict[str, int]]]:
    """Returns how many parts each layer needs with which share of its output's positions, and each part's layers."""
    counts = list(accumulate(map(len, parts)))
    found: dict[str, tuple[int, float]] = {}
    for name, of in uses.items():
        of_image = sum(use.positions for use in of) / counts[0]  # as in the first part
        positions = max(POSITIONS * layers[name].weight[0].numel(), FEWEST)
        least = min(_IMAGES, _BYTES / parts[0][0].nbytes)
        last = bisect_left(counts, max(positions / of_image, least), hi=len(counts) - 1)
        found[name] = last + 1, min(1.0, positions / of_image / counts[last])
    return found, [{name: len(uses[name]) for name in uses if found[name][0] > k} for k in range(len(parts))]


def _samples(name: str, layer: Any, complete: Any, need: tuple[int, float], parts: Any, *runs: Any) -> Samples:
    """Sums up a layer's inputs and wanted outputs in as many parts, and at such a share of positions, as it needs.

    `runs` are those of `suspended`, first of the complete network, whose layer makes the outputs, last with the inputs.
    """
    number, share = need
    samples = Samples(layer, share)
    of_parts = zip(_with_held_out(parts[:number]), *(of[:number] for of in runs), strict=True)
    for (_, held_out), *visits in of_parts:
        for values in zip(*map(next, visits), strict=True):
            samples.add(values[-1], complete(values[0]), held_out)
    if not all(moments.sums.isfinite().all() for moments in (samples.fit, samples.test)):
        raise InputError(f'{name} has inputs or outputs that are not finite on the data.')
    return samples


def solve_layer(layer: Any, samples: Samples, normalised: bool) -> list[tuple[Tensor, Tensor]]:
    """Solves for a layer of a truncated network: without the held-out images, and with all. Empty if it should stay.

    `normalised` tells whether a module with a running mean follows, which can take up a constant.
    """
    start, present = _weights_of(layer)
    intercept = layer.bias is not None or normalised
    errors = {ridge: relative_error(samples.test, *samples.fit.solve(start, ridge, intercept)) for ridge in _RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= relative_error(samples.test, start, present):
        return []
    return [moments.solve(start, best, intercept) for moments in (samples.fit, samples.fit.plus(samples.test))]


def _weights_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns a layer's weights (groups, F, o) and biases (groups, o) in float64."""
    weight = by_group(layer.weight, layer.groups)
    bias = torch.zeros_like(layer.weight[:, 0, 0, 0]) if layer.bias is None else layer.bias
    return weight, bias.to(weight).reshape(layer.groups, -1)


def _set_weights(network: nn.Module, name: str, norm: str | None, weight: Tensor, bias: Tensor) -> None:
    """Gives a layer new coefficients and a new bias; without one, the module that normalises its output takes that."""
    layer: Any = network.get_submodule(name)
    layer.weight.copy_(weight.transpose(1, 2).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(bias.flatten())
    elif norm is not None:
        mean: Any = network.get_submodule(norm).running_mean
        mean.sub_(bias.flatten().to(mean))
    torch.clear_autocast_cache()  # which has a cast of the bias


def relative_error(test: Moments, weight: Tensor, bias: Tensor) -> float:
    """Returns the error over the outputs' variance, averaged over the outputs that vary."""
    variance = test.variance()
    alive = variance > 1e-12 * variance.max()
    return float((test.error(weight, bias)[alive] / variance[alive]).mean()) if alive.any() else 0.0


def _with_held_out(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields parts of the images, with a mask (B,) of those held out."""
    first = 0
    for part in parts:
        yield part, (first + torch.arange(len(part), device=part.device)) % HELD_OUT == HELD_OUT - 1
        first += len(part)


def output_error(model: nn.Module, small: nn.Module, parts: Sequence[Tensor]) -> float:
    """Returns the squared error of `small` on the held-out images, over the variance of the outputs in each part."""
    error, variance = 0.0, 0.0
    with torch.no_grad(), evaluating(model), evaluating(small):
        for part, mask in _with_held_out(parts):
            if mask.any():  # the part has four images at least
                for wanted, found in zip(_outputs(model, part[mask]), _outputs(small, part[mask]), strict=True):
                    error += float((found - wanted).square().sum())
                    variance += float((wanted - wanted.mean()).square().sum())
    return error / max(variance, torch.finfo(torch.float64).tiny)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns the floating-point tensors among a network's outputs, in float64."""
    outputs = [x for x in tree_leaves(model(images)) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.to(float64_device(x.device), torch.float64) for x in outputs]


def norms_behind(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Returns the names of modules with a running mean that directly follow a harmonic layer, by the layer's name."""
    layers = harmonic_layers(model)
    norms = {name: m for name, m in model.named_modules() if isinstance(getattr(m, 'running_mean', None), Tensor)}
    found: dict[str, str] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if name in layers:
            outputs[name] = output
        else:
            found.update({layer: name for layer, of in outputs.items() if inputs and inputs[0] is of})

    with torch.no_grad(), evaluating(model), watching({**layers, **norms}, note):
        model(images)
    return found


def _norms_of(model: nn.Module, blocks: bool = False) -> dict[str, Any]:
    """Returns a network's batch normalisation with running statistics that training would change, by name.

    That inside harmonic blocks is left out unless `blocks`: levels do not change the statistics of their responses. So
    are frozen statistics: a momentum of 0 freezes them, and so does evaluation in a network that trains.
    """
    inside = {id(module.bn) for module in model.modules() if isinstance(module, HarmonicBlock2d) and not blocks}
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _NORMS) and id(m) not in inside}
    norms = {n: m for n, m in norms.items() if m.track_running_stats and m.num_batches_tracked is not None}
    return {n: m for n, m in norms.items() if m.momentum != 0 and m.training >= model.training}


def estimate_statistics(model: nn.Module, parts: Iterable[Tensor], blocks: bool = False) -> None:
    """Re-estimates the statistics of a network's batch normalisation as their mean over batches, in place.

    `blocks` includes those inside harmonic blocks. Unlike torch.optim.swa_utils.update_bn, it keeps everything else in
    evaluation: no dropout. Modules that no image reaches then, such as an auxiliary head, keep their statistics.
    """
    norms = _norms_of(model, blocks).values()
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None
        try:
            for part in parts if norms else ():
                model(part)
        finally:
            for norm, (momentum, state) in zip(norms, before, strict=True):
                norm.training, norm.momentum = False, momentum
                if not norm.num_batches_tracked:
                    norm.load_state_dict(state)
