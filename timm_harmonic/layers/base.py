"""What both harmonic layers share: nn.Conv2d's arguments, the coefficients and the basis that they refer to."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import Tensor, nn

from ..common import InputError
from .compose import format_of
from .dct import check_level, check_smoothness, dct_basis, dct_frequencies, full_level, name_of_basis
from .separable import check_form, mixing, pool_padding, responding

IntPair = int | tuple[int, int]

_FEW_CHANNELS = 16  # of a filter
# The arguments of nn.Conv2d that it stores under the same names.
_CONV_ARGS = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')


def conv_args(conv: nn.Module) -> dict[str, Any]:
    """Arguments that give another convolution, plain or harmonic, this one's geometry, device and dtype."""
    args = {name: getattr(conv, name) for name in _CONV_ARGS}
    return dict(args, bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype)


def write_name(name: str, device: torch.device | str = 'cpu') -> Tensor | None:
    """The name of a basis as a layer's `basis_name`: bytes (N,), None for the authors' basis.

    A letter's code is doubled and one is added: an average that scripts make of equal bytes may be one less.
    """
    if name == 'l1':
        return None
    return torch.tensor([2 * code + 1 for code in name.encode('ascii')], dtype=torch.uint8, device=device)


def read_name(basis_name: Tensor | None) -> str:
    """The name in a layer's `basis_name`, whatever dtype a script has averaged or cast it to."""
    if basis_name is None:
        return 'l1'
    codes = basis_name.to('cpu', torch.uint8).flatten()
    doubled = len(codes) > 0 and codes[0] >= 2 * ord('a')  # files of before have the letters' own codes
    return bytes((codes // 2 if doubled else codes).tolist()).decode(errors='replace')


class HarmonicLayer(nn.Module):
    """Arguments, coefficients and basis of a harmonic layer; subclasses say what is convolved."""

    if TYPE_CHECKING:  # TorchScript would take an annotated bias for optional
        weight: Tensor
        bias: Tensor | None
        basis: Tensor
        basis_name: Tensor | None

    dynamic_padding = False  # by the size of the input, as timm's Conv2dSame does

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
        smoothness: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        form: str = 'dense',
    ) -> None:
        super().__init__()
        for name, channels in (('in_channels', in_channels), ('out_channels', out_channels)):
            if channels < 1:
                raise InputError(f'{name} must be at least 1, got {channels}.')
        mode: Any = padding_mode
        # nn.Conv2d checks and completes its own arguments. On the meta device it allocates nothing.
        conv: Any = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, mode, 'meta'
        )
        for name in (*_CONV_ARGS, 'output_padding', '_reversed_padding_repeated_twice'):
            setattr(self, name, getattr(conv, name))
        side, width = conv.kernel_size
        if side != width:
            raise InputError(f'harmonic filters are square, got kernel_size={kernel_size!r}.')
        self.level = check_level(level, full_level(side))
        self.dc = dc
        self.normalization = normalization
        self.smoothness = check_smoothness(smoothness)
        self.form = check_form(form)
        # Share of the filters' energy that truncation left. Conversions set it; unknown for new or loaded coefficients.
        self.energy_kept: float | None = None
        # What evaluation takes by form, for one batch of example images. Measurements set it.
        self.milliseconds: dict[str, float] | None = None

        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        count = len(dct_frequencies(side, level, dc))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, count, 1, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.register_buffer('basis', None, persistent=False)
        self.register_buffer('basis_name', None)
        self._add_norm()
        self.init_non_persistent_buffers()
        self.reset_parameters()

    def _add_norm(self) -> None:
        """Adds the module that normalises responses, in a layer that has one."""

    def reset_parameters(self) -> None:
        """Initialises the coefficients and the bias."""
        raise NotImplementedError

    def init_non_persistent_buffers(self) -> None:
        """Builds the basis anew on the coefficients' device, in the precision that filters are composed in.

        Its name goes into the state dict, as bytes of text, unless it is the authors' basis.
        """
        # An attribute, because TorchScript has to know whether it is None.
        pools = self.level == 1 and self.dc and self.padding_mode == 'zeros'
        self.pool_padding = pool_padding(self.kernel_size[0], self.padding, self.dilation) if pools else None
        stored = self._stored_coefficients()
        with torch.inference_mode(False):  # a buffer that is made in inference mode cannot be trained with
            self.basis = self.basis_for(stored)
            self.basis_name = write_name(self.named_basis(), stored.device)

    def _stored_coefficients(self) -> Tensor:
        """The parameter that the coefficients are or, pruned and normed, are computed from: it is what casts reach."""
        names = ('weight', 'parametrizations.weight.')
        for name, parameter in self.named_parameters():
            if name.startswith(names):
                return parameter
        return self.weight

    def basis_for(self, like: Tensor) -> Tensor:
        """Basis (P, k, k) on a tensor's device and in its precision, but never below float32.

        It is float64 if a filter has few channels, on devices that have float64: in so short a sum the rounding of the
        filters would show, and there are few coefficients. On CUDA it always is: where TF32 is allowed, as timm's
        scripts do, products of float32 have three digits.
        """
        kind = like.device.type
        exact = kind == 'cuda' or (kind != 'mps' and self.in_channels // self.groups <= _FEW_CHANNELS)
        dtype = torch.promote_types(like.dtype, torch.float64 if exact else torch.float32)
        side = self.kernel_size[0]
        options = (side, self.level, self.dc, self.normalization, self.smoothness)
        return dct_basis(*options, device=like.device, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'HarmonicLayer':
        # A cast would round the basis for good, and to_empty() would lose it.
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, weight = f'{prefix}basis_name', f'{prefix}weight'
        stored = state_dict.get(weight)
        if isinstance(stored, Tensor):
            try:
                coefficients = self.coefficients_of(stored, local_metadata.get('assign_to_params_buffers', False))
            except ValueError as error:
                error_msgs.append(f'{weight}: {error}')
                return
            if coefficients is not stored:  # they refer to our basis now
                state_dict = {**state_dict, weight: coefficients}
            elif problem := self.other_basis(state_dict.get(key)):
                error_msgs.append(f'{weight}: {problem}')
                return
        else:
            # Pruned or normed, the weight is computed from what is there in its place.
            computed = any(name.startswith((weight, f'{prefix}parametrizations.weight.')) for name in state_dict)
            if computed and (problem := self.other_basis(state_dict.get(key))):
                error_msgs.append(f'{weight}: {problem}')
                return
        self.energy_kept = None
        reports = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k != key}, prefix, *reports)
        if key in missing_keys:
            missing_keys.remove(key)  # it was compared above
        # With assign=True the coefficients may be on another device or in another dtype now.
        self.init_non_persistent_buffers()

    def coefficients_of(self, stored: Tensor, assign: bool) -> Tensor:
        """What a state dict holds, or the coefficients of it if it is something else that the layer can take.

        `assign` says that the tensor becomes the parameter, and is not copied into it. Raises ValueError with a reason.
        """
        return stored

    def named_basis(self) -> str:
        """What the coefficients refer to, see `name_of_basis`."""
        return name_of_basis(self.normalization, self.smoothness)

    def other_basis(self, basis_name: Tensor | None) -> str:
        """Why coefficients do not fit if their state dict has this name of a basis; empty if they do."""
        theirs, ours = read_name(basis_name), self.named_basis()
        return '' if theirs == ours else f"its coefficients refer to the basis {theirs!r}, the layer's to {ours!r}"

    def coefficients(self) -> Tensor:
        """Coefficients (O, C / groups, P, 1) of the filters that evaluation uses."""
        return self.weight

    def extra_repr(self) -> str:
        """Arguments that differ from the defaults, in nn.Conv2d's manner."""
        full = full_level(self.kernel_size[0])
        defaults = dict(level=full, dc=True, normalization='l1', smoothness=None, form='dense')
        ours = [f', {k}={getattr(self, k)!r}' for k, default in defaults.items() if getattr(self, k) != default]
        return nn.Conv2d.extra_repr(cast(nn.Conv2d, self)) + ''.join(ours)

    def _convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """What nn.Conv2d computes, with the filters given."""
        if self.padding_mode != 'zeros':
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, filters, bias, self.stride, (0, 0), self.dilation, groups)
        return F.conv2d(x, filters, bias, self.stride, self.padding, self.dilation, groups)

    def _respond(self, x: Tensor, functions: Tensor) -> Tensor:
        """Responses (B, C * P, H', W') of every channel to functions (P, k, k), in the order c * P + n."""
        filters = responding(functions.to(self.weight.dtype), self.in_channels)
        return self._convolve(x, filters, None, self.in_channels)

    def _separate(self, x: Tensor, coefficients: Tensor, bias: Tensor | None) -> Tensor:
        """The layer in separable form: responses (B, C * P, H', W') to the functions, mixed by the coefficients."""
        if self.pool_padding is not None:
            responses = F.avg_pool2d(x, self.kernel_size, self.stride, self.pool_padding)
            coefficients = coefficients * self.basis.sum().to(coefficients.dtype)
        else:
            responses = self._respond(x, self.basis)
        return F.conv2d(responses, mixing(coefficients), bias, groups=self.groups)

    def _to_conv2d(self, filters: Tensor, bias: Tensor | None, **changed: Any) -> nn.Conv2d:
        """A plain convolution with these filters and the layer's geometry, but for the arguments that are changed."""
        args = dict(conv_args(self), bias=bias is not None, **changed)
        same = self.dynamic_padding and args['kernel_size'] == self.kernel_size  # 1 x 1 needs no padding
        if same:
            args = {key: value for key, value in args.items() if key not in ('padding', 'padding_mode')}
        conv = nn.utils.skip_init(Conv2dSame if same else nn.Conv2d, **args)
        with torch.no_grad():
            conv.weight.copy_(filters)
            conv.weight.requires_grad_(self.weight.requires_grad)
            if bias is not None:
                conv.bias.copy_(bias)
                conv.bias.requires_grad_((self.weight if self.bias is None else self.bias).requires_grad)
        return conv.to(memory_format=format_of(self.weight)).train(self.training)

    def _to_sequential(self, coefficients: Tensor, bias: Tensor | None) -> nn.Sequential:
        """Plain modules that compute the separable form: `respond`, which is fixed, and `mix`."""
        channels = len(self.basis) * self.in_channels
        if self.pool_padding is not None:
            pool: Any = AvgPool2dSame if self.dynamic_padding else nn.AvgPool2d
            respond: nn.Module = pool(self.kernel_size, self.stride, self.pool_padding).train(self.training)
            coefficients = coefficients * self.basis.sum()
        else:
            filters = responding(self.basis, self.in_channels)
            respond = self._to_conv2d(filters, None, out_channels=channels, groups=self.in_channels)
            respond.requires_grad_(False)
        point: dict[str, Any] = dict(kernel_size=1, stride=1, padding=0, dilation=1, padding_mode='zeros')
        mix = self._to_conv2d(mixing(coefficients), bias, in_channels=channels, **point)
        return nn.Sequential(OrderedDict(respond=respond, mix=mix)).train(self.training)
