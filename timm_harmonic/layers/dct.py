"""The DCT basis of harmonic networks, as mathematics: pure functions of kernel size and level.

Type-II discrete cosine functions on a k x k grid (Ulicny, Krylov, Dahyot, arXiv:2001.06570).
"""

import torch
from torch import Tensor

NORMALIZATIONS = ('l1', 'ortho')


def full_level(kernel_size: int) -> int:
    """The lowest level that keeps all frequencies: 2k - 1."""
    return 2 * kernel_size - 1


def check_level(level: int | None, top: int, name: str = 'level') -> int:
    """A level as an integer; None stands for `top`. Raises TypeError for another type, ValueError outside 1..top."""
    if level is None:
        return top
    message = f'{name} must be None or an integer from 1 to {top} (2k - 1, all frequencies), got {level!r}.'
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(message)
    if not 1 <= level <= top:
        raise ValueError(message)
    return level


def dct_frequencies(kernel_size: int, level: int | None = None, dc: bool = True) -> list[tuple[int, int]]:
    """Frequency pairs (i, j) that a layer keeps: those with i + j < level, i along rows (outer), j along columns.

    Arguments and errors are those of `dct_basis`.
    """
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool):
        raise TypeError(f'kernel_size must be an integer, got {kernel_size!r}.')
    if kernel_size < 1:
        raise ValueError(f'kernel_size must be at least 1, got {kernel_size}.')
    level = check_level(level, full_level(kernel_size))
    pairs = [(i, j) for i in range(kernel_size) for j in range(kernel_size) if i + j < level and (dc or i + j > 0)]
    if not pairs:
        raise ValueError(
            f'no function is left with kernel_size={kernel_size}, level={level}, dc=False: raise level or set dc=True.'
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

    They are orthogonal to each other in either normalization. Computed on the CPU in float64, then cast.

    Args:
        kernel_size: Side k of the functions.
        level: The paper's lambda: keep the frequencies with i + j < level. None keeps all k * k.
        dc: Whether to keep the constant function (0, 0).
        normalization: 'l1' divides each function by the sum of its absolute values, as the authors do.
            'ortho' gives each function unit energy.
        device: Device of the result.
        dtype: Type of the result, torch's default dtype if None.

    Returns:
        Tensor (P, k, k), i outer and j inner.

    Raises:
        TypeError: If kernel_size or level is not an integer.
        ValueError: If an argument is out of range, naming it.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'normalization must be one of {NORMALIZATIONS}, got {normalization!r}.')
    pairs = torch.tensor(dct_frequencies(kernel_size, level, dc), device='cpu')
    grid = torch.arange(kernel_size, dtype=torch.float64, device='cpu')
    cosines = torch.cos(torch.pi * (grid + 0.5) * grid[:, None] / kernel_size)  # (frequency, position)
    basis = cosines[pairs[:, 0], :, None] * cosines[pairs[:, 1], None, :]  # (P, x, y)
    norm = basis.abs().sum((1, 2)) if normalization == 'l1' else basis.square().sum((1, 2)).sqrt()
    return (basis / norm[:, None, None]).to(device=device, dtype=dtype or torch.get_default_dtype())


def project(filters: Tensor, basis: Tensor) -> Tensor:
    """Coefficients (O, I, P, 1) of filters (O, I, k, k): exact on a complete basis, else of the nearest filters in L2.

    The basis (P, k, k) is orthogonal, of any norm. Its dtype is the precision of the result.
    """
    dual = basis / basis.square().sum((1, 2), keepdim=True)
    # (O, I, k * k) @ (k * k, P)
    return (filters.to(basis.dtype).flatten(2) @ dual.flatten(1).t()).unsqueeze(-1)
