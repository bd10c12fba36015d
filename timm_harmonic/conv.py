"""The harmonic layer: a convolution whose filters are learned combinations of fixed DCT functions."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dct import analyze, dct_basis, dct_frequencies, synthesize

__all__ = ['HarmonicConv2d', 'HarmonicLayer', 'compose', 'conv_args', 'outside_autocast']

IntPair = int | tuple[int, int]

_FEW = 16  # input channels of a group

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


def _format_of(weight: Tensor) -> torch.memory_format:
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


def outside_autocast(device_type: str) -> AbstractContextManager:
    """Context in which autocast does not lower precision, on devices that have it (meta has none)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def compose(weight: Tensor, basis: Tensor) -> Tensor:
    """Filters (O, I, k, k) of coefficients (O, I, P, 1): one product, in basis' precision whatever autocast says."""
    if torch.jit.is_scripting():  # TorchScript knows no such context
        filters = synthesize(weight, basis)
    else:
        with outside_autocast(weight.device.type):
            filters = synthesize(weight, basis)
    return filters


# A leaf for torch.fx: a trace must keep what it decides by dtype, device or memory format.
torch.fx.wrap('compose')


class HarmonicLayer(nn.Module):
    """What both layers share: nn.Conv2d's arguments, the coefficients and the basis they refer to."""

    __jit_unused_properties__ = ('energy_kept', 'full_level')

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
        self._energy_kept: float | None = None
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
        """Builds the basis anew where the coefficients are, in the precision that filters are composed in.

        That is the coefficients', but never below float32; and float64 where a filter sees few channels, on every
        device that has it: so short a sum would show the rounding of its filters, and there are few coefficients.
        """
        self.basis = self._basis_for(self.weight)

    def _basis_for(self, weight: Tensor) -> Tensor:
        few = weight.shape[1] <= _FEW and weight.device.type != 'mps'
        return dct_basis(
            self.kernel_size[0],
            self.level,
            self.dc,
            self.normalization,
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float64 if few else torch.float32),
        )

    def _apply(self, fn, recurse=True):
        # A cast would round the basis for good, and to_empty() would lose it.
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self._energy_kept = None
        # With assign=True the coefficients may come to another device or dtype, as from the meta device.
        super()._load_from_state_dict(*args, **kwargs)
        self.init_non_persistent_buffers()

    @property
    def full_level(self) -> int:
        """The lowest level that keeps all frequencies, 2k - 1."""
        return 2 * self.kernel_size[0] - 1

    @property
    def energy_kept(self) -> float | None:
        """Share of the filters' energy that truncation left; None if coefficients came without those that are missing,
        as a new layer's or loaded ones."""
        return 1.0 if self.level is None or self.level == self.full_level else self._energy_kept

    def mixing(self) -> Tensor:
        """Factors (O, C / groups, P, 1) of the DCT functions in the filters of evaluation: here, the coefficients."""
        return self.weight

    def energy(self) -> Tensor:
        """Energy of the filters at each kept frequency, summed over all filters: (P,), float64, on the CPU.

        DCT functions are orthogonal, so the energies add up to the squared norm of `filters()`.
        """
        functions = self.basis.detach().to('cpu', torch.float64).square().sum((1, 2))
        return self.mixing().detach().to('cpu', torch.float64).square().sum((0, 1, 3)) * functions

    def truncated(self, level: int | None) -> 'HarmonicLayer':
        """A new layer without the frequencies i + j >= level, the best approximation of the filters in L2.

        Args:
            level: The paper's lambda; None, or one that is not below this layer's, drops nothing.

        Returns:
            Layer of the same kind; this one is left as it is.

        Raises:
            ValueError: If level < 1, if nothing would be left, or if responses are normalised in a way that cannot be
                reduced.
        """
        layer = copy.deepcopy(self)
        side, now = self.kernel_size[0], self.level or self.full_level
        if level is None or level >= now:
            return layer
        present = dct_frequencies(side, self.level, self.dc)
        kept = [present.index(pair) for pair in dct_frequencies(side, level, self.dc)]
        layer._keep(kept)
        layer.level = level
        layer.init_non_persistent_buffers()
        if self.energy_kept is not None and not self.weight.is_meta:
            layer._energy_kept = self.energy_kept * layer._share_of(self.energy().sum())
        return layer

    def _share_of(self, energy: Tensor) -> float:
        """Share of this energy that the filters have; of none they have all."""
        return float(self.energy().sum() / energy) if energy != 0 else 1.0

    def _keep(self, kept: list[int]) -> None:
        kept_weight = self.weight.detach()[:, :, kept].contiguous(memory_format=_format_of(self.weight))
        self.weight = nn.Parameter(kept_weight, self.weight.requires_grad)

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
        return conv.to(memory_format=_format_of(self.weight)).train(self.training)


class HarmonicConv2d(HarmonicLayer):
    """Convolution with filters sum_n weight[o, i, n] d_n over DCT functions d_n (arXiv:2001.06570).

    Equal to filtering every input channel by every DCT function and mixing the responses by a 1 x 1 convolution.
    Input (B, C, H, W), output as nn.Conv2d's, for any H and W.

    A state dict may hold the filters (O, C / groups, k, k) of a plain convolution in the place of the coefficients:
    they are projected, exactly at full level, else to the nearest in L2.

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

    def project(self, weight: Tensor) -> Tensor:
        """Coefficients (O, C, P, 1) of filters (O, C, k, k), the nearest in L2; anything else is returned as it is."""
        if weight.ndim != 4 or weight.shape[2:] != self.kernel_size or self.kernel_size[0] == 1:
            return weight
        return analyze(weight.detach(), self._basis_for(weight)).to(weight.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        key = f'{prefix}weight'
        if key in state_dict:
            state_dict = {**state_dict, key: self.project(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def filters(self) -> Tensor:
        """The filters (O, C / groups, k, k), differentiable, in the coefficients' dtype."""
        return compose(self.weight, self.basis).to(self.weight.dtype)

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
        if level is not None and not conv.weight.is_meta:
            layer._energy_kept = layer._share_of(conv.weight.detach().to('cpu', torch.float64).square().sum())
        return layer.to(memory_format=_format_of(conv.weight)).train(conv.training)
