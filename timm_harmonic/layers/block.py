"""The harmonic block with normalised responses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ..common import InputError
from ..common.device import kind_of
from .base import HarmonicLayer, refresh
from .compose import compose, outside_autocast
from .dct import dct_spectrum

# With smoothness, the floor under each variance; on images of mean 0 and deviation 1 these average 1. Without a floor,
# a frequency is amplified by as much as it is rare in training, and sharper images look like other images.
_FLOOR = 0.05
# Responses computed at a time where only their statistics are needed.
_PIECE_CPU, _PIECE = 2**19, 2**26


def _fuse_norm(
    weight: Tensor, spectrum: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Fuses the normalisation of the responses into the mix: coefficients (O, I, P, 1) and bias (O,).

    A response r_cn enters the mix as weight_ocn s_n (gamma_cn (r_cn - mean_cn) / sqrt(var_cn + eps) + beta_cn), with
    the spectrum s. Statistics, gamma and beta are (C * P,), channel-major. The coefficients refer to the basis: s_n
    times the functions whose responses are r_cn.
    """
    scale = torch.rsqrt(var.to(weight.dtype) + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    channels, count = weight.shape[1:3]
    scale, shift = scale.reshape(-1, 1, channels, count), shift.reshape(-1, 1, channels, count)
    grouped = weight.reshape(scale.shape[0], -1, channels, count)  # (groups, O / groups, I, P)
    bias = (grouped * (shift * spectrum.to(weight.dtype))).sum((2, 3)).flatten()
    return (grouped * scale).reshape(weight.shape), bias


def _in_format_of(y: Tensor, x: Tensor) -> Tensor:
    """Brings y into the memory format of x, so that the next layers run as after a plain convolution."""
    return y.contiguous() if x.is_contiguous() else y


# torch.fx treats these as leaves: a trace would freeze their branches on dtype, device and memory format.
torch.fx.wrap('_fuse_norm')
torch.fx.wrap('_in_format_of')
torch.fx.wrap('compose')


class HarmonicBlock2d(HarmonicLayer):
    """The paper's harmonic block with normalised responses, its choice for the stem (arXiv:2001.06570).

    The layer filters every input channel by every DCT function, batch-normalises the C * P responses without affine
    parameters, and mixes them by a 1 x 1 convolution. It computes this as one dense convolution with the normalisation
    fused in: by running statistics in evaluation, by those of the batch in training. If the input needs a gradient in
    training, it takes the three steps explicitly.

    It takes the arguments of `HarmonicConv2d`, where `form` is the form of evaluation, raises the same errors and has
    the same attributes. With a smoothness it multiplies the normalised response to function n by s_n before mixing,
    puts a floor under the variances, and starts at the scale of a plain convolution; docs/layers.md says why.

    Attributes:
        weight: Mixing coefficients (O, C / groups, P, 1).
        spectrum: The factors s (P,), a non-persistent buffer; ones without smoothness.
        functions: The functions (P, k, k) whose responses are normalised, a non-persistent buffer: the basis before
            smoothness scales it.
        bn: BatchNorm2d(C * P, affine=False) over the responses, in the order c * P + n. Its eps is the authors' 1e-5;
            with a smoothness it is 0.05, for images of about mean 0 and deviation 1.
    """

    def _add_norm(self) -> None:
        dd: dict[str, Any] = {'device': self.basis.device, 'dtype': self.weight.dtype}
        eps = 1e-5 if self.smoothness is None else _FLOOR
        self.bn: Any = nn.BatchNorm2d(self.in_channels * self.weight.shape[2], eps, affine=False, **dd)
        self.register_buffer('spectrum', None, persistent=False)
        self.register_buffer('functions', None, persistent=False)

    def reset_parameters(self) -> None:
        """Kaiming normal over fan-out, std sqrt(2 / O) as in the authors' code, sqrt(2 / (O P)) with a smoothness."""
        weight = self.weight if self.smoothness is not None else self.weight.flatten(1)[..., None, None]
        nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.bn.reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        if not self.bn.training and self.has_statistics():
            if self.form == 'separable':
                return self._separate(x, *self._mix_in_eval())
            return self._convolve(x, *self._fused(), self.groups)
        if not torch.jit.is_scripting() and self._can_be_dense(x):
            return self._convolve(x, *self._fused_by_batch(x), self.groups)
        responses = self.bn(self.responses(x))
        mix = self.weight * self.spectrum.to(self.weight.dtype)[:, None]
        y = F.conv2d(responses, mix.flatten(1)[:, :, None, None], self.bias, groups=self.groups)
        return _in_format_of(y, x)

    def features(self, x: Tensor) -> Tensor:
        """Returns what evaluation mixes: normalised responses (B, C * P, H', W') times the spectrum."""
        spectrum = self.spectrum.to(self.weight.dtype).repeat(self.in_channels)
        return self.bn(self.responses(x)) * spectrum[:, None, None]

    def responses(self, x: Tensor) -> Tensor:
        """Returns the DCT responses (B, C * P, H', W') of images before normalisation, in channels_last order."""
        # In this order a stem with 3 channels filters, normalises and mixes in half the time on a CPU.
        return self._respond(x.contiguous(memory_format=torch.channels_last), self.functions)

    def init_non_persistent_buffers(self) -> None:
        super().init_non_persistent_buffers()
        with torch.inference_mode(False):
            self.spectrum = dct_spectrum(self.kernel_size[0], self.level, self.dc, self.smoothness).to(self.basis)
            dtype = torch.promote_types(self._coefficients_in_memory().dtype, torch.float32)
            self.functions = (self.basis / self.spectrum[:, None, None]).to(dtype)

    def fit_norm(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Drops scales of 1 and shifts of 0, as frozen norms store them, if `bn` has none; adds them if it has."""
        for name, neutral in (('weight', 1.0), ('bias', 0.0)):
            key, own = f'{prefix}bn.{name}', getattr(self.bn, name, None)
            stored, mean = state_dict.get(key), state_dict.get(f'{prefix}bn.running_mean')
            if own is None and stored is not None and not stored.is_meta and bool((stored == neutral).all()):
                del state_dict[key]
            elif own is not None and stored is None and mean is not None:
                state_dict[key] = torch.full_like(mean, neutral)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.fit_norm(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def has_statistics(self) -> bool:
        """Tells whether the normalisation has running statistics and no activation, as nn.BatchNorm2d and its kin."""
        return hasattr(self.bn, 'running_mean') and self.bn.running_mean is not None and not hasattr(self.bn, 'act')

    def coefficients(self) -> Tensor:
        """Returns the coefficients (O, C / groups, P, 1) of the filters of evaluation, normalisation included."""
        self._check_statistics('weigh frequencies')
        refresh(self)
        return self._mix_by(self.bn.running_mean, self.bn.running_var, self.basis.dtype)[0]

    def filters(self) -> Tensor:
        """Composes the filters (O, C / groups, k, k) of evaluation, differentiably."""
        refresh(self)
        with outside_autocast(self.weight.device.type):
            return self._fused()[0]

    def fuse(self, whole: bool = False) -> nn.Conv2d | nn.Sequential:
        """Returns new plain modules that compute the same in evaluation, with a bias; see `HarmonicConv2d.fuse`.

        Raises InputError if a module without running statistics has replaced `bn`.
        """
        self._check_statistics('fuse')
        refresh(self)
        if self.form == 'separable':
            return self._to_sequential(*self._mix_in_eval())
        with outside_autocast(self.weight.device.type):
            return self._to_conv2d(*self._fused())

    def _keep_responses(self, kept: list[int]) -> None:
        bn, count = self.bn, self.weight.shape[2]
        kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
        if not isinstance(bn, kinds) or next(bn.children(), None) is not None:
            raise InputError(f'cannot truncate: {type(bn).__name__} is no batch normalisation that can drop responses.')
        index = torch.arange(self.in_channels * count, device=self.weight.device).reshape(-1, count)[:, kept].flatten()
        for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
            if tensor is not None:
                tensor.data = tensor.data[index]
        bn.num_features = len(index)

    def _check_statistics(self, purpose: str) -> None:
        if not self.has_statistics():
            raise InputError(f'cannot {purpose}: {type(self.bn).__name__} has no running statistics, or an activation.')

    def _fused(self) -> tuple[Tensor, Tensor]:
        return self._fused_by(self.bn.running_mean, self.bn.running_var, self._basis_for_product())

    def _fused_by(self, mean: Tensor, var: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        coefficients, bias = self._mix_by(mean, var, basis.dtype)
        filters = compose(coefficients, basis, self.weight)
        return filters.to(self.weight.dtype), bias.to(self.weight.dtype)

    def _mix_in_eval(self) -> tuple[Tensor, Tensor]:
        coefficients, bias = self._mix_by(self.bn.running_mean, self.bn.running_var, self.basis.dtype)
        return coefficients.to(self.weight.dtype), bias.to(self.weight.dtype)

    def _mix_by(self, mean: Tensor, var: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm = (mean, var, self.bn.weight, self.bn.bias, self.bn.eps)
        coefficients, bias = _fuse_norm(self.weight.to(dtype), self.spectrum, *norm)
        return coefficients, bias if self.bias is None else bias + self.bias

    @torch.jit.unused
    def _can_be_dense(self, x: Tensor) -> bool:
        """Tells whether training can use one dense convolution: `bn` is our own, and x needs no gradient."""
        # A gradient for x would need the responses. The explicit form also handles inputs without statistics: an empty
        # batch, and an image without a batch dimension, which it refuses.
        if isinstance(x, torch.fx.Proxy) or type(self.bn) is not nn.BatchNorm2d or not self.bn.training:
            return False
        # Inputs that do not fit are refused before statistics change.
        fits = x.ndim == 4 and x.shape[1] == self.in_channels
        fits = fits and (x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type))
        return fits and x.shape[0] > 0 and not x.requires_grad  # len() would fix the batch of an exported program

    @torch.jit.unused
    def _fused_by_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fuses this batch's statistics into filters and bias, and updates the running ones as nn.BatchNorm2d does."""
        basis = self._basis_for_product()
        with outside_autocast(x.device.type):
            mean, var, count = self._response_statistics(x.to(torch.promote_types(x.dtype, torch.float32)))
            self._update_running_statistics(mean.detach(), var.detach(), count)
            return self._fused_by(mean, var, basis)

    def _response_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Returns mean and biased variance (C * P,) of the responses over batch and positions, and their number.

        It filters each channel of each image as an image of its own, a few at a time, and keeps the statistics alone.
        Pieces that fit into the cache take half the time on a CPU, and pieces save memory everywhere.
        """
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        functions = self.functions.to(x.dtype).unsqueeze(1)  # (P, 1, k, k)
        on_cpu = kind_of(x) == 'cpu'
        images = x.reshape(-1, 1, height, width)
        parts: tuple[Tensor, ...] = (images,)
        if not torch.compiler.is_exporting():  # a program must not depend on the number of pieces
            positions = max(1, height * width // (self.stride[0] * self.stride[1]))  # about
            # A compiled graph contains every piece, so there they are large.
            small = on_cpu and not torch.compiler.is_compiling()
            parts = images.split(max(1, (_PIECE_CPU if small else _PIECE) // (positions * len(functions))))
        if len(parts) == 1 and not on_cpu:
            responses = self._convolve(images, functions, None, 1)
            count = batch * responses.shape[2] * responses.shape[3]
            var, mean = torch.var_mean(responses.reshape(batch, -1, *responses.shape[2:]), (0, 2, 3), correction=0)
            return mean, var, count
        means, variances, count = [], [], 0
        for part in parts:
            responses = self._convolve(part, functions, None, 1)
            count = responses.shape[2] * responses.shape[3]
            if on_cpu:  # takes half the time of var_mean
                mean = responses.mean((2, 3), keepdim=True)
                var = torch.linalg.vector_norm(responses.sub_(mean), dim=(2, 3)).square() / count
            else:
                var, mean = torch.var_mean(responses, (2, 3), correction=0)
            means.append(mean.flatten(1))
            variances.append(var)
        # (B, C * P), each over the same number of responses
        of_images = torch.cat(means).reshape(batch, -1)
        mean = of_images.mean(0)
        within = torch.cat(variances).reshape(batch, -1).mean(0)
        return mean, within + (of_images - mean).square().mean(0), batch * count

    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        bn = self.bn
        if count < 2:
            raise InputError(f'expected more than 1 response per channel when training, got {count}.')
        if bn.running_mean is None or not bn.track_running_stats:
            return
        bn.num_batches_tracked.add_(1)
        # Without momentum, the average over all batches: a tensor, because a number would wait for the device.
        factor = bn.momentum
        if factor is None:
            factor = bn.num_batches_tracked.to(mean.dtype).reciprocal().to(bn.running_mean.dtype)
        for running, new in ((bn.running_mean, mean), (bn.running_var, var * (count / (count - 1)))):
            running.lerp_(new.to(running.dtype), factor)
