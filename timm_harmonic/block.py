"""The harmonic block with normalised responses, the paper's choice for the root layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import HarmonicLayer, compose, outside_autocast

__all__ = ['HarmonicBlock2d']

# Responses that are computed at a time in training, when only their statistics are wanted.
_PIECE_CPU, _PIECE = 2**19, 2**26


def _scale(var: Tensor, gamma: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """What normalisation multiplies the responses (C * P,) by."""
    scale = torch.rsqrt(var.to(dtype) + eps)
    if gamma is not None:
        scale = scale * gamma
    return scale


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
    scale = _scale(var, gamma, eps, basis.dtype)
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    # (groups, O / groups, I, P) * (groups, 1, I, P)
    grouped = (groups, -1, weight.shape[1], weight.shape[2])
    mix = weight.to(basis.dtype).reshape(grouped)
    bias = (mix * shift.reshape(grouped)).sum((2, 3)).reshape(-1)
    return compose((mix * scale.reshape(grouped)).reshape(weight.shape), basis), bias


def _in_format_of(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x, so that the layers after it run as they would after a plain convolution."""
    return y.contiguous() if x.is_contiguous() else y


# Leaves for torch.fx: a trace must keep what these functions decide by dtype, device or memory format.
torch.fx.wrap('_fold')
torch.fx.wrap('_in_format_of')


class HarmonicBlock2d(HarmonicLayer):
    """The paper's harmonic block with normalised responses, its choice for the root layer
    (arXiv:2001.06570).

    Every input channel is filtered by every DCT function; the C * P responses are batch-normalised without affine
    parameters, then mixed by a 1 x 1 convolution. All of it is one convolution with the normalisation folded in, by
    running statistics or, in training, by those of the batch, unless the input needs a gradient.

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

    def _check_foldable(self, purpose: str) -> None:
        if not self.is_foldable():
            raise ValueError(f'cannot {purpose}: {type(self.bn).__name__} has no running statistics.')

    def folded(self) -> tuple[Tensor, Tensor]:
        """Filters (O, C / groups, k, k) and bias (O,) with the running statistics folded in, differentiable."""
        return self._folded_by(self.bn.running_mean, self.bn.running_var)

    def _folded_by(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        bn = self.bn
        filters, bias = _fold(self.weight, self.basis, mean, var, bn.weight, bn.bias, bn.eps, self.groups)
        if self.bias is not None:
            bias = bias + self.bias
        return filters.to(self.weight.dtype), bias.to(self.weight.dtype)

    def mixing(self) -> Tensor:
        """Factors (O, C / groups, P, 1) of the DCT functions in the filters of evaluation.

        Raises:
            ValueError: If `bn` has been replaced by a module without running statistics.
        """
        self._check_foldable('weigh frequencies')
        bn = self.bn
        scale = _scale(bn.running_var, bn.weight, bn.eps, self.basis.dtype)
        # (groups, O / groups, I, P) * (groups, 1, I, P)
        grouped = (self.groups, -1, *self.weight.shape[1:3])
        return (self.weight.to(scale.dtype).reshape(grouped) * scale.reshape(grouped)).reshape(self.weight.shape)

    def _keep(self, kept: list[int]) -> None:
        bn, count = self.bn, self.weight.shape[2]
        if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) or next(bn.children(), None) is not None:
            raise ValueError(f'cannot truncate: it is not known how {type(bn).__name__} leaves out responses.')
        index = torch.arange(bn.num_features, device=self.weight.device).reshape(-1, count)[:, kept].flatten()
        for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
            if tensor is not None:
                tensor.data = tensor.data[index]
        bn.num_features = len(index)
        super()._keep(kept)

    def filters(self) -> Tensor:
        """The filters (O, C / groups, k, k) of evaluation, differentiable."""
        return self.folded()[0]

    def forward(self, x: Tensor) -> Tensor:
        if not self.bn.training and self.is_foldable():
            filters, bias = self.folded()
            return self._convolve(x, filters, bias, self.groups)
        if not torch.jit.is_scripting() and self._is_dense(x):
            return self._convolve(x, *self._folded_by_batch(x), self.groups)
        responses = self.bn(self.responses(x))
        y = F.conv2d(responses, self.weight.flatten(1)[:, :, None, None], self.bias, groups=self.groups)
        return _in_format_of(y, x)

    @torch.jit.unused
    def _is_dense(self, x: Tensor) -> bool:
        """Whether training can use one dense convolution: the normalisation is our own, and x needs no gradient.

        With a gradient for x it would be right as well, but the responses would have to be kept. The explicit form
        also takes what has no statistics: an empty batch, and an image without a batch, which it refuses.
        """
        if isinstance(x, torch.fx.Proxy) or type(self.bn) is not nn.BatchNorm2d or not self.bn.training:
            return False
        return x.ndim == 4 and len(x) > 0 and not x.requires_grad

    @torch.jit.unused
    def _folded_by_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Filters and bias with the statistics of this batch folded in; updates the running ones as nn.BatchNorm2d."""
        with outside_autocast(x.device.type):
            mean, var, count = self._response_statistics(x.to(torch.promote_types(x.dtype, torch.float32)))
            self._update_running_statistics(mean.detach(), var.detach(), count)
            return self._folded_by(mean, var)

    def _response_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance (C * P,) of the responses over batch and positions, and how many there are.

        Each channel of each image is an image of its own here, convolved with all functions and forgotten. A few at a
        time: what fits into the cache takes half the time on a CPU, and no more memory than that is needed anywhere.
        """
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        functions = self.basis.to(x.dtype).unsqueeze(1)  # (P, 1, k, k)
        images = x.reshape(-1, 1, height, width)
        positions = max(1, height * width // (self.stride[0] * self.stride[1]))  # about
        small = x.device.type == 'cpu' and not torch.compiler.is_compiling()  # a compiled graph has all pieces in it
        piece = _PIECE_CPU if small else _PIECE
        means, variances, count = [], [], 0
        for part in images.split(max(1, piece // (positions * len(functions)))):
            responses = self._convolve(part, functions, None, 1)
            mean = responses.mean((2, 3), keepdim=True)
            count = responses.shape[2] * responses.shape[3]
            means.append(mean.flatten(1))
            variances.append(torch.linalg.vector_norm(responses.sub_(mean), dim=(2, 3)).square() / count)
        # (B, C * P); of equal numbers of responses each
        of_images = torch.cat(means).reshape(batch, -1)
        mean = of_images.mean(0)
        within = torch.cat(variances).reshape(batch, -1).mean(0)
        return mean, within + (of_images - mean).square().mean(0), batch * count

    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        bn = self.bn
        if count < 2:
            raise ValueError(f'expected more than 1 response per channel when training, got {count}.')
        if bn.running_mean is None:
            return
        bn.num_batches_tracked.add_(1)
        # Without momentum, the average over all batches; a tensor, so that no device has to wait for it.
        factor = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
        for running, new in ((bn.running_mean, mean), (bn.running_var, var * (count / (count - 1)))):
            running.copy_((1 - factor) * running + factor * new)

    def fuse(self) -> nn.Conv2d:
        """A new nn.Conv2d, with a bias, that computes the same in evaluation; this layer is left as it is.

        Raises:
            ValueError: If `bn` has been replaced by a module without running statistics.
        """
        self._check_foldable('fuse')
        return self._plain(*self.folded())
