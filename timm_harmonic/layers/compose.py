"""Filters from coefficients: one matrix product, fast on a CPU, exact under autocast and where TF32 is allowed."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def compose(coefficients: Tensor, basis: Tensor, like: Tensor | None = None) -> Tensor:
    """Composes filters (O, I, k, k) from coefficients: torch.einsum('oinz,nxy->oixy', coefficients, basis).

    They have the dtype of the basis, whatever autocast says, and the memory format of `like` or of the coefficients.
    """
    # Autocast does not touch float64, and TorchScript cannot switch autocast off.
    if basis.dtype == torch.float64 or torch.jit.is_scripting():
        return _product(coefficients, basis, like)
    with outside_autocast(coefficients.device.type):
        return _product(coefficients, basis, like)


def _product(coefficients: Tensor, basis: Tensor, like: Tensor | None) -> Tensor:
    out_channels, in_channels, count = coefficients.shape[:3]
    side = basis.shape[1]
    functions = basis.reshape(count, -1)
    last = _one_channel_last(coefficients if like is None else like)
    coefficients = coefficients.to(basis.dtype)
    if not coefficients.is_contiguous():
        # channels_last is (O, P, I) in memory: (k * k, P) @ (O, P, I) gives the (O, k, k, I) that a convolution wants.
        filters = functions.t().expand(out_channels, -1, -1).bmm(coefficients.squeeze(-1).transpose(1, 2))
        return filters.reshape(out_channels, side, side, in_channels).permute(0, 3, 1, 2)
    # A trace sees the number of channels as tensors, and must not branch on it.
    pairs = coefficients.device.type == 'cpu' and not torch.jit.is_tracing()
    if pairs and count <= 25 and out_channels * in_channels % 2 == 0:
        # With few functions the product is narrow: two rows at a time take half the time on a CPU.
        size = functions.shape[1]
        functions = torch.cat([F.pad(functions, (0, size)), F.pad(functions, (size, 0))])
    # (O * I, P) @ (P, k * k), or (O * I / 2, 2 * P) @ (2 * P, 2 * k * k)
    filters = coefficients.reshape(-1, functions.shape[0]) @ functions
    if last:
        return filters.reshape(out_channels, side, side, in_channels).permute(0, 3, 1, 2)
    return filters.reshape(out_channels, in_channels, side, side)


def outside_autocast(device_type: str) -> AbstractContextManager[object]:
    """Returns a context that switches autocast off, on devices that have it (meta has none)."""
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@torch.compiler.assume_constant_result  # torch.compile of 2.9 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _one_channel_last(weight: Tensor) -> bool:
    """Tells whether a weight of one channel is in channels_last: contiguous as well, but convolutions read strides."""
    if torch.jit.is_tracing():  # sizes are tensors there
        return False
    return weight.shape[1] == 1 and weight.shape[2] > 1 and weight.stride(1) == 1


def format_of(weight: Tensor) -> torch.memory_format:
    """Returns the memory format of a weight: contiguous or channels_last."""
    last = not weight.is_contiguous() or _one_channel_last(weight)
    return torch.channels_last if last else torch.contiguous_format
