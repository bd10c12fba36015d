"""The harmonic block with normalised responses: the paper's choice for the stem (arXiv:2001.06570).

    y = mix(normalise(respond(x)))

respond() filters every input channel by every DCT function, mix() is a 1 x 1 convolution. The three are linear once the
statistics of the responses are known, so they are computed as one dense convolution wherever that is possible.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import InputError
from .base import HarmonicLayer
from .compose import compose, outside_autocast
from .dct import dct_spectrum

# With smoothness, what is added to a variance before it divides. For images of mean 0 and deviation 1 the variances of
# the responses are 1 on average. Without a floor, a frequency is amplified as much as it is rare in training, and
# sharper images, which have more of it, look like others.
_FLOOR = 0.05
# Responses that are computed at a time where only their statistics are wanted.
_PIECE_CPU, _PIECE = 2**19, 2**26


def _scale(var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """What normalisation multiplies the responses (C * P,) by."""
    scale = torch.rsqrt(var.to(dtype) + eps)
    if gamma is not None:
        scale = scale * gamma
    return scale


def _times(weight: Tensor, factors: Tensor, groups: int) -> Tensor:
    """Coefficients (O, I, P, 1) times factors of the responses (C * P,), channel-major."""
    # (groups, O / groups, I, P) * (groups, 1, I, P)
    grouped = (groups, -1, weight.shape[1], weight.shape[2])
    return (weight.reshape(grouped) * factors.reshape(grouped)).reshape(weight.shape)


def _fuse_norm(
    weight: Tensor,
    spectrum: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Coefficients (O, I, P, 1) and bias (O,) that equal normalising the responses and mixing them.

    A response r_cn enters the mix as weight_ocn s_n (gamma_cn (r_cn - mean_cn) / sqrt(var_cn + eps) + beta_cn), with
    the spectrum s. Statistics, gamma and beta are (C * P,), channel-major. The coefficients are for the basis, which is
    s_n times the functions that r_cn is the response to. The dtype of the spectrum is the precision of the result.
    """
    weight = weight.to(spectrum.dtype)
    scale = _scale(var, gamma, eps, spectrum.dtype)
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    mixed = _times(weight * spectrum[:, None], shift, groups)
    return _times(weight, scale, groups), mixed.sum((1, 2, 3))


def _in_format_of(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x, so that the next layers run as after a plain convolution."""
    return y.contiguous() if x.is_contiguous() else y


# Leaves for torch.fx: their branches on dtype, device and memory format must not be frozen in a trace.
torch.fx.wrap('_fuse_norm')
torch.fx.wrap('_in_format_of')
torch.fx.wrap('compose')


class HarmonicBlock2d(HarmonicLayer):
    """The paper's harmonic block with normalised responses, its choice for the stem (arXiv:2001.06570).

    Every input channel is filtered by every DCT function. The C * P responses are batch-normalised without affine
    parameters, then mixed by a 1 x 1 convolution. The layer computes this as one dense convolution with the
    normalisation fused in: by running statistics in evaluation, by those of the batch in training. If the input needs a
    gradient in training, it takes the three steps explicitly. The form of the layer is that of evaluation.

    Takes the arguments of `HarmonicConv2d` and has the same attributes.

    With a smoothness the normalised response to function n is multiplied by s_n before it is mixed, and variances have
    a floor: normalising makes nearly empty high frequencies as large as the others, and both take that back. The
    coefficients and the output then start at the scale of a plain convolution. The authors' start sqrt(P) times as
    large, which optimizers like Adam, whose steps do not know the scale, take as long to change.

    Attributes:
        weight: Mixing coefficients (O, C / groups, P, 1).
        spectrum: The factors s (P,), a buffer that is in no state dict; ones without smoothness.
        bn: BatchNorm2d(C * P, affine=False) over the responses, in the order c * P + n. Its eps is 1e-5, as the
            authors' is, and 0.05 with a smoothness, for images of about mean 0 and deviation 1.

    Raises:
        TypeError: If kernel_size, level or smoothness has another type.
        ValueError: If an argument is out of range, naming it.
    """

    def _add_norm(self) -> None:
        dd: dict[str, Any] = {'device': self.weight.device, 'dtype': self.weight.dtype}
        eps = 1e-5 if self.smoothness is None else _FLOOR
        self.bn: Any = nn.BatchNorm2d(self.in_channels * self.weight.shape[2], eps, affine=False, **dd)
        self.register_buffer('spectrum', None, persistent=False)

    def reset_parameters(self) -> None:
        """Kaiming normal over fan-out; bias zero.

        The std is sqrt(2 / O), that of the mix, as in the authors' code. With a smoothness it is sqrt(2 / (O * P)).
        """
        weight = self.weight if self.smoothness is not None else self.weight.flatten(1)[..., None, None]
        nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.bn.reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        if not self.bn.training and self.has_statistics():
            if self.form == 'separable':
                return self._separate(x, *self._mix_in_eval())
            filters, bias = self._fused()
            return self._convolve(x, filters, bias, self.groups)
        if not torch.jit.is_scripting() and self._can_be_dense(x):
            return self._convolve(x, *self._fused_by_batch(x), self.groups)
        responses = self.bn(self.responses(x))
        mix = self.weight * self.spectrum.to(self.weight.dtype)[:, None]
        y = F.conv2d(responses, mix.flatten(1)[:, :, None, None], self.bias, groups=self.groups)
        return _in_format_of(y, x)

    def features(self, x: Tensor) -> Tensor:
        """What the coefficients mix in evaluation: normalised responses (B, C * P, H', W') times the spectrum."""
        spectrum = self.spectrum.to(self.weight.dtype).repeat(self.in_channels)
        return self.bn(self.responses(x)) * spectrum[:, None, None]

    def responses(self, x: Tensor) -> Tensor:
        """DCT responses (B, C * P, H', W') of images (B, C, H, W), before normalisation, in channels_last order."""
        # In this order filtering, normalising and mixing take half the time on a CPU, for a stem with 3 channels.
        return self._respond(x.contiguous(memory_format=torch.channels_last), self._functions())

    def _functions(self) -> Tensor:
        """The functions (P, k, k) whose responses are normalised: the basis as it is before smoothness scales it."""
        return self.basis / self.spectrum[:, None, None]

    def init_non_persistent_buffers(self) -> None:
        """Builds the basis and the spectrum anew, see `HarmonicConv2d`."""
        super().init_non_persistent_buffers()
        with torch.inference_mode(False):
            self.spectrum = dct_spectrum(self.kernel_size[0], self.level, self.dc, self.smoothness).to(self.basis)

    def has_statistics(self) -> bool:
        """Whether the normalisation has running statistics, as nn.BatchNorm2d and its relatives do."""
        return hasattr(self.bn, 'running_mean') and self.bn.running_mean is not None

    def coefficients(self) -> Tensor:
        """Coefficients (O, C / groups, P, 1) of the filters that evaluation uses, normalisation included."""
        self._check_statistics('weigh frequencies')
        scale = _scale(self.bn.running_var, self.bn.weight, self.bn.eps, self.basis.dtype)
        return _times(self.weight.to(scale.dtype), scale, self.groups)

    def filters(self) -> Tensor:
        """The filters (O, C / groups, k, k) of evaluation, differentiable."""
        return self._fused()[0]

    def fuse(self) -> nn.Conv2d | nn.Sequential:
        """Plain modules that compute the same in evaluation, with a bias; see `HarmonicConv2d.fuse`.

        This layer stays as it is.

        Raises:
            ValueError: If `bn` was replaced by a module without running statistics.
        """
        self._check_statistics('fuse')
        if self.form == 'separable':
            return self._to_sequential(*self._mix_in_eval())
        return self._to_conv2d(*self._fused())

    def _check_statistics(self, purpose: str) -> None:
        if not self.has_statistics():
            raise InputError(f'cannot {purpose}: {type(self.bn).__name__} has no running statistics.')

    def _fused(self) -> tuple[Tensor, Tensor]:
        return self._fused_by(self.bn.running_mean, self.bn.running_var)

    def _fused_by(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Filters (O, C / groups, k, k) and bias (O,), with the responses normalised by these statistics."""
        coefficients, bias = self._mix_by(mean, var)
        filters = compose(coefficients, self.basis, self.weight)
        return filters.to(self.weight.dtype), bias.to(self.weight.dtype)

    def _mix_in_eval(self) -> tuple[Tensor, Tensor]:
        """Coefficients (O, C / groups, P, 1) and bias (O,), with the normalisation of evaluation fused in."""
        coefficients, bias = self._mix_by(self.bn.running_mean, self.bn.running_var)
        return coefficients.to(self.weight.dtype), bias.to(self.weight.dtype)

    def _mix_by(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        bn = self.bn
        statistics = (mean, var, bn.weight, bn.bias, bn.eps)
        coefficients, bias = _fuse_norm(self.weight, self.spectrum, *statistics, self.groups)
        return coefficients, bias if self.bias is None else bias + self.bias

    @torch.jit.unused
    def _can_be_dense(self, x: Tensor) -> bool:
        """Whether training can use one dense convolution: the normalisation is our own, and x needs no gradient."""
        # With a gradient for x the responses would have to be kept. The explicit form also takes inputs without
        # statistics: an empty batch, and an image without a batch dimension, which it refuses.
        if isinstance(x, torch.fx.Proxy) or type(self.bn) is not nn.BatchNorm2d or not self.bn.training:
            return False
        # What does not fit is refused before statistics change.
        fits = x.ndim == 4 and x.shape[1] == self.in_channels
        fits = fits and (x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type))
        return fits and len(x) > 0 and not x.requires_grad

    @torch.jit.unused
    def _fused_by_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Filters and bias with this batch's statistics fused in; updates the running ones as nn.BatchNorm2d does."""
        with outside_autocast(x.device.type):
            mean, var, count = self._response_statistics(x.to(torch.promote_types(x.dtype, torch.float32)))
            self._update_running_statistics(mean.detach(), var.detach(), count)
            return self._fused_by(mean, var)

    def _response_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance (C * P,) of the responses over batch and positions, and their number.

        Each channel of each image is filtered as an image of its own, a few at a time, and only its statistics are
        kept. Pieces that fit into the cache take half the time on a CPU, and pieces save memory everywhere.
        """
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        functions = self._functions().to(x.dtype).unsqueeze(1)  # (P, 1, k, k)
        images = x.reshape(-1, 1, height, width)
        positions = max(1, height * width // (self.stride[0] * self.stride[1]))  # about
        # A compiled graph contains every piece, so there they are large.
        small = x.device.type == 'cpu' and not torch.compiler.is_compiling()
        piece = _PIECE_CPU if small else _PIECE
        means, variances, count = [], [], 0
        for part in images.split(max(1, piece // (positions * len(functions)))):
            responses = self._convolve(part, functions, None, 1)
            count = responses.shape[2] * responses.shape[3]
            if x.device.type == 'cpu':  # half the time of var_mean
                mean = responses.mean((2, 3), keepdim=True)
                var = torch.linalg.vector_norm(responses.sub_(mean), dim=(2, 3)).square() / count
            else:
                var, mean = torch.var_mean(responses, (2, 3), correction=0)
            means.append(mean.flatten(1))
            variances.append(var)
        # (B, C * P), each over equally many responses
        of_images = torch.cat(means).reshape(batch, -1)
        mean = of_images.mean(0)
        within = torch.cat(variances).reshape(batch, -1).mean(0)
        return mean, within + (of_images - mean).square().mean(0), batch * count

    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        bn = self.bn
        if count < 2:
            raise InputError(f'expected more than 1 response per channel when training, got {count}.')
        if bn.running_mean is None:
            return
        bn.num_batches_tracked.add_(1)
        # Without momentum: the average over all batches, as a tensor, so that the device is not waited for.
        factor = bn.momentum
        if factor is None:
            factor = (1 / bn.num_batches_tracked).to(bn.running_mean.dtype)
        for running, new in ((bn.running_mean, mean), (bn.running_var, var * (count / (count - 1)))):
            running.lerp_(new.to(running.dtype), factor)
