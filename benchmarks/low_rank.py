"""Filters of rank R: a k x 1 convolution to R channels and a 1 x k convolution, or the other way round.

As in Jaderberg et al., BMVC 2014 (arXiv:1405.3866). The first filters come from a singular value decomposition of all
filters of a layer, as they are or, as in Zhang et al. (arXiv:1505.06798), weighed by the second moments of the layer's
input; the second ones are fitted by least squares. Each layer and rank takes the best of these, judged by held-out
images.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_harmonic.conversion.costs import Cost, Costs, count_macs
from timm_harmonic.conversion.refit import Moments, by_group, relative_error
from timm_harmonic.conversion.running import evaluating, suspended
from timm_harmonic.conversion.swap import replace_layers
from timm_harmonic.conversion.truncate import budget_of, choose_levels

from .least_squares import Wanted, samples_of

__all__ = ['Factors', 'factors', 'low_rank']

_SIZES, _LEFT, _MULTIPLE = 12, 0.8, 16  # ranks: as the numbers of pairs in our layers
_RIDGE = 1e-2  # of the second filters, while ranks are compared


@dataclasses.dataclass(frozen=True)
class Factors:
    """A layer's filters at one rank: first (R, C, k, 1) or (R, C, 1, k), second (O, R, 1, k) or (O, R, k, 1), bias."""

    rest: float  # share of the output's variance that is lost
    first: Tensor
    second: Tensor
    bias: Tensor

    def convolutions(self, conv: Any) -> nn.Sequential:
        """The two convolutions in place of the layer."""
        layers: list[nn.Module] = []
        for weight, bias in ((self.first, None), (self.second, self.bias)):
            spans = [size > 1 for size in weight.shape[2:]]
            options: dict[str, Any] = dict(
                kernel_size=tuple(weight.shape[2:]),
                stride=tuple(s if has else 1 for s, has in zip(conv.stride, spans, strict=True)),
                padding=tuple(p if has else 0 for p, has in zip(conv.padding, spans, strict=True)),
                dilation=conv.dilation,
                bias=bias is not None,
            )
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], **options)
            layer.weight.data = weight.to(conv.weight)
            if bias is not None:
                layer.bias.data = bias.to(conv.weight)
            layers.append(layer)
        return nn.Sequential(*layers)


def _ranks(conv: nn.Conv2d) -> list[int]:
    """Ranks that save multiply-adds, as finely graded as the numbers of pairs in our layers."""
    c, o, k = conv.in_channels, conv.out_channels, conv.kernel_size[0]
    most = k * c * o / (c + o)
    return sorted({int(most * _LEFT**step) // _MULTIPLE * _MULTIPLE for step in range(1, _SIZES + 1)} - {0})


def _mixed(moments: Moments, first: Tensor, k: int) -> Moments:
    """Moments of the responses (R, k) to first filters (R, C k), from those of the patches (C k, k)."""

    def rows(sums: Tensor) -> Tensor:
        patches = sums[: moments.features].unflatten(0, (-1, k))
        return torch.cat([torch.einsum('rp,pkx->rkx', first, patches).flatten(0, 1), sums[moments.features :]])

    return Moments(len(first) * k, rows(rows(moments.sums[0]).t())[None])


def _of_layer(conv: nn.Conv2d, fit: Moments, test: Moments) -> dict[int, Factors]:
    """The best factors at each rank."""
    (c, k), found = (conv.in_channels, conv.kernel_size[0]), dict[int, Factors]()
    deviation = fit.variance()[0].clamp_min(torch.finfo().tiny).sqrt()
    places = torch.arange(fit.features).view(c, k, k)
    for vertical in (True, False):
        order = (places if vertical else places.transpose(1, 2)).flatten()
        ordered = [moments.of(order) for moments in (fit, test)]
        weight = by_group(conv.weight, 1)[0][order].view(c * k, k, -1)
        inputs = ordered[0].products(True)[0][0].unflatten(0, (-1, k)).unflatten(2, (-1, k))
        inputs = inputs.diagonal(dim1=1, dim2=3).sum(2)
        inputs.diagonal().add_(1e-6 * inputs.diagonal().mean())
        root = torch.linalg.cholesky(inputs)
        for by_data in (False, True):
            filters = root.t() @ (weight / deviation).flatten(1) if by_data else weight.flatten(1)
            u = torch.linalg.svd(filters, full_matrices=False)[0]
            first = torch.linalg.solve_triangular(root.t(), u, upper=True).t() if by_data else u.t()
            back = (u.t() @ root.t() if by_data else u.t()) @ weight.flatten(1)  # (R, k * O): weight = first' back
            ranks = [rank for rank in _ranks(conv) if rank <= len(first)]
            most = [_mixed(moments, first[: max(ranks)], k) for moments in ordered] if ranks else []
            for rank in ranks:
                kept, start = torch.arange(rank * k), back[:rank].view(1, rank * k, -1)
                second, bias = most[0].of(kept).solve(start, _RIDGE, True)
                rest = relative_error(most[1].of(kept), second, bias)
                if rank not in found or rest < found[rank].rest:
                    shapes = ((rank, c, k, 1), (-1, rank, 1, k)) if vertical else ((rank, c, 1, k), (-1, rank, k, 1))
                    both = first[:rank].reshape(shapes[0]), second[0].t().reshape(shapes[1])
                    found[rank] = Factors(rest, *both, bias[0])
    return found


def factors(model: nn.Module, parts: Sequence[Tensor]) -> dict[str, dict[int, Factors]]:
    """The best factors at each rank of the k x k convolutions with 16 input channels or more, from one run.

    They should come in the order in which they run, and each once. `parts` are images of `read_images`.
    """
    convs = {
        name: conv
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1 and _ranks(conv)
    }
    number, found = sum(map(len, parts)), {}
    uses = [dict.fromkeys(convs, 1)] * len(parts)
    with torch.no_grad(), evaluating(model), suspended(model, parts, uses) as runs:
        for name, conv in tqdm(convs.items(), desc='low rank', unit='layer', leave=False):
            inputs = (next(run)[0] for run in runs)
            samples = samples_of(conv, number, ((x, conv(x)) for x in inputs))
            found[name] = _of_layer(conv, samples.fit, samples.test)
    return found


def low_rank(
    model: nn.Module, found: dict[str, dict[int, Factors]], images: Tensor, share: float
) -> tuple[nn.Module, Wanted]:
    """A network with a share of the multiply-adds, and what its second filters should compute.

    The ranks of all layers are chosen together, as `truncate` chooses levels.
    """
    convs: dict[str, Any] = {name: model.get_submodule(name) for name in found}
    sides = _sides(model, convs, images)
    costs: dict[str, dict[int, Cost]] = {}
    losses: dict[str, dict[int, float]] = {}
    for name, of in found.items():
        conv, complete = convs[name], convs[name].weight[0].numel()  # more than any rank
        (in_height, in_width), (height, width) = sides[name]
        costs[name] = {complete: Cost(height * width * conv.weight.numel())}
        for rank, found_at in of.items():
            between = height * in_width if found_at.first.shape[2] > 1 else in_height * width  # positions
            each = between * conv.in_channels + height * width * conv.out_channels
            costs[name][rank] = Cost(rank * conv.kernel_size[0] * each)
        losses[name] = {complete: 0.0, **{rank: min(1.0, of[rank].rest) for rank in of}}
    outside = count_macs(model, images) - sum(max(of.values()).cost for of in costs.values())
    all_costs = Costs(float(outside), costs)
    chosen = choose_levels(losses, all_costs, budget_of(all_costs, share))
    small = copy.deepcopy(model)
    cut = {name: rank for name, rank in chosen.items() if rank in found[name]}
    replace_layers(small, {name: found[name][rank].convolutions(convs[name]) for name, rank in cut.items()})
    wanted = {f'{name}.1': (name, torch.arange(convs[name].out_channels)) for name in found if name in cut}
    return small, wanted


def _sides(model: nn.Module, convs: Mapping[str, nn.Module], images: Tensor) -> dict[str, tuple[Any, Any]]:
    """Heights and widths of the inputs and of the outputs of convolutions for one image."""
    with torch.no_grad(), evaluating(model), suspended(model, [images[:1]], [dict.fromkeys(convs, 1)]) as (visits,):
        return {n: (visit[0].shape[2:], convs[n](visit[0]).shape[2:]) for n, visit in zip(convs, visits, strict=True)}
