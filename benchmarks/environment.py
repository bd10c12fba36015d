"""What measured figures depend on."""

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

import timm_harmonic
from timm_harmonic.common.device import dot_products

__all__ = ['environment']


def environment(device: str = 'cpu') -> dict[str, Any]:
    """Date, machine and versions; says so where there is no GPU."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else 'none on this machine, not measured'
    return {
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'platform': platform.platform(),
        'processor': cuda if device != 'cpu' else _processor(),
        'threads': torch.get_num_threads(),
        'device': device,
        'cuda': cuda,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_harmonic': timm_harmonic.__version__,
    }


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    names = [line.partition(':')[2].strip() for line in info.read_text().splitlines() if line.startswith('model name')]
    has = {True: ', 8-bit dot products', False: ', no 8-bit dot products', None: ''}[dot_products()]
    return (names[0] if names else platform.processor()) + has
