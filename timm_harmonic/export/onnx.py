"""ONNX files of plain networks, checked in ONNX Runtime, and their measurements."""

import copy
import importlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common import InputError
from ..conversion.costs import count_macs, times_of

_NAME = 'deployed.onnx'
_TOLERANCE = 1e-3  # of the largest output


def write_deployed(plain: nn.Module, small: nn.Module, images: Tensor, folder: Path) -> dict[str, Any]:
    """Writes a compressed network as deployed.onnx and measures it beside the complete one, both from `deploy`.

    Times are medians of alternating runs on the batch of images, in milliseconds: in torch on the device of the images,
    and in ONNX Runtime on the CPU.

    Returns the measurements by network. Raises InputError if the outputs in ONNX Runtime differ from those in torch.
    """
    with tempfile.TemporaryDirectory() as other:
        networks = {'plain': (plain, Path(other) / _NAME), 'compressed': (small, folder / _NAME)}
        runners = {}
        for name, (network, path) in networks.items():
            export_onnx(network, images, path)
            runners[name] = onnx_runner(path)
            _check(network, images, runners[name])
        sizes = {name: path.stat().st_size for name, (_, path) in networks.items()}
    torch_times = times_of({name: network for name, (network, _) in networks.items()}, images)
    onnx_times = times_of(runners, images.cpu())
    return {
        name: dict(
            bytes=sizes[name],
            parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
            macs=count_macs(network, images),
            torch_ms=statistics.median(torch_times[name]),
            onnx_ms=statistics.median(onnx_times[name]),
        )
        for name, (network, _) in networks.items()
    }


def export_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    """Writes a plain network as ONNX, for batches of any size. Its input is called `images`."""
    batches = ({0: torch.export.Dim.DYNAMIC},)
    options: dict[str, Any] = dict(input_names=['images'], dynamic_shapes=batches, dynamo=True, verbose=False)
    example = torch.cat([images.cpu()] * 2)  # from a batch of one, torch 2.7 infers a fixed size
    program: Any = torch.onnx.export(copy.deepcopy(network).cpu().eval(), (example,), **options)
    program.save(path, external_data=False)


def onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    """A function that runs an ONNX file in ONNX Runtime on the CPU, with as many threads as torch."""
    onnxruntime: Any = importlib.import_module('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # they alternate
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, dict(images=images.contiguous().numpy()))[0])


def _check(network: nn.Module, images: Tensor, runner: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode():
        expected = network(images).cpu()
    error = float((runner(images.cpu()) - expected).abs().max() / expected.abs().max())
    if not error < _TOLERANCE:
        raise InputError(f'{_NAME} differs from the network by {error:.2g} of the largest output in ONNX Runtime.')
