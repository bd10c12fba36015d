"""The original formulation of harmonic layers, written from its formulas, to be measured against.

Filters are composed by a broadcast product and a sum; the stem filters every channel by every DCT function, normalises
the responses and mixes them, in evaluation too (arXiv:2001.06570; the basis is a parameter that is not trained).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d


class OriginalConv(nn.Module):
    """filter[o, c] = sum_n weight[o, c, n] d_n, then a convolution."""

    def __init__(self, layer: HarmonicConv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone().unsqueeze(-1))  # (O, I, P, 1, 1)
        self.dct = nn.Parameter(layer.basis.to(layer.weight)[None, None], requires_grad=False)  # (1, 1, P, k, k)
        self.bias = layer.bias
        self.args = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight * self.dct).sum(2), self.bias, **self.args)


class OriginalBlock(nn.Module):
    """Depth-wise DCT, batch-norm, 1 x 1 convolution."""

    def __init__(self, layer: HarmonicBlock2d) -> None:
        super().__init__()
        channels, basis = layer.in_channels, layer.basis.to(layer.weight)
        self.weight = nn.Parameter(layer.weight.detach().clone().flatten(1)[:, :, None, None])
        self.dct = nn.Parameter(basis.repeat(channels, 1, 1).unsqueeze(1), requires_grad=False)  # (C * P, 1, k, k)
        self.bn = copy.deepcopy(layer.bn)
        self.bias = layer.bias
        self.args = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.bn(F.conv2d(x, self.dct, **self.args)), self.weight, self.bias)


def original(model: nn.Module) -> nn.Module:
    """A copy of a harmonic network with every harmonic layer in the original formulation."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, HarmonicConv2d):
            model.set_submodule(name, OriginalConv(layer))
        elif isinstance(layer, HarmonicBlock2d):
            model.set_submodule(name, OriginalBlock(layer))
    return model.train(model.training)


@torch.inference_mode()
def check(ours: nn.Module, theirs: nn.Module, size: int) -> None:
    """Raises unless both compute the same: a comparison of speed is one of the same thing."""
    x = torch.randn(1, 3, size, size, device=next(ours.parameters()).device)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-3)
