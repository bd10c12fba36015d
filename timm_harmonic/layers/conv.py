"""The harmonic convolution. Its filters are learned combinations of fixed DCT functions (arXiv:2001.06570):

    filters[o, i] = sum_n weight[o, i, n] * basis[n]

`basis` (P, k, k) holds the DCT functions d_n, a level keeps the low frequencies among them, and `weight` (O, I, P, 1)
is what is learned. With all k * k functions any filter can be expressed.
"""

import copy
import math
from typing import Any

import torch
from timm.layers import pad_same
from torch import Tensor, nn

from ..common import InputError
from .base import COMPUTED, HarmonicLayer, conv_args, owns_weight, refresh
from .compose import compose, format_of, outside_autocast
from .dct import project

# torch.fx treats these as leaves: a trace would freeze their branches on dtype, device, memory format and image size.
torch.fx.wrap('compose')
torch.fx.wrap('pad_same')

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of filters to project


class HarmonicConv2d(HarmonicLayer):
    """Convolution with filters sum_n weight[o, i, n] d_n over DCT functions d_n (arXiv:2001.06570).

    The layer has two forms (see `form`), because filtering every input channel by every DCT function and mixing the
    responses by a 1 x 1 convolution computes the same. It maps (B, C, H, W) as nn.Conv2d does, for any H and W.

    A state dict may hold filters (O, C / groups, k, k) of a plain convolution in place of the coefficients. The layer
    projects them: exactly if it keeps all frequencies, else onto the nearest ones in L2.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O.
        kernel_size: Side k of the filters, or a pair of equal sides.
        stride: As in nn.Conv2d.
        padding: As in nn.Conv2d, 'same' and 'valid' included.
        dilation: As in nn.Conv2d.
        groups: As in nn.Conv2d.
        bias: Whether to add a learned bias.
        padding_mode: As in nn.Conv2d.
        level: The paper's lambda: keep the frequencies with i + j < level. None keeps all k * k.
        dc: Whether to keep the constant function.
        normalization: 'l1' (the authors') or 'ortho'.
        smoothness: None for the authors' layer. A number from 0 to 10 scales functions of unit energy by
            s_ij = c (1 + i + j)^(-smoothness), whatever the normalization. See below.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        form: How the layer computes: 'dense', one convolution with composed filters, or 'separable', fixed filters for
            each channel and a 1 x 1 convolution, which is faster at low levels. The state dict does not hold it.

    Smoothness builds in a prior for smooth filters, which training can override. It adds no parameter, and the filters
    that can be expressed stay the same. Coefficients w_n give f_n = s_n w_n at frequency n, so initial filters, weight
    decay and steps of optimizers favour low frequencies; docs/layers.md says how much.

    Attributes:
        weight: Coefficients (O, C / groups, P, 1).
        bias: (O,) or None.
        basis: DCT functions (P, k, k), a non-persistent buffer.
        basis_code: Binary digits (32,) that encode a basis other than the authors', a buffer in the state dict; else
            None. The layer refuses coefficients of another basis.
        level: The paper's lambda as an integer, 2k - 1 for all frequencies.
        kept: Which coefficients the layer has, booleans (1, C, P, 1) in the state dict, if each channel has its own
            functions, see `at_pairs`; else None. `weight` is (O, R, 1, 1) then.
        pairs: Channels and functions (2, R) of the columns of `weight`, with `kept`; a non-persistent buffer.

    Raises:
        TypeError: If kernel_size, level or smoothness has another type.
        InputError: If an argument is out of range, naming it.
    """

    def reset_parameters(self) -> None:
        """Kaiming normal over fan-out, std sqrt(2 / (O * P)), as in the authors' code; bias zero."""
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filters(self) -> Tensor:
        """Composes the filters (O, C / groups, k, k), differentiably, in the coefficients' dtype."""
        refresh(self)
        with outside_autocast(self.weight.device.type):
            return self._filters()

    def _filters(self) -> Tensor:
        return compose(self._spread(self.weight), self._basis_for_product()).to(self.weight.dtype)

    def _padded(self, x: Tensor) -> Tensor:
        """Pads what the convolution does not pad by itself: nothing."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self._padded(x)
        if self.form == 'separable':
            return self._separate(x, self.weight, self.bias)
        return self._convolve(x, self._filters(), self.bias, self.groups)

    def at_pairs(self, kept: Tensor | int) -> 'HarmonicConv2d':
        """Returns a copy in which every input channel keeps its own functions. Each filter becomes the nearest in L2.

        Its `weight` (O, R, 1, 1) has one column for each of R pairs of channel and function, see `pairs`. The state
        dict holds which ones they are.

        Args:
            kept: Pairs to keep, of those that the layer has: (C, P) booleans, or the number of those with the most
                energy (on the meta device, any).

        Raises:
            InputError: If the layer has groups, its weight is computed, or `kept` leaves no pair or does not fit.
        """
        if self.groups > 1 or not owns_weight(self):
            reason = 'it has groups, whose channels keep the same functions: lower its level instead'
            raise InputError(f'cannot choose pairs for {self}: {reason if self.groups > 1 else COMPUTED}.')
        shape, number = (self.in_channels, len(self.basis)), self.weight[0].numel()
        if isinstance(kept, int) and not isinstance(kept, bool) and 1 <= kept <= number:
            if kept == number:
                return copy.deepcopy(self)
            return self._at(self.level, self._largest(kept), kept)
        if isinstance(kept, Tensor) and kept.shape == shape and kept.dtype == torch.bool:
            kept = kept[None, :, :, None].to(self.basis.device)
            kept = kept if self.kept is None else kept & self.kept
            if kept.any():
                return self._at(self.level, kept)
        raise InputError(f'kept must be booleans {shape}, some of them True, or a number from 1 to {number}.')

    def _largest(self, number: int) -> Tensor:
        """Marks (1, C, P, 1) so many pairs with the most energy; on meta, where the state dict will say which, any."""
        energies = torch.zeros(self.in_channels, len(self.basis), device='cpu')
        energies = energies if self.weight.is_meta else self.energies()
        if self.kept is not None and not self.kept.is_meta:
            energies[~self.kept[0, :, :, 0].cpu()] = -math.inf
        kept = torch.zeros_like(energies, dtype=torch.bool)
        kept.view(-1)[energies.flatten().argsort(descending=True, stable=True)[:number]] = True
        return kept[None, :, :, None].to(self.basis.device)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the coefficients mix: responses (B, C * P, H', W') to the basis, in the order c * P + n."""
        return self._respond(self._padded(x), self.basis)

    def fuse(self) -> nn.Conv2d | nn.Sequential:
        """Returns new plain modules that compute the same: an nn.Conv2d or, in separable form, an nn.Sequential."""
        refresh(self)
        if self.form == 'separable':
            return self._to_sequential(self.weight, self.bias)
        return self._to_conv2d(self.filters(), self.bias)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        level: int | None = None,
        dc: bool = True,
        normalization: str = 'l1',
        smoothness: float | None = None,
        form: str = 'dense',
    ) -> 'HarmonicConv2d':
        """Builds a layer with the filters of a convolution: exact with all frequencies, else the nearest in L2.

        Args:
            conv: Convolution with square filters. It does not change.
            level: See `HarmonicConv2d`, also for the other arguments and errors.

        Returns:
            The layer, on conv's device, with its dtype, training flag and requires_grad.
        """
        refresh(conv)
        basis: dict[str, Any] = dict(level=level, dc=dc, normalization=normalization, smoothness=smoothness)
        options = conv_args(conv) | basis | dict(form=form)
        empty = conv.weight.is_meta  # the basis may still have values
        layer: Any = cls(**options) if empty else nn.utils.skip_init(cls, **options)
        with torch.no_grad():
            if not empty:
                layer.weight.copy_(_within(project(conv.weight, layer.basis), conv.weight.dtype))
            layer.weight.requires_grad_(conv.weight.requires_grad)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
                layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer.to(memory_format=format_of(conv.weight)).train(conv.training)

    def projected(self, stored: Tensor, assign: bool) -> Tensor:
        """Projects filters (O, C / groups, k, k) in the higher of the two precisions, and rounds them once."""
        if self.kept is not None or self.kernel_size == (1, 1):
            return stored
        if stored.shape != (*self.weight.shape[:2], *self.kernel_size):
            return stored
        if stored.dtype not in _PRECISIONS:
            raise InputError(f'cannot project filters of dtype {stored.dtype}: convert them to floating point first')
        wide = stored.detach().to(torch.promote_types(stored.dtype, self.weight.dtype))
        coefficients = _within(project(wide, self.basis_for(wide)), self.weight.dtype)
        return coefficients.to(stored.dtype) if assign else coefficients  # copying rounds them


def _within(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns coefficients that a dtype can hold. Raises InputError if it cannot: smoothness enlarges some of them."""
    if dtype == torch.float16 and not coefficients.is_meta and coefficients.numel():
        largest = float(coefficients.abs().max())
        if largest > torch.finfo(dtype).max:
            raise InputError(f'coefficients up to {largest:.3g} overflow {dtype}: lower the smoothness')
    return coefficients


class HarmonicConv2dSame(HarmonicConv2d):
    """`HarmonicConv2d` with the padding of timm's Conv2dSame and TensorFlow: ceil(size / stride) positions come out."""

    dynamic_padding = True

    def _padded(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation)
