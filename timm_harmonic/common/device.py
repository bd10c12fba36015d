"""Devices that networks run on."""

import functools

import torch

from . import explained


def usable_device(name: str | None) -> torch.device:
    """The named device, or else the first GPU, or else the CPU. Raises InputError if it cannot run anything here."""
    with explained(f'device {name!r} cannot be used here', AssertionError, ImportError, RuntimeError):
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device).cpu()
    return device


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Tells whether a device computes in float64, by trying: neither Apple's GPUs nor all of Intel's do."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).mul_(2)
    except Exception:  # devices raise errors of their own
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Returns the device on which to compute in float64 what is on another: the same one or the CPU."""
    return device if has_float64(device) else torch.device('cpu')
