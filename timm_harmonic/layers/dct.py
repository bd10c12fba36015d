"""The DCT basis of harmonic networks, as mathematics: pure functions of kernel size, level and smoothness.

Type-II discrete cosine functions on a k x k grid (Ulicny, Krylov, Dahyot, arXiv:2001.06570).
"""

from typing import Any

import torch
from torch import Tensor

from ..common import InputError

NORMALIZATIONS = ('l1', 'ortho')
MAX_SMOOTHNESS = 10.0  # the highest of 7 x 7 frequencies is then scaled by 1e-11: more is what a level is for


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
        raise InputError(message)
    return level


def check_smoothness(smoothness: float | None) -> float | None:
    """A smoothness as a float, or None. Raises TypeError for another type, ValueError outside 0..10."""
    if smoothness is None:
        return None
    message = f'smoothness must be None or a number from 0 to {MAX_SMOOTHNESS:g}, got {smoothness!r}.'
    if not isinstance(smoothness, (int, float)) or isinstance(smoothness, bool):
        raise TypeError(message)
    if not 0 <= smoothness <= MAX_SMOOTHNESS:
        raise InputError(message)
    return abs(float(smoothness))  # -0.0 would have a name of its own


def name_of_basis(normalization: str, smoothness: float | None) -> str:
    """The functions that coefficients refer to: 'l1' (the authors'), 'ortho' or 'smoothness=S'.

    Raises ValueError or TypeError if an argument is out of range.
    """
    if normalization not in NORMALIZATIONS:
        raise InputError(f'normalization must be one of {NORMALIZATIONS}, got {normalization!r}.')
    smoothness = check_smoothness(smoothness)
    return normalization if smoothness is None else f'smoothness={smoothness!r}'


def options_of_basis(name: str) -> dict[str, Any]:
    """The options that `name_of_basis` names, where they are not the defaults. Raises ValueError for other names."""
    if name in NORMALIZATIONS:
        return {} if name == 'l1' else dict(normalization=name)
    option, _, value = name.partition('=')
    if option != 'smoothness':
        raise InputError(f'unknown basis {name!r}.')
    return dict(smoothness=check_smoothness(float(value)))


def dct_frequencies(kernel_size: int, level: int | None = None, dc: bool = True) -> list[tuple[int, int]]:
    """Frequency pairs (i, j) that a layer keeps: those with i + j < level, i along rows (outer), j along columns.

    Arguments and errors are those of `dct_basis`.
    """
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool):
        raise TypeError(f'kernel_size must be an integer, got {kernel_size!r}.')
    if kernel_size < 1:
        raise InputError(f'kernel_size must be at least 1, got {kernel_size}.')
    level = check_level(level, full_level(kernel_size))
    pairs = [(i, j) for i in range(kernel_size) for j in range(kernel_size) if i + j < level and (dc or i + j > 0)]
    if not pairs:
        raise InputError(
            f'no function is left with kernel_size={kernel_size}, level={level}, dc=False: raise level or set dc=True.'
        )
    return pairs


def dct_spectrum(
    kernel_size: int, level: int | None = None, dc: bool = True, smoothness: float | None = None
) -> Tensor:
    """What smoothness scales each kept function by: s_ij = c (1 + i + j)^(-smoothness), the mean of s^2 being 1.

    Returns (P,) in float64, on the CPU; ones if smoothness is None. Arguments and errors are those of `dct_basis`.
    """
    sums = torch.tensor([i + j for i, j in dct_frequencies(kernel_size, level, dc)], dtype=torch.float64, device='cpu')
    spectrum = (1 + sums) ** -(check_smoothness(smoothness) or 0.0)
    return spectrum / spectrum.square().mean().sqrt()


def dct_basis(
    kernel_size: int,
    level: int | None = None,
    dc: bool = True,
    normalization: str = 'l1',
    smoothness: float | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """DCT-II basis functions d_ij(x, y) = cos(pi (x + 1/2) i / k) cos(pi (y + 1/2) j / k).

    They are orthogonal to each other, however they are scaled. Computed on the CPU in float64, then cast.

    Args:
        kernel_size: Side k of the functions.
        level: The paper's lambda: keep the frequencies with i + j < level. None keeps all k * k.
        dc: Whether to keep the constant function (0, 0).
        normalization: 'l1' divides each function by the sum of its absolute values, as the authors do.
            'ortho' gives each function unit energy.
        smoothness: None for functions as `normalization` says. A number from 0 to 10 scales functions of unit energy
            by (1 + i + j)^(-smoothness), and all by one factor, so that their mean energy is 1 (`dct_spectrum`).
        device: Device of the result.
        dtype: Type of the result, torch's default dtype if None.

    Returns:
        Tensor (P, k, k), i outer and j inner.

    Raises:
        TypeError: If kernel_size, level or smoothness has another type.
        ValueError: If an argument is out of range, naming it.
    """
    l1 = name_of_basis(normalization, smoothness) == 'l1'
    pairs = torch.tensor(dct_frequencies(kernel_size, level, dc), device='cpu')
    grid = torch.arange(kernel_size, dtype=torch.float64, device='cpu')
    cosines = torch.cos(torch.pi * (grid + 0.5) * grid[:, None] / kernel_size)  # (frequency, position)
    basis = cosines[pairs[:, 0], :, None] * cosines[pairs[:, 1], None, :]  # (P, x, y)
    norm = basis.abs().sum((1, 2)) if l1 else basis.square().sum((1, 2)).sqrt()
    spectrum = dct_spectrum(kernel_size, level, dc, smoothness)
    basis = basis / norm[:, None, None] * spectrum[:, None, None]
    return basis.to(device=device, dtype=dtype or torch.get_default_dtype())


def project(filters: Tensor, basis: Tensor) -> Tensor:
    """Coefficients (O, I, P, 1) of filters (O, I, k, k): exact on a complete basis, else of the nearest filters in L2.

    The basis (P, k, k) is orthogonal, of any norm. Its dtype is the precision of the result.
    """
    dual = basis / basis.square().sum((1, 2), keepdim=True)
    # (O, I, k * k) @ (k * k, P)
    return (filters.to(basis.dtype).flatten(2) @ dual.flatten(1).t()).unsqueeze(-1)
