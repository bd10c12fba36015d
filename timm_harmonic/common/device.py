"""Devices that networks run on."""

import torch

from . import explained


def usable_device(name: str | None) -> torch.device:
    """The named device, or else the first GPU, or else the CPU. Raises InputError if it cannot run anything here."""
    with explained(f'device {name!r} cannot be used here', AssertionError, ImportError, RuntimeError):
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device).cpu()
    return device
