"""The harmonic convolution with timm's dynamic padding, as in networks that came from TensorFlow."""

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor

from .conv import HarmonicConv2d

__all__ = ['HarmonicConv2dSame']

torch.fx.wrap('pad_same')  # a leaf for torch.fx: how much is padded depends on the size of the image


class HarmonicConv2dSame(HarmonicConv2d):
    """`HarmonicConv2d` that pads by the size of its input, so that ceil(size / stride) positions come out.

    As timm's Conv2dSame, the same arguments and attributes as `HarmonicConv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(
            pad_same(x, self.kernel_size, self.stride, self.dilation), self.filters(), self.bias, self.groups
        )

    def fuse(self) -> Conv2dSame:
        """A new Conv2dSame of timm that computes the same; this layer is left as it is."""
        conv = super().fuse()
        same = Conv2dSame(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=False,
            device='meta',
        )
        same.weight, same.bias = conv.weight, conv.bias
        return same.train(conv.training)
