"""ONNX files of plain networks, checked in ONNX Runtime, and their measurements."""

import copy
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common import InputError, explained
from ..common.onnx import onnx_session, write_onnx
from ..conversion.costs import count_macs
from ..conversion.timing import times_of

_TOLERANCE = 1e-3  # of the largest output


def measured(networks: Mapping[str, tuple[nn.Module, Path]], images: Tensor) -> dict[str, Any]:
    """Measures plain networks, each with its ONNX file: sizes, multiply-adds, and medians of alternating timed runs.

    Times are those of the images, in torch on their device and in ONNX Runtime on the CPU.
    """
    torch_times = times_of({name: network for name, (network, _) in networks.items()}, images)
    onnx_times = times_of({name: path for name, (_, path) in networks.items()}, images.cpu().float().contiguous())
    return {
        name: dict(
            bytes=path.stat().st_size,
            parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
            macs=count_macs(network, images),
            torch_ms=statistics.median(torch_times[name]),
            onnx_ms=statistics.median(onnx_times[name]),
        )
        for name, (network, path) in networks.items()
    }


def export_checked(network: nn.Module, images: Tensor, path: Path) -> None:
    """Writes a plain network as ONNX and compares the outputs with torch's, both on the CPU in float32.

    Raises InputError if they differ, or the network cannot be exported.
    """
    network, images = copy.deepcopy(network).cpu().float().eval(), images.cpu().float()  # a GPU may have fewer digits
    with explained(f'{path.name} cannot be written or run', Exception), torch.inference_mode():
        write_onnx(network, images, path)
        with onnx_session(path) as run:
            found, expected = run(images), network(images)
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo().tiny))
    if not error < _TOLERANCE:
        raise InputError(f'{path.name} differs from the network by {error:.2g} of the largest output in ONNX Runtime.')
