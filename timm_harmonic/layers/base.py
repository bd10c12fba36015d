"""Base class of both harmonic layers: nn.Conv2d's arguments, the coefficients, the basis and the level."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ..common import InputError
from ..common.device import float64_device, kind_of
from .compose import FEW_CHANNELS, basis_for_product, format_of
from .dct import (
    check_level,
    code_of_basis,
    dct_basis,
    dct_frequencies,
    dct_spectrum,
    full_level,
    name_of_basis,
    options_of_basis,
    options_of_code,
)
from .separable import Gather, RepeatChannels, check_form, gather, mixing, responding

# Leaves of torch.fx: a trace would freeze their branches.
torch.fx.wrap('basis_for_product')
torch.fx.wrap('gather')

IntPair = int | tuple[int, int]

COMPUTED = 'its weight is computed (weight_norm, spectral_norm, pruning or the like): make that permanent first'
# The arguments that nn.Conv2d stores under their own names.
_CONV_ARGS = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')

_POINT: dict[str, Any] = dict(kernel_size=1, stride=1, padding=0, dilation=1, padding_mode='zeros')


def conv_args(conv: nn.Module) -> dict[str, Any]:
    """Returns the arguments that give another convolution this one's geometry, device and dtype."""
    args = {name: getattr(conv, name) for name in _CONV_ARGS}
    return dict(args, bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype)


def computes_weight(hook: Any) -> bool:
    """Tells whether a forward pre-hook computes a parameter: pruning, weight_norm, spectral_norm and their kin."""
    return hook is _complete or hasattr(hook, 'compute_weight') or hasattr(hook, 'apply_mask')


def refresh(layer: nn.Module) -> None:
    """Recomputes what pre-hooks compute, such as a pruned weight, as the next forward pass would; their state stays.

    Raises InputError if an unknown hook may compute the weight.
    """
    if isinstance(layer, HarmonicLayer):
        _complete(layer)
    for module in layer.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if computes_weight(hook)]
        if module._forward_pre_hooks and not hooks and 'weight' in vars(module):
            raise InputError(f'cannot tell the filters of {layer}: a hook may compute its weight, make that permanent.')
        buffers = module._buffers.copy()
        for name, buffer in module.named_buffers(recurse=False) if hooks else ():
            module._buffers[name] = buffer.clone()
        with torch.enable_grad():  # tells whether the weight is trained
            for hook in hooks:
                hook(module, ())
        module._buffers.update(buffers)


def owns_weight(layer: nn.Module) -> bool:
    """Tells whether a layer's weight is a parameter, not recomputed by pruning, weight_norm and the like."""
    return 'weight' in dict(layer.named_parameters(recurse=False))


def _complete(layer: 'HarmonicLayer', inputs: Any = None) -> None:
    """Builds the basis of a layer made on meta whose coefficients have values, however they were set; a pre-hook."""
    if _complete in layer._forward_pre_hooks.values() and not layer._coefficients_in_memory().is_meta:
        layer.init_non_persistent_buffers()


def _pairs_of(kept: Tensor, count: int) -> Tensor:
    """Returns the input channels and the functions (2, R) of the coefficients kept, in the order n * C + c."""
    if kept.is_meta:
        return torch.empty(2, count, dtype=torch.long, device=kept.device)
    return kept[0, :, :, 0].t().nonzero().t().flip(0)


class HarmonicLayer(nn.Module):
    """Arguments, coefficients and basis of a harmonic layer; subclasses define what is convolved."""

    dynamic_padding = False  # pads by the size of the input, as timm's Conv2dSame does

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
        # Which coefficients (1, C, P, 1) are kept; None for all. Averages and casts leave booleans as they are.
        self.kept: Tensor | None
        self.register_buffer('kept', None)
        self.register_buffer('pairs', None, persistent=False)
        # Which mixtures (M, C, 1, 1) of the input channels are filtered in place of these; None for none.
        self.mixtures: nn.Parameter | None
        self.register_parameter('mixtures', None)
        for name, channels in (('in_channels', in_channels), ('out_channels', out_channels)):
            if channels < 1:
                raise InputError(f'{name} must be at least 1, got {channels}.')
        # nn.Conv2d checks and completes its own arguments. On the meta device it allocates nothing.
        args: Any = (kernel_size, stride, padding, dilation, groups, False, padding_mode, 'meta')
        conv: Any = nn.Conv2d(in_channels, out_channels, *args)
        for name in (*_CONV_ARGS, 'output_padding', '_reversed_padding_repeated_twice'):
            setattr(self, name, getattr(conv, name))
        self.channels = in_channels  # that are filtered
        side, width = conv.kernel_size
        if side != width:
            raise InputError(f'harmonic filters are square, got kernel_size={kernel_size!r}.')
        self.level = check_level(level, full_level(side))
        self.dc = dc
        self.normalization = normalization
        self.smoothness = options_of_basis(normalization, smoothness).get('smoothness')
        self.form = check_form(form)
        # Share of the filters' energy that truncation left; None if unknown. Conversions set it.
        self.energy_kept = 1.0 if self.is_complete() else None
        # Time of evaluation by form, for one batch of example images. Measurements set it.
        self.milliseconds: dict[str, float] | None = None

        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        count = len(dct_frequencies(side, level, dc))
        # accelerate's init_empty_weights moves parameters to meta, and needs buffers where they are without it.
        here, asked = torch.empty(0, dtype=dtype), torch.empty(0, **dd)
        self.weight = nn.Parameter(here)
        self.basis: Tensor
        self.register_buffer('basis', here if asked.is_meta and self.weight.is_meta else asked, persistent=False)
        self.register_buffer('rounded', None, persistent=False)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, count, 1, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.register_buffer('basis_code', None)
        self._add_norm()
        self.init_non_persistent_buffers()
        self.reset_parameters()

    def _add_norm(self) -> None:
        """Adds the module that normalises responses, in a layer that has one."""

    def reset_parameters(self) -> None:
        """Kaiming normal over fan-out, std sqrt(2 / (O * P)), as in the authors' code; bias zero."""
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_non_persistent_buffers(self) -> None:
        """Rebuilds the basis where the coefficients are; while they alone are on meta, it stays where it is."""
        like = self._coefficients_in_memory()
        with torch.inference_mode(False):  # inference tensors could not be trained with
            self.basis = self.basis_for(self.basis.to(like.dtype) if like.is_meta else like)
            choice = kind_of(self.basis) == 'cuda' and self.basis.dtype == torch.float64 != like.dtype
            self.rounded = self.basis.float() if choice else None
            code = code_of_basis(self.normalization, self.smoothness)
            self.basis_code = None if code is None else code.to(self.basis.device)
            if self.kept is not None:
                self.pairs = _pairs_of(self.kept, self.weight.shape[1])
        # The absent ones come last: torch.export of the layer alone numbers buffers as if all were there.
        self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))
        for key in [key for key, hook in self._forward_pre_hooks.items() if hook is _complete]:
            del self._forward_pre_hooks[key]
        if self.basis.is_meta or like.is_meta:  # what says which coefficients are kept may come with them
            self.register_forward_pre_hook(_complete)
        # Each group mixes channels that lie together, so with groups every channel has its filters side by side.
        self.repeats = len(self.basis) if self.groups == 1 and self.kept is None else 1

    def _coefficients_in_memory(self) -> Tensor:
        """Returns the parameter that casts reach: the coefficients or, pruned or normed, what computes them."""
        for name, parameter in self.named_parameters():
            if name.startswith(('weight', 'parametrizations.weight.')):
                return parameter
        return self.weight

    def __getstate__(self) -> dict[str, Any]:
        # The history of a computed weight cannot be copied.
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in vars(self).items()}

    def basis_for(self, like: Tensor) -> Tensor:
        """Builds the basis (P, k, k) on a tensor's device and in its precision, but never below float32.

        Filters over few channels take float64 where the device has it, as few coefficients cost little. So does
        everything on CUDA, for products that TF32 would round; see `basis_for_product`.
        """
        exact = kind_of(like) == 'cuda' or self.channels // self.groups <= FEW_CHANNELS
        exact = exact and float64_device(like.device) == like.device
        dtype = torch.promote_types(like.dtype, torch.float64 if exact else torch.float32)
        options = (self.kernel_size[0], self.level, self.dc, self.normalization, self.smoothness)
        return dct_basis(*options, device=like.device, dtype=dtype)

    def _basis_for_product(self) -> Tensor:
        return basis_for_product(self.weight, self.basis, self.rounded, self.channels // self.groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'HarmonicLayer':
        # A cast would round the basis for good, and to_empty() would lose it.
        _complete(self)
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *reports: Any) -> None:
        _, missing_keys, _, error_msgs = reports
        key, weight = f'{prefix}basis_code', f'{prefix}weight'
        stored = state_dict.get(weight)
        # Pruned or normed, the weight is computed from what the state dict holds in its place.
        computed = any(name.startswith((f'{weight}_', f'{prefix}parametrizations.weight.')) for name in state_dict)
        problem = self.other_basis(state_dict.get(key)) if isinstance(stored, Tensor) or computed else ''
        if isinstance(stored, Tensor):
            try:
                coefficients = self.projected(stored, metadata.get('assign_to_params_buffers', False))
            except ValueError as error:
                problem, coefficients = str(error), stored
            if coefficients is not stored:  # they refer to our basis now
                problem, state_dict = '', {**state_dict, weight: coefficients}
        mask = state_dict.get(f'{prefix}kept')
        if self.kept is not None and isinstance(mask, Tensor) and isinstance(stored, Tensor) and not problem:
            mask = mask.double() > 0.5
            state_dict = {**state_dict, f'{prefix}kept': mask}
            if mask.shape == self.kept.shape and not mask.is_meta and int(mask.sum()) != stored.shape[1]:
                problem = f'it has {stored.shape[1]} coefficients for the {int(mask.sum())} pairs in {prefix}kept'
        if problem:
            error_msgs.append(f'{weight}: {problem}')
            return
        self.energy_kept = 1.0 if self.is_complete() else None
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k != key}, prefix, metadata, *reports)
        if key in missing_keys:
            missing_keys.remove(key)  # it was compared above
        # With assign=True the coefficients may be on another device or in another dtype now.
        self.init_non_persistent_buffers()

    def projected(self, stored: Tensor, assign: bool) -> Tensor:
        """Returns the coefficients of a state dict, which become the parameter (`assign`) or are copied into it."""
        return stored

    def named_basis(self) -> str:
        """Names what the coefficients refer to, see `name_of_basis`."""
        return name_of_basis(self.normalization, self.smoothness)

    def other_basis(self, code: Tensor | None) -> str:
        """Explains why coefficients do not fit if their state dict has this `basis_code`; empty if they do."""
        ours = code_of_basis(self.normalization, self.smoothness)
        try:
            theirs = options_of_code(code)
        except InputError as error:
            return str(error)
        if theirs == options_of_code(ours):
            return ''
        name = name_of_basis(theirs.get('normalization', 'l1'), theirs.get('smoothness'))
        return f'its coefficients refer to the basis {name!r}, those of the layer to {self.named_basis()!r}'

    def coefficients(self) -> Tensor:
        """Returns the coefficients (O, C / groups, P, 1) of the filters that evaluation uses."""
        refresh(self)
        return self._spread(self.weight)

    def _spread(self, weight: Tensor) -> Tensor:
        """Returns all coefficients (O, C / groups, P, 1): zeros fill up those kept."""
        if self.kept is None:
            return weight
        channels, count = self.kept.shape[1:3]
        zeros = weight.new_zeros(weight.shape[0], channels * count)
        if self.kept.is_contiguous():
            places = self.pairs[0] * count + self.pairs[1]
            return zeros.index_copy(1, places, weight.flatten(1)).reshape(-1, channels, count, 1)
        places = self.pairs[1] * channels + self.pairs[0]
        return zeros.index_copy(1, places, weight.flatten(1)).reshape(-1, count, channels, 1).transpose(1, 2)

    def format(self) -> torch.memory_format:
        """Returns the memory format of the filters; columns of pairs (O, R, 1, 1) cannot tell it."""
        return format_of(self.weight if self.kept is None else self.kept)

    def is_complete(self) -> bool:
        """Tells whether the layer can express every filter: it keeps all frequencies, in all channels, unmixed."""
        return self.dc and self.kept is self.mixtures is None and self.level == full_level(self.kernel_size[0])

    def energies(self) -> Tensor:
        """Returns the filters' energies by filtered channel of a group and frequency: (C / groups, P), float64, CPU."""
        functions = self.basis.detach().to('cpu', torch.float64).square().sum((1, 2))
        return self.coefficients().detach().to('cpu', torch.float64).square().sum((0, 3)) * functions

    def levels(self) -> range:
        """Returns the levels that the layer can be lowered to, from its own downwards."""
        used = range(len(self.basis)) if self.kept is None else self.pairs[1].tolist()
        pairs = dct_frequencies(self.kernel_size[0], self.level, self.dc)
        return range(self.level, min(sum(pairs[n]) for n in used), -1)

    def columns_at(self, level: int) -> Tensor:
        """Returns the places of the coefficients kept at a level, among those of a filter in the order of `weight`."""
        every = torch.arange(len(self.basis), device='cpu').repeat(self.channels // self.groups)
        functions = every if self.kept is None else self.pairs[1].cpu()
        return torch.isin(functions, torch.tensor(self.kept_at(level)[0], device='cpu')).nonzero()[:, 0]

    def kept_at(self, level: int) -> tuple[list[int], Tensor]:
        """Returns the places of the functions kept at a lower level, and the factors of their coefficients."""
        side, dc = self.kernel_size[0], self.dc
        present = dct_frequencies(side, self.level, dc)
        kept = [present.index(pair) for pair in dct_frequencies(side, level, dc)]
        # The spectrum is relative to the functions that a layer keeps.
        before, after = (dct_spectrum(side, of, dc, self.smoothness) for of in (self.level, level))
        return kept, before[kept] / after

    def at_level(self, level: int | None) -> 'HarmonicLayer':
        """Returns a copy without the frequencies i + j >= level. Each filter becomes the nearest in L2.

        A level above the layer's own drops nothing. Raises InputError if the level is out of range or leaves nothing,
        the weight is computed, or the layer cannot tell its normalisation to leave out responses.
        """
        if not owns_weight(self):
            raise InputError(f'cannot truncate {self}: {COMPUTED}.')
        level = min(self.level, check_level(level, full_level(self.kernel_size[0])))
        if level == self.level:
            return copy.deepcopy(self)
        if self.kept is not None and self.kept.is_meta:
            raise InputError(f'cannot lower the level of {self} on meta: its state dict says which pairs there are.')
        if self.kept is not None and not len(self.columns_at(level)):
            raise InputError(f'level {level} leaves no pairs of {self}: choose a higher one.')
        return self._at(level, self.kept)

    def _at(self, level: int, kept: Tensor | None, count: int = 0) -> Any:
        """Returns a copy at a level with the coefficients in `kept` (1, C, P, 1), or all; on meta there are `count`."""
        functions, factors = self.kept_at(level)
        new = copy.deepcopy(self)
        new._keep_responses(functions)
        factors = factors.to(self.weight.device, self.basis.dtype)[:, None]
        weight = self._spread(self.weight.detach())[:, :, functions] * factors
        if kept is not None:
            new.kept = kept[:, :, functions].contiguous(memory_format=self.format())
            new.pairs = _pairs_of(new.kept, count)
            weight = weight[:, new.pairs[0], new.pairs[1], :, None]
        # A clone, because torch may mistake the format of these strides, and then refuses to change it.
        format = torch.contiguous_format if kept is not None else self.format()
        weight = weight.to(self.weight).clone(memory_format=format)
        new.weight = nn.Parameter(weight, self.weight.requires_grad)
        new.level, new.milliseconds = level, None
        new.init_non_persistent_buffers()
        if new.energy_kept is not None and not self.weight.is_meta:
            energy = float(self.energies().sum())
            new.energy_kept *= float(new.energies().sum()) / energy if energy else 1.0
        return new

    def _keep_responses(self, kept: list[int]) -> None:
        """Drops the normalisation of all responses but those to these functions, in a layer that has one."""

    def extra_repr(self) -> str:
        full = full_level(self.kernel_size[0])
        defaults = dict(level=full, dc=True, normalization='l1', smoothness=None, form='dense')
        ours = [f', {k}={getattr(self, k)!r}' for k, default in defaults.items() if getattr(self, k) != default]
        ours += [] if self.kept is None else [f', pairs={self.weight.shape[1]}']
        ours += [] if self.mixtures is None else [f', mixtures={self.channels}']
        return nn.Conv2d.extra_repr(cast(nn.Conv2d, self)) + ''.join(ours)

    def _convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Convolves as nn.Conv2d does, with these filters."""
        if self.padding_mode != 'zeros':
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, filters, bias, self.stride, (0, 0), self.dilation, groups)
        return F.conv2d(x, filters, bias, self.stride, self.padding, self.dilation, groups)

    def _respond(self, x: Tensor, functions: Tensor) -> Tensor:
        """Returns the responses (B, C * P, H', W') of every channel to functions (P, k, k), in the order c * P + n."""
        functions = functions.to(self.weight.dtype)
        if self.kept is not None:
            filters = functions[self.pairs[1]].unsqueeze(1)
            return self._convolve(gather(x, self.pairs[0]), filters, None, filters.shape[0])
        return self._convolve(x, responding(functions, self.channels, False), None, self.channels)

    def _separate(self, x: Tensor, coefficients: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the separable form: responses (B, P * C, H', W') to the functions, mixed by the coefficients."""
        repeated = self.repeats > 1
        if repeated:
            x = torch.cat([x] * self.repeats, x.dim() - 3)
            filters = responding(self.basis.to(self.weight.dtype), self.channels, True)
            responses = self._convolve(x, filters, None, self.channels * self.repeats)
        else:
            responses = self._respond(x, self.basis)
        mix = mixing(coefficients, repeated) if self.kept is None else coefficients
        return F.conv2d(responses, mix, bias, groups=self.groups)

    def _to_conv2d(self, filters: Tensor, bias: Tensor | None, **changed: Any) -> nn.Conv2d:
        """Builds a plain convolution with these filters and the layer's geometry, except for the arguments changed."""
        args = {**conv_args(self), 'in_channels': self.channels, 'bias': bias is not None, **changed}
        same = self.dynamic_padding and args['kernel_size'] == self.kernel_size  # 1 x 1 needs no padding
        if same:
            args = {key: value for key, value in args.items() if key not in ('padding', 'padding_mode')}
        conv = nn.utils.skip_init(Conv2dSame if same else nn.Conv2d, **args)
        with torch.no_grad():
            conv.weight.copy_(filters)
            conv.weight.requires_grad_(self._coefficients_in_memory().requires_grad)
            if bias is not None:
                conv.bias.copy_(bias)
                conv.bias.requires_grad_((self.weight if self.bias is None else self.bias).requires_grad)
        return conv.to(memory_format=self.format()).train(self.training)

    def _in_sequence(self, **modules: nn.Module) -> nn.Sequential:
        """Builds plain modules, behind one that mixes the input channels if the layer does."""
        if self.mixtures is not None:
            sizes: dict[str, Any] = dict(in_channels=self.in_channels, out_channels=self.channels)
            modules = dict(mixtures=self._to_conv2d(self.mixtures, None, **sizes, **_POINT), **modules)
        return nn.Sequential(OrderedDict(modules)).train(self.training)

    def _to_sequential(self, coefficients: Tensor, bias: Tensor | None) -> nn.Sequential:
        """Builds plain modules that compute the separable form: `repeat` or `gather`, a fixed `respond`, and `mix`."""
        channels, repeated = self.weight[0].numel() * self.groups, self.repeats > 1
        modules: dict[str, nn.Module] = dict(repeat=RepeatChannels(self.repeats)) if repeated else {}
        filters, groups = responding(self.basis, self.channels, repeated), self.channels * self.repeats
        if self.kept is not None:
            modules['gather'] = Gather(self.pairs[0])
            filters, groups = self.basis[self.pairs[1]].unsqueeze(1), channels
        ends: dict[str, Any] = dict(in_channels=groups, out_channels=channels)
        respond = self._to_conv2d(filters, None, groups=groups, **ends).requires_grad_(False)
        mix = self._to_conv2d(mixing(coefficients, repeated), bias, in_channels=channels, **_POINT)
        return self._in_sequence(**modules, respond=respond, mix=mix)
