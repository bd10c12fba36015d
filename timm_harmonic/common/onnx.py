"""Modules as ONNX files, and ONNX Runtime."""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    """Writes a plain network as ONNX in float32, for batches of any size. Its input is called `images`."""
    batches = ({0: torch.export.Dim.DYNAMIC},)
    options: dict[str, Any] = dict(input_names=['images'], dynamic_shapes=batches, dynamo=True, verbose=False)
    example = torch.cat([images.cpu().float()] * 2)  # from a batch of one, torch 2.7 infers a fixed size
    program: Any = torch.onnx.export(copy.deepcopy(network).cpu().float().eval(), (example,), **options)
    program.save(path, external_data=False)


@contextmanager
def onnx_session(file: Path | bytes) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that runs an ONNX file in ONNX Runtime on the CPU, with as many threads as torch."""
    onnxruntime: Any = importlib.import_module('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    held = [onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])]
    try:
        yield lambda images: torch.from_numpy(held[0].run(None, dict(images=images.contiguous().numpy()))[0])
    finally:
        held.clear()  # ends its threads, even if the function lives on
