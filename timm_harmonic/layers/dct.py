"""The DCT basis of harmonic networks (Ulicny, Krylov, Dahyot, arXiv:2001.06570), as mathematics: pure functions."""

from typing import Any

import torch
from torch import Tensor

from ..common import InputError

NORMALIZATIONS = ('l1', 'ortho')  # state dicts store places in this tuple: append only
MAX_SMOOTHNESS = 10.0  # scales the highest 7 x 7 frequency by 1e-11; to drop it, lower the level


def full_level(kernel_size: int) -> int:
    """The lowest level that keeps all frequencies: 2k - 1."""
    return 2 * kernel_size - 1


def check_level(level: int | None, top: int, name: str = 'level') -> int:
    """Returns a level as an integer, `top` for None. Raises TypeError for another type, InputError outside 1..top."""
    if level is None:
        return top
    message = f'{name} must be None or an integer from 1 to {top} (2k - 1, all frequencies), got {level!r}.'
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(message)
    if not 1 <= level <= top:
        raise InputError(message)
    return level


def options_of_basis(normalization: str, smoothness: float | None) -> dict[str, Any]:
    """Checks the options of a basis and returns those that differ from the authors'.

    Smoothness scales functions of unit energy, so that normalization 'l1' does not count with it. Raises TypeError if
    smoothness has another type, InputError if an option is out of range.
    """
    if normalization not in NORMALIZATIONS:
        raise InputError(f'normalization must be one of {NORMALIZATIONS}, got {normalization!r}.')
    usual = ('l1',) if smoothness is None else ('l1', 'ortho')
    options: dict[str, Any] = {} if normalization in usual else dict(normalization=normalization)
    if smoothness is None:
        return options
    message = f'smoothness must be None or a number from 0 to {MAX_SMOOTHNESS:g}, got {smoothness!r}.'
    if not isinstance(smoothness, (int, float)) or isinstance(smoothness, bool):
        raise TypeError(message)
    if not 0 <= smoothness <= MAX_SMOOTHNESS:
        raise InputError(message)
    return dict(options, smoothness=abs(float(smoothness)))  # -0.0 is 0.0


def name_of_basis(normalization: str, smoothness: float | None) -> str:
    """Names the functions that coefficients refer to: 'l1' (the authors'), 'ortho', 'smoothness=1.0'."""
    options = options_of_basis(normalization, smoothness)
    kind = options.pop('normalization', None)
    return ', '.join(filter(None, (kind, *(f'{key}={value!r}' for key, value in options.items())))) or 'l1'


def code_of_basis(normalization: str, smoothness: float | None) -> Tensor | None:
    """Encodes the options of a basis for a state dict: 32 binary digits (bool), None for the authors' basis.

    They hold the place of the normalization in NORMALIZATIONS and the smoothness in millionths, and survive averages.
    """
    options = options_of_basis(normalization, smoothness)
    number = NORMALIZATIONS.index(options.get('normalization', 'l1'))
    if 'smoothness' in options:
        number += 16 * (1 + round(1e6 * options['smoothness']))
    return torch.tensor([bool(number >> place & 1) for place in range(32)], device='cpu') if number else None


def options_of_code(code: Tensor | None) -> dict[str, Any]:
    """Decodes `code_of_basis` into the options of the basis that differ from the defaults.

    Any dtype will do, as scripts average and cast buffers. Raises InputError for an unknown code.
    """
    if code is None:
        return {}
    digits = (code.detach().cpu().double().flatten() > 0.5).tolist()
    number = sum(digit << place for place, digit in enumerate(digits))
    kind, millionths = number % 16, number // 16 - 1
    if kind >= len(NORMALIZATIONS) or millionths > 1e6 * MAX_SMOOTHNESS:
        raise InputError(f'basis_code {number} names no basis of this version.')
    return options_of_basis(NORMALIZATIONS[kind], None if millionths < 0 else millionths / 1e6)


def dct_frequencies(kernel_size: int, level: int | None = None, dc: bool = True) -> list[tuple[int, int]]:
    """Returns the pairs (i, j) that a level keeps: i + j < level, i along rows (outer), j along columns."""
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool):
        raise TypeError(f'kernel_size must be an integer, got {kernel_size!r}.')
    if kernel_size < 1:
        raise InputError(f'kernel_size must be at least 1, got {kernel_size}.')
    level = check_level(level, full_level(kernel_size))
    pairs = [(i, j) for i in range(kernel_size) for j in range(kernel_size) if i + j < level and (dc or i + j > 0)]
    if not pairs:
        options = f'kernel_size={kernel_size}, level={level} and dc=False'
        raise InputError(f'{options} leave no function: raise level or set dc=True.')
    return pairs


def dct_spectrum(
    kernel_size: int, level: int | None = None, dc: bool = True, smoothness: float | None = None
) -> Tensor:
    """Returns the factors (P,) by which smoothness scales the kept functions, in float64 on the CPU.

    s_ij = c (1 + i + j)^(-smoothness), with c such that the mean of s^2 is 1. All factors are 1 without smoothness.
    """
    sums = torch.tensor([i + j for i, j in dct_frequencies(kernel_size, level, dc)], dtype=torch.float64, device='cpu')
    spectrum = (1 + sums) ** -(smoothness or 0.0)
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
    """Returns the DCT-II basis functions d_ij(x, y) = cos(pi (x + 1/2) i / k) cos(pi (y + 1/2) j / k): (P, k, k).

    They are orthogonal in every scaling, i is outer and j inner. They are computed on the CPU in float64, then cast.

    Args:
        kernel_size: Side k of the functions.
        level: The paper's lambda: keep the frequencies with i + j < level. None keeps all k * k.
        dc: Whether to keep the constant function (0, 0).
        normalization: 'l1' divides each function by the sum of its absolute values, as the authors do.
            'ortho' gives each function unit energy.
        smoothness: None for functions as `normalization` says. A number from 0 to 10 scales functions of unit energy by
            (1 + i + j)^(-smoothness), and all by one factor that makes their mean energy 1 (`dct_spectrum`).
        device: Device of the result.
        dtype: Dtype of the result; None stands for torch's default dtype.

    Raises:
        TypeError: If kernel_size, level or smoothness has another type.
        InputError: If an argument is out of range, naming it.
    """
    l1 = not options_of_basis(normalization, smoothness)
    pairs = torch.tensor(dct_frequencies(kernel_size, level, dc), device='cpu')
    grid = torch.arange(kernel_size, dtype=torch.float64, device='cpu')
    cosines = torch.cos(torch.pi * (grid + 0.5) * grid[:, None] / kernel_size)  # (frequency, position)
    basis = cosines[pairs[:, 0], :, None] * cosines[pairs[:, 1], None, :]  # (P, x, y)
    norm = basis.abs().sum((1, 2)) if l1 else basis.square().sum((1, 2)).sqrt()
    spectrum = dct_spectrum(kernel_size, level, dc, smoothness)
    basis = basis / norm[:, None, None] * spectrum[:, None, None]
    return basis.to(device=device, dtype=dtype or torch.get_default_dtype())


def project(filters: Tensor, basis: Tensor) -> Tensor:
    """Projects filters (O, I, k, k) onto a basis: coefficients (O, I, P, 1).

    A complete basis represents the filters exactly, others the nearest ones in L2. The functions (P, k, k) must be
    orthogonal, and may have any norm. The result has the basis' dtype.
    """
    dual = basis / basis.square().sum((1, 2), keepdim=True)
    return (filters.to(basis.dtype).flatten(2) @ dual.flatten(1).t()).unsqueeze(-1)
