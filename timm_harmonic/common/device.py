"""Where networks run."""

import torch

from ..common import InputError, first_line


def usable_device(name: str | None) -> torch.device:
    """The device of this name, by default CUDA's if there is one. Raises ValueError if nothing can run on it here."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device).cpu()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise InputError(f'device {name!r} cannot be used here: {first_line(error)}') from error
    return device
