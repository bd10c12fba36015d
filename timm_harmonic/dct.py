"""The DCT basis of harmonic networks, as mathematics.

Type-II discrete cosine functions on a k x k grid (Ulicny, Krylov, Dahyot, arXiv:2001.06570).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['NORMALIZATIONS', 'analyze', 'dct_basis', 'dct_frequencies', 'synthesize']

NORMALIZATIONS = ('l1', 'ortho')


def dct_frequencies(kernel_size: int, level: int | None = None, dc: bool = True) -> list[tuple[int, int]]:
    """Frequency pairs (i, j) that a harmonic layer keeps, i along rows and j along columns.

    Args:
        kernel_size: Side k of the filters.
        level: The paper's lambda: keep the pairs with i + j < level. None keeps all k * k.
        dc: Whether the constant function (0, 0) is kept.

    Returns:
        The pairs, i outer and j inner: P of them.

    Raises:
        ValueError: If kernel_size < 1, level is not in 1..2k-1, or no pair is left.
    """
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool) or kernel_size < 1:
        raise ValueError(f'kernel_size must be an integer of at least 1, got {kernel_size!r}.')
    top = 2 * kernel_size - 1
    if level is None:
        level = top
    elif not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= top:
        raise ValueError(
            f'level must be None or an integer from 1 to 2k - 1 = {top} for kernel_size {kernel_size}, got {level!r}.'
        )
    pairs = [(i, j) for i in range(kernel_size) for j in range(kernel_size) if i + j < level and (dc or i + j > 0)]
    if not pairs:
        raise ValueError(
            f'no filter is left with kernel_size={kernel_size}, level={level}, dc=False: raise level or set dc=True.'
        )
    return pairs


def dct_basis(
    kernel_size: int,
    level: int | None = None,
    dc: bool = True,
    normalization: str = 'l1',
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """DCT-II basis functions d_ij(x, y) = cos(pi (x + 1/2) i / k) cos(pi (y + 1/2) j / k).

    They are mutually orthogonal whatever their scale. Values are computed on the CPU in float64, then cast.

    Args:
        kernel_size: Side k of the functions.
        level: The paper's lambda, see `dct_frequencies`.
        dc: Whether the constant function is kept.
        normalization: 'l1' divides each function by the sum of its absolute values, as the authors do;
            'ortho' gives every function unit energy.
        device: Device of the result.
        dtype: Type of the result, torch's default dtype if None.

    Returns:
        Tensor (P, k, k), in the order of `dct_frequencies`.

    Raises:
        ValueError: If an argument is out of range, naming it.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'normalization must be one of {NORMALIZATIONS}, got {normalization!r}.')
    pairs = torch.tensor(dct_frequencies(kernel_size, level, dc), device='cpu')
    grid = torch.arange(kernel_size, dtype=torch.float64, device='cpu')
    cosines = torch.cos(torch.pi * (grid + 0.5) * grid[:, None] / kernel_size)  # (frequency, position)
    basis = cosines[pairs[:, 0], :, None] * cosines[pairs[:, 1], None, :]  # (P, x, y)
    if normalization == 'l1':
        basis = basis / basis.abs().sum((1, 2), keepdim=True)
    else:
        basis = basis / basis.square().sum((1, 2), keepdim=True).sqrt()
    return basis.to(device=device, dtype=dtype or torch.get_default_dtype())


def synthesize(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Filters that coefficients stand for: sum_n coefficients[o, i, n] basis[n].

    Args:
        coefficients: Tensor (O, I, P, 1).
        basis: Tensor (P, k, k); its dtype is the precision of the product.

    Returns:
        Filters (O, I, k, k) in the dtype of basis and the memory format of the coefficients.
    """
    out_channels, in_channels, count = coefficients.shape[:3]
    side = basis.shape[1]
    functions = basis.reshape(count, -1)
    coefficients = coefficients.to(basis.dtype)
    if not coefficients.is_contiguous():
        # channels_last, in memory (O, P, I): (k * k, P) @ (O, P, I), where a convolution wants (O, k, k, I)
        filters = functions.t() @ coefficients.squeeze(-1).transpose(1, 2)
        return filters.reshape(out_channels, side, side, in_channels).permute(0, 3, 1, 2)
    # A trace knows its sizes as tensors, which decide nothing.
    if not torch.jit.is_tracing() and count <= 25 and out_channels * in_channels % 2 == 0:
        # Two rows at a time: so thin a matrix product takes half the time on a CPU; larger ones are fast as they are.
        size = functions.shape[1]
        functions = torch.cat([F.pad(functions, (0, size)), F.pad(functions, (size, 0))])
    # (O * I, P) @ (P, k * k), or (O * I / 2, 2 * P) @ (2 * P, 2 * k * k)
    filters = coefficients.reshape(-1, functions.shape[0]) @ functions
    return filters.reshape(out_channels, in_channels, side, side)


def analyze(filters: Tensor, basis: Tensor) -> Tensor:
    """Coefficients of filters: the inverse of `synthesize` on a full basis, else the best L2 approximation.

    Args:
        filters: Tensor (O, I, k, k).
        basis: Orthogonal basis (P, k, k), of any scale.

    Returns:
        Coefficients (O, I, P, 1) in the dtype of basis.
    """
    dual = basis / basis.square().sum((1, 2), keepdim=True)
    # (O, I, k * k) @ (k * k, P)
    return (filters.to(basis.dtype).flatten(2) @ dual.flatten(1).t()).unsqueeze(-1)
