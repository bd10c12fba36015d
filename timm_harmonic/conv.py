"""The two harmonic layers: convolutions whose filters are learned combinations of fixed DCT functions."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dct import analyze, dct_basis, dct_frequencies, synthesize

__all__ = ['HarmonicBlock2d', 'HarmonicConv2d', 'conv_args']

IntPair = int | tuple[int, int]

# What nn.Conv2d is built from, and stores under the same names.
_CONV_ARGS = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')


def conv_args(conv: nn.Module) -> dict[str, Any]:
    """Constructor arguments that give another convolution, plain or harmonic, the geometry and place of this one.

    Args:
        conv: An nn.Conv2d or a harmonic layer.

    Returns:
        Keyword arguments, device and dtype included.
    """
    args = {name: getattr(conv, name) for name in _CONV_ARGS}
    return dict(args, bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype)


def _outside_autocast(device_type: str) -> AbstractContextManager:
    """Context in which autocast does not lower precision, on devices that have it (meta has none)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _compose(weight: Tensor, basis: Tensor) -> Tensor:
    """Filters (O, I, k, k) of coefficients (O, I, P, 1): one product, in basis' precision whatever autocast says."""
    if torch.jit.is_scripting():  # TorchScript knows no such context
        filters = synthesize(weight, basis)
    else:
        with _outside_autocast(weight.device.type):
            filters = synthesize(weight, basis)
    return filters


def _fold(
    weight: Tensor,
    basis: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Filters (O, I, k, k) and bias (O,) that stand for normalising the responses and mixing them.

    A response r_cn enters the mix as w_ocn (gamma_cn (r_cn - mean_cn) / sqrt(var_cn + eps) + beta_cn).

    Args:
        weight: Mixing coefficients (O, I, P, 1), where I counts the channels of one group.
        basis: (P, k, k), its dtype is the precision of the result.
        mean: Mean of the responses (C * P,), channel-major.
        var: Variance of the responses (C * P,).
        gamma: Scale after normalisation (C * P,), None for 1.
        beta: Shift after normalisation (C * P,), None for 0.
        eps: Added to the variance.
        groups: Number of groups.
    """
    scale = torch.rsqrt(var.to(basis.dtype) + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    # (groups, O / groups, I, P) * (groups, 1, I, P)
    grouped = (groups, -1, weight.shape[1], weight.shape[2])
    mix = weight.to(basis.dtype).reshape(grouped)
    bias = (mix * shift.reshape(grouped)).sum((2, 3)).reshape(-1)
    return _compose((mix * scale.reshape(grouped)).reshape(weight.shape), basis), bias


def _in_format_of(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x, so that the layers after it run as they would after a plain convolution."""
    return y.contiguous() if x.is_contiguous() else y


# Leaves for torch.fx: a trace must keep what these functions decide by dtype, device or memory format.
torch.fx.wrap('_compose')
torch.fx.wrap('_fold')
torch.fx.wrap('_in_format_of')


class _HarmonicLayer(nn.Module):
    """What both layers share: nn.Conv2d's arguments, the coefficients and the basis they refer to."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: str | IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        level: int | None = None,
        dc: bool = True,
        normalization: str = 'l1',
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, channels in (('in_channels', in_channels), ('out_channels', out_channels)):
            if channels < 1:
                raise ValueError(f'{name} must be at least 1, got {channels}.')
        # nn.Conv2d checks and completes its own arguments; on the meta device it allocates nothing.
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
            padding_mode=padding_mode,
            device='meta',
        )
        for name in (*_CONV_ARGS, '_reversed_padding_repeated_twice'):
            setattr(self, name, getattr(conv, name))
        if self.kernel_size[0] != self.kernel_size[1]:
            raise ValueError(f'harmonic filters are square, got kernel_size={kernel_size!r}.')
        self.level = level
        self.dc = dc
        self.normalization = normalization
        dd = {'device': device, 'dtype': dtype}
        count = len(dct_frequencies(self.kernel_size[0], level, dc))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, count, 1, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.register_buffer('basis', None, persistent=False)
        self.init_non_persistent_buffers()
        self._init_norm()
        self.reset_parameters()

    def _init_norm(self) -> None:
        pass  # a layer that normalises its responses adds the module here

    def init_non_persistent_buffers(self) -> None:
        """Builds the basis anew where the coefficients are, in their precision but never below float32."""
        self.basis = dct_basis(
            self.kernel_size[0],
            self.level,
            self.dc,
            self.normalization,
            device=self.weight.device,
            dtype=torch.promote_types(self.weight.dtype, torch.float32),
        )

    def _apply(self, fn, recurse=True):
        # A cast would round the basis for good, and to_empty() would lose it.
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        # With assign=True the coefficients may come to another device or dtype, as from the meta device.
        super()._load_from_state_dict(*args, **kwargs)
        self.init_non_persistent_buffers()

    def extra_repr(self) -> str:
        """Arguments that differ from the defaults, in nn.Conv2d's manner."""
        text = f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}'
        given = dict(
            padding=(self.padding, (0, 0)),
            dilation=(self.dilation, (1, 1)),
            groups=(self.groups, 1),
            bias=(self.bias is not None, True),
            padding_mode=(self.padding_mode, 'zeros'),
            level=(self.level, None),
            dc=(self.dc, True),
            normalization=(self.normalization, 'l1'),
        )
        return text + ''.join(f', {k}={v!r}' for k, (v, default) in given.items() if v != default)

    def _convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        if self.padding_mode != 'zeros':
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, filters, bias, self.stride, (0, 0), self.dilation, groups)
        return F.conv2d(x, filters, bias, self.stride, self.padding, self.dilation, groups)

    def _plain(self, filters: Tensor, bias: Tensor | None) -> nn.Conv2d:
        args = dict(conv_args(self), bias=bias is not None)
        conv = nn.utils.skip_init(nn.Conv2d, **args)
        with torch.no_grad():
            conv.weight.copy_(filters)
            conv.weight.requires_grad_(self.weight.requires_grad)
            if bias is not None:
                conv.bias.copy_(bias)
                conv.bias.requires_grad_((self.weight if self.bias is None else self.bias).requires_grad)
        return conv.train(self.training)


class HarmonicConv2d(_HarmonicLayer):
    """Convolution with filters sum_n weight[o, i, n] d_n over DCT functions d_n (arXiv:2001.06570).

    Equal to filtering every input channel by every DCT function and mixing the responses by a 1 x 1 convolution.
    Input (B, C, H, W), output as nn.Conv2d's, for any H and W.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O.
        kernel_size: Side k of the filters, or a pair of equal sides.
        stride: As in nn.Conv2d.
        padding: As in nn.Conv2d, 'same' and 'valid' included.
        dilation: As in nn.Conv2d.
        groups: As in nn.Conv2d.
        bias: Whether a learned bias is added.
        padding_mode: As in nn.Conv2d.
        level: The paper's lambda: keep the frequencies with i + j < level; None keeps all k * k.
        dc: Whether the constant function is kept.
        normalization: 'l1' (the authors') or 'ortho'.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        weight: Coefficients (O, C / groups, P, 1).
        bias: (O,) or None.
        basis: DCT functions (P, k, k); a buffer that no state dict holds.

    Raises:
        ValueError: If an argument is out of range, naming it.
    """

    def reset_parameters(self) -> None:
        """Kaiming normal over fan-out, std sqrt(2 / (O * P)), as the authors' code does; bias zero."""
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filters(self) -> Tensor:
        """The filters (O, C / groups, k, k), differentiable, in the coefficients' dtype."""
        return _compose(self.weight, self.basis).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.filters(), self.bias, self.groups)

    def fuse(self) -> nn.Conv2d:
        """A new nn.Conv2d that computes the same; this layer is left as it is."""
        return self._plain(self.filters(), self.bias)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        level: int | None = None,
        dc: bool = True,
        normalization: str = 'l1',
    ) -> 'HarmonicConv2d':
        """A harmonic layer with the filters of a convolution: exact at full level, else the nearest in L2.

        Args:
            conv: Convolution with square filters; it is left as it is.
            level: The paper's lambda, None for all frequencies.
            dc: Whether the constant function is kept.
            normalization: 'l1' or 'ortho'.

        Returns:
            Layer on conv's device, with its dtype, training flag and requires_grad.
        """
        layer = nn.utils.skip_init(cls, **conv_args(conv), level=level, dc=dc, normalization=normalization)
        with torch.no_grad():
            layer.weight.copy_(analyze(conv.weight, layer.basis))
            layer.weight.requires_grad_(conv.weight.requires_grad)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
                layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer.train(conv.training)


class HarmonicBlock2d(_HarmonicLayer):
    """The paper's harmonic block with normalised responses, its choice for the root layer
    (arXiv:2001.06570).

    Every input channel is filtered by every DCT function; the C * P responses are batch-normalised without affine
    parameters, then mixed by a 1 x 1 convolution. When the normalisation uses running statistics, all of it is one
    convolution with the normalisation folded in.

    Takes the arguments of `HarmonicConv2d`, and has the same attributes.

    Attributes:
        weight: Mixing coefficients (O, C / groups, P, 1).
        bn: BatchNorm2d(C * P, affine=False) over the responses, in the order c * P + n.

    Raises:
        ValueError: If an argument is out of range, naming it.
    """

    def _init_norm(self) -> None:
        self.bn = nn.BatchNorm2d(
            self.in_channels * self.weight.shape[2], affine=False, device=self.weight.device, dtype=self.weight.dtype
        )

    def reset_parameters(self) -> None:
        """Kaiming normal over the mix's fan-out, std sqrt(2 / O), as the authors' code does; bias zero."""
        nn.init.kaiming_normal_(self.weight.flatten(1)[..., None, None], mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.bn.reset_running_stats()

    def responses(self, x: Tensor) -> Tensor:
        """DCT responses (B, C * P, H', W') of images (B, C, H, W), before normalisation, in channels_last order."""
        # Filtering, normalising and mixing are all faster so: half the time of a root with 3 channels on a CPU.
        filters = self.basis.to(self.weight.dtype).repeat(self.in_channels, 1, 1).unsqueeze(1)
        return self._convolve(x.contiguous(memory_format=torch.channels_last), filters, None, self.in_channels)

    def is_foldable(self) -> bool:
        """Whether the normalisation has running statistics, as nn.BatchNorm2d and its relatives do."""
        return hasattr(self.bn, 'running_mean') and self.bn.running_mean is not None

    def folded(self) -> tuple[Tensor, Tensor]:
        """Filters (O, C / groups, k, k) and bias (O,) with the running statistics folded in, differentiable."""
        bn = self.bn
        filters, bias = _fold(
            self.weight, self.basis, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, self.groups
        )
        if self.bias is not None:
            bias = bias + self.bias
        return filters.to(self.weight.dtype), bias.to(self.weight.dtype)

    def filters(self) -> Tensor:
        """The filters (O, C / groups, k, k) of evaluation, differentiable."""
        return self.folded()[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.bn.training or not self.is_foldable():
            responses = self.bn(self.responses(x))
            y = F.conv2d(responses, self.weight.flatten(1)[:, :, None, None], self.bias, groups=self.groups)
            return _in_format_of(y, x)
        filters, bias = self.folded()
        return self._convolve(x, filters, bias, self.groups)

    def fuse(self) -> nn.Conv2d:
        """A new nn.Conv2d, with a bias, that computes the same in evaluation; this layer is left as it is.

        Raises:
            ValueError: If `bn` has been replaced by a module without running statistics.
        """
        if not self.is_foldable():
            raise ValueError(f'cannot fuse: {type(self.bn).__name__} has no running statistics to fold into filters.')
        return self._plain(*self.folded())
