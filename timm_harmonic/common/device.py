"""Devices that networks run on."""

import functools
from contextlib import suppress
from pathlib import Path

import torch

from . import explained


def usable_device(name: str | None) -> torch.device:
    """The named device, or else the first GPU, or else the CPU. Raises InputError if it cannot run anything here."""
    with explained(f'device {name!r} cannot be used here', AssertionError, ImportError, RuntimeError):
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device).cpu()
    return device


def kind_of(tensor: torch.Tensor) -> str:
    """Returns the kind of device that decides how a layer computes; tests take the way of CUDA on a CPU."""
    return tensor.device.type


def allows_tf32() -> bool:
    """Tells whether CUDA may round the factors of products in float32 to TF32, which has 11 bits.

    It only reads the switch, which belongs to the process. The old one must not be read where a new one was set.
    """
    products = torch.backends.cuda.matmul
    precision = getattr(products, 'fp32_precision', None)  # since torch 2.9
    return bool(products.allow_tf32) if precision is None else precision == 'tf32'


@functools.cache
def float64_device(device: torch.device) -> torch.device:
    """Returns a device if it computes in float64, which is tried (Apple's GPUs do not), and else the CPU."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).mul_(2)
    except Exception:  # each kind of device raises its own
        return torch.device('cpu')
    return device


def dot_products() -> bool | None:
    """Tells whether the processor has 8-bit dot products (VNNI, AMX, ARM's dotprod), None where Linux does not say."""
    with suppress(OSError):
        words = set(Path('/proc/cpuinfo').read_text(encoding='utf-8').split())
        if words & {'flags', 'Features'}:
            return bool(words & {'avx512_vnni', 'avx_vnni', 'amx_int8', 'asimddp'})
    return None
