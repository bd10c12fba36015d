"""Filters from coefficients: one product, as exact as the convolution with these filters can tell."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.device import allows_tf32, kind_of

FEW_CHANNELS = 16  # of a filter: rounding shows in so short a sum


def basis_for_product(like: Tensor, exact: Tensor, rounded: Tensor | None, channels: int) -> Tensor:
    """Chooses between a basis in float64 and, unless it is None, the same rounded to float32.

    Filters from coefficients `like`, which span so many channels, have to be as precise as a plain convolution's.
    In bfloat16, under autocast or throughout, filters are rounded to 8 bits. There float32 will do even if TF32 rounds
    the factors to 11. Everywhere else TF32 would show, and so would float32 if a filter spans few channels.
    """
    if torch.jit.is_scripting() or rounded is None:  # TorchScript cannot ask what follows
        return exact
    kind = like.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if torch.bfloat16 in (like.dtype, autocast):
        return rounded
    # A compiled composition is elementwise, and TF32 is for matrix products.
    shows = channels <= FEW_CHANNELS or (not torch.compiler.is_compiling() and allows_tf32())
    return exact if shows else rounded


def compose(coefficients: Tensor, basis: Tensor, like: Tensor | None = None) -> Tensor:
    """Composes filters (O, I, k, k) from coefficients: torch.einsum('oinz,nxy->oixy', coefficients, basis).

    They have the dtype of the basis, whatever autocast says, and the memory format of `like` or of the coefficients.
    """
    if torch.jit.is_scripting():  # cannot switch autocast off
        return _product(coefficients, basis, like)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # Inductor makes one kernel of this. A product would be rounded on the way back: compiled, the backward pass
        # runs under the autocast of the forward one.
        return (coefficients.unsqueeze(-1) * basis).sum(2)
    if basis.dtype == torch.float64:  # autocast leaves it alone
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
    pairs = kind_of(coefficients) == 'cpu' and not torch.jit.is_tracing()
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
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False) if torch.compiler.is_compiling() else _Off(device_type)


class _Off:
    """torch.autocast(..., enabled=False) in a seventh of the time, which a small network shows."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device_type, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.device_type, True)


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
