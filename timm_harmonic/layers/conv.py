"""The harmonic convolution."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from ..common import InputError
from ..common.device import float64_device
from .base import COMPUTED, HarmonicLayer, conv_args, owns_weight, refresh
from .compose import compose, format_of, outside_autocast
from .dct import project

# torch.fx treats these as leaves: a trace would freeze their branches on dtype, device, memory format and image size.
torch.fx.wrap('compose')
torch.fx.wrap('pad_same')


class HarmonicConv2d(HarmonicLayer):
    """Convolution with learned combinations of fixed DCT functions (arXiv:2001.06570).

        filters[o, i] = sum_n weight[o, i, n] * basis[n]

    It takes the arguments of nn.Conv2d: C input channels, O output channels, square filters of side k. It maps
    (B, C, H, W) as nn.Conv2d does, for any H and W. With all k * k functions any filter can be expressed.

    A state dict may hold filters (O, C / groups, k, k) of a plain convolution in place of the coefficients. The layer
    projects them: exactly if it keeps all frequencies, else onto the nearest ones in L2.

    Args:
        level: The paper's lambda: keep the frequencies with i + j < level. None keeps all k * k.
        dc: Whether to keep the constant function.
        normalization: 'l1' (the authors') or 'ortho', see `dct_basis`.
        smoothness: None for the authors' layer. A number from 0 to 10 scales the functions, see `dct_basis`, so initial
            filters, weight decay and steps of optimizers favour low frequencies; docs/layers.md says how much.
        form: How the layer computes: 'dense', one convolution with composed filters, or 'separable', fixed filters for
            each channel and a 1 x 1 convolution, which is faster at low levels. The state dict does not hold it.

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
        mixtures: Weights (M, C, 1, 1) of the mixtures of input channels that the layer filters in place of these, see
            `at_mixtures`; else None. M takes the place of C above then.

    Raises:
        TypeError: If kernel_size, level or smoothness has another type.
        InputError: If an argument is out of range, naming it.
    """

    def filters(self) -> Tensor:
        """Composes the filters (O, C / groups, k, k), differentiably, in the coefficients' dtype."""
        refresh(self)
        with outside_autocast(self.weight.device.type):
            filters = self._filters()
            if self.mixtures is not None:
                filters = torch.einsum('omxy,mc->ocxy', filters, self.mixtures[:, :, 0, 0])
            return filters

    def _filters(self) -> Tensor:
        return compose(self._spread(self.weight), self._basis_for_product()).to(self.weight.dtype)

    def _padded(self, x: Tensor) -> Tensor:
        """Mixes the input channels, if the layer does, and pads what the convolution does not pad by itself."""
        return x if self.mixtures is None else F.conv2d(x, self.mixtures)

    def forward(self, x: Tensor) -> Tensor:
        x = self._padded(x)
        if self.form == 'separable':
            return self._separate(x, self.weight, self.bias)
        return self._convolve(x, self._filters(), self.bias, self.groups)

    def at_pairs(self, kept: Tensor | int) -> 'HarmonicConv2d':
        """Returns a copy in which every input channel keeps its own functions. Each filter becomes the nearest in L2.

        Its `weight` (O, R, 1, 1) has one column for each of R pairs of channel and function, see `pairs`.

        Args:
            kept: Pairs of the layer, (C, P) booleans, or the number of those with the most energy (on meta, any).

        Raises:
            InputError: If the layer has groups, its weight is computed, or `kept` leaves no pair or does not fit.
        """
        if self.groups > 1 or not owns_weight(self):
            reason = 'it has groups, whose channels keep the same functions: lower its level instead'
            raise InputError(f'cannot choose pairs for {self}: {reason if self.groups > 1 else COMPUTED}.')
        shape, number = (self.channels, len(self.basis)), self.weight[0].numel()
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

    def at_mixtures(self, mixtures: Tensor, back: Tensor | None = None) -> 'HarmonicConv2d':
        """Returns a copy that filters mixtures (M, C) of its input channels in place of these, by a 1 x 1 convolution.

        `back` (M, C) says which sum of mixtures stands for each channel, by default the nearest in L2. Raises
        InputError if the layer has groups, pairs or mixtures, its weight is computed, or the mixtures do not fit.
        """
        if self.groups > 1 or self.kept is not None or self.mixtures is not None or not owns_weight(self):
            raise InputError(f'cannot mix channels for {self}: it has groups, pairs, mixtures, or a computed weight.')
        shapes = {tuple(x.shape) for x in (mixtures, back) if x is not None}
        if len(shapes) > 1 or mixtures.shape[1:] != (self.in_channels,) or not mixtures.numel():
            raise InputError(f'mixtures and back must be weights (M, {self.in_channels}), got {sorted(shapes)}.')
        new, device = copy.deepcopy(self), float64_device(self.weight.device)
        mixtures = mixtures.detach().to(device, torch.float64)
        back = torch.linalg.pinv(mixtures).t() if back is None else back.to(mixtures)
        weight = torch.einsum('ocnz,mc->omnz', self.weight.detach().to(mixtures), back).to(self.weight)
        new.weight = nn.Parameter(weight.contiguous(memory_format=self.format()), self.weight.requires_grad)
        new.mixtures = nn.Parameter(mixtures[:, :, None, None].to(self.weight), self.weight.requires_grad)
        new.channels, new.energy_kept, new.milliseconds = len(mixtures), None, None
        new.init_non_persistent_buffers()
        return new

    def _largest(self, number: int) -> Tensor:
        """Marks (1, C, P, 1) so many pairs with the most energy; on meta, where the state dict will say which, any."""
        energies = torch.zeros(self.channels, len(self.basis), device='cpu')
        energies = energies if self.weight.is_meta else self.energies()
        if self.kept is not None and not self.kept.is_meta:
            energies[~self.kept[0, :, :, 0].cpu()] = -torch.inf
        kept = torch.zeros_like(energies, dtype=torch.bool)
        kept.view(-1)[energies.flatten().argsort(descending=True, stable=True)[:number]] = True
        return kept[None, :, :, None].to(self.basis.device)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the coefficients mix: responses (B, C * P, H', W') to the basis, in the order c * P + n."""
        return self._respond(self._padded(x), self.basis)

    def fuse(self, whole: bool = False) -> nn.Conv2d | nn.Sequential:
        """Returns plain modules that compute the same: an nn.Conv2d or, separable or not `whole`, an nn.Sequential."""
        refresh(self)
        if self.form == 'separable':
            return self._to_sequential(self.weight, self.bias)
        if self.mixtures is None or whole:
            return self._to_conv2d(self.filters(), self.bias, in_channels=self.in_channels)
        with outside_autocast(self.weight.device.type):
            return self._in_sequence(filter=self._to_conv2d(self._filters(), self.bias))

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

        The layer takes over device, dtype, training flag and requires_grad. `HarmonicConv2d` has arguments and errors.
        """
        refresh(conv)
        basis = dict(level=level, dc=dc, normalization=normalization, smoothness=smoothness)
        options = dict(conv_args(conv), **basis, form=form)
        # On meta the basis may still have values.
        layer: Any = cls(**options) if conv.weight.is_meta else nn.utils.skip_init(cls, **options)
        with torch.no_grad():
            layer.weight.copy_(layer.projected(conv.weight, assign=False))
            layer.weight.requires_grad_(conv.weight.requires_grad)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
                layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer.to(memory_format=format_of(conv.weight)).train(conv.training)

    def projected(self, stored: Tensor, assign: bool) -> Tensor:
        """Projects filters (O, C / groups, k, k) in the higher of the two precisions, and rounds them once."""
        fits = stored.shape == (*self.weight.shape[:2], *self.kernel_size)
        if not fits or self.kept is not None or self.mixtures is not None or self.kernel_size == (1, 1):
            return stored
        if stored.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(f'cannot project filters of dtype {stored.dtype}: convert them to floating point first')
        wide = stored.detach().to(torch.promote_types(stored.dtype, self.weight.dtype))
        coefficients = project(wide, self.basis_for(wide))
        dtype = stored.dtype if assign else self.weight.dtype
        if dtype == torch.float16 and not coefficients.is_meta:  # smoothness enlarges some of them
            largest = float(coefficients.abs().max())
            if largest > torch.finfo(dtype).max:
                raise InputError(f'coefficients up to {largest:.3g} overflow {dtype}: lower the smoothness')
        return coefficients.to(dtype)


class HarmonicConv2dSame(HarmonicConv2d):
    """`HarmonicConv2d` with the padding of timm's Conv2dSame and TensorFlow: ceil(size / stride) positions come out."""

    dynamic_padding = True

    def _padded(self, x: Tensor) -> Tensor:
        x = x if self.mixtures is None else F.conv2d(x, self.mixtures)  # TorchScript has no super()
        return pad_same(x, self.kernel_size, self.stride, self.dilation)
