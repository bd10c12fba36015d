"""ONNX files of plain networks, in float32 and in 8 bits, checked in ONNX Runtime, and their measurements."""

import copy
import importlib
import io
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common import InputError, explained
from ..common.files import write_whole
from ..common.onnx import onnx_session, write_onnx
from ..conversion.costs import count_macs
from ..conversion.deploy import deploy
from ..conversion.running import HELD_OUT, read_images, watching
from ..conversion.swap import harmonic_layers
from ..conversion.timing import check_runtime, times_of

_TOLERANCE = 1e-3  # of the largest output, in float32
_METHODS = ('MinMax', 'Percentile')  # of choosing the ranges of activations, by onnxruntime's names
_NARROWEST = 1e-6  # range of responses that are scaled, as a share of the widest one in their layer
_TOGETHER = 8  # images that run through ONNX Runtime together


class Check(NamedTuple):
    """How the outputs of an ONNX file compare with the network's: relative error, and share of equal first classes."""

    error: float
    agreement: float


def export_onnx(model: nn.Module, images: Tensor, path: str | Path, *, int8: Iterable[Any] | None = None) -> Check:
    """Writes a network for inference as an ONNX file, checked in ONNX Runtime on the CPU, or writes nothing.

    The file takes batches of any size; its input is called `images`. Harmonic layers are deployed first, in the forms
    of `deploy`'s rule: to choose the forms, pass what `deploy` returns.

    In 8 bits, ranges of activations are static: the extremes on three quarters of the images, or all but the outermost
    values if the logits of the other quarter are closer to the network's then. Weights are signed and take 7 of the 8
    bits, a scale for each filter: processors without 8-bit dot products add pairs of products in 16 bits, which 8 bits
    overflow. So the file computes the same on all of them, and the 3 x 3 functions of the DCT are exact.

    Args:
        model: A network in any mode and dtype, on any device. It is not changed.
        images: Example batch (B, C, H, W), with which the float32 file is checked.
        path: File to write. A file that is there is replaced.
        int8: Batches of images (B, C, H, W), alone or first in a tuple or list, prepared as for the network: to write
            a file in 8 bits. Labels are not used.

    Returns:
        The `error` of the file's outputs, as a share of their norm, and the `agreement`, the share of images with the
        same first class: of the images, or in 8 bits of the held-out quarter.

    Raises:
        InputError: The network cannot be exported or quantized, its float32 file differs by more than 0.001 of the
            largest output, a package is missing, or `int8` holds fewer than eight images or unusable ones.
        TypeError: `int8` does not hold batches.
    """
    check_runtime('onnxruntime')
    plain = deploy(model, runtime='onnxruntime') if harmonic_layers(model) else copy.deepcopy(model)
    plain, images = plain.cpu().float().eval(), images.cpu().float()  # a GPU may have fewer digits
    data = None if int8 is None else read_images(int8, images)
    found: list[Check] = []

    def write(file: Path) -> None:
        with explained(f'{file.name} cannot be written or run', Exception), torch.inference_mode():
            _equalise(plain, data or [])
            write_onnx(plain, images, file)
            logits, expected = logits_of(file, images), plain(images)
            error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo().tiny))
            if not error < _TOLERANCE:
                raise InputError(f'{file.name} differs from the network by {error:.2g} of the largest output.')
            found.append(compared(logits, expected) if data is None else _quantize(file, torch.cat(data)))

    write_whole(Path(path), write)
    return found[0]


def logits_of(file: Path, images: Tensor) -> Tensor:
    """Runs an ONNX file on images in ONNX Runtime on the CPU."""
    with onnx_session(file) as run:
        return torch.cat([run(part) for part in images.split(_TOGETHER)])


def compared(logits: Tensor, expected: Tensor) -> Check:
    """Compares logits (B, classes) with the expected ones."""
    error = (logits - expected).norm() / expected.norm().clamp_min(torch.finfo().tiny)
    return Check(error.item(), (logits.argmax(1) == expected.argmax(1)).float().mean().item())


def _equalise(plain: nn.Module, data: Iterable[Tensor]) -> None:
    """Scales the responses in separable layers to one range, and the weights that mix them the other way, in place.

    In 8 bits all responses of a layer have one scale, and so have all weights of an output. A channel that is rarely
    active has small responses and may have large weights: the others would be rounded away. As in Nagel et al. 2019
    (arXiv:1906.04721), section 4.1, but by the responses to images (B, C, H, W) in place of the filters.
    """
    largest: dict[str, Tensor] = {}

    def note(name: str, respond: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found = output.abs().amax((0, 2, 3))
        largest[name] = found.maximum(largest.get(name, found))

    layers: dict[str, Any] = {n: m for n, m in plain.named_modules() if {'respond', 'mix'} <= {*m._modules}}
    with watching({name: layer.respond for name, layer in layers.items()}, note):
        for part in data:
            plain(part)
    for name, found in largest.items():
        respond, mix = layers[name].respond, layers[name].mix
        factors = found.clamp_min(_NARROWEST * found.max()) if found.any() else torch.ones_like(found)
        respond.weight.data /= factors[:, None, None, None]
        grouped = mix.weight.data.unflatten(0, (mix.groups, -1))
        grouped *= factors.view(mix.groups, 1, -1, 1, 1)


def _quantize(file: Path, images: Tensor) -> Check:
    """Replaces an ONNX file in float32 by one in 8 bits, with the ranges that are better on held-out images."""
    quantization: Any = importlib.import_module('onnxruntime.quantization')
    prepare: Any = importlib.import_module('onnxruntime.quantization.shape_inference')
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    expected = logits_of(file, images[held_out])
    checks: dict[Path, Check] = {}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, redirect_stdout(io.StringIO()):
        ready = Path(folder, 'ready.onnx')
        # Symbolic shapes are for transformers; they fail where a network resizes by a factor.
        prepare.quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
        for method in _METHODS:
            quantized = Path(folder, f'{method}.onnx')
            quantization.quantize_static(
                str(ready),
                str(quantized),
                _Reader(images[~held_out]),
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod[method],
                extra_options=dict(CalibStridedMinMax=1, CalibPercentile=99.99),
            )
            checks[quantized] = compared(logits_of(quantized, images[held_out]), expected)
        best = min(checks, key=lambda quantized: checks[quantized].error)
        best.replace(file)
    return checks[best]


class _Reader:
    """Images for onnxruntime's calibration, part by part: it keeps what all layers compute for a part."""

    def __init__(self, images: Tensor) -> None:
        self._parts = images.split(_TOGETHER)

    def __len__(self) -> int:
        return len(self._parts)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next = iter(self._parts[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        return next((dict(images=part.numpy()) for part in self._next), None)


def measured(
    files: Mapping[str, Path], networks: Mapping[str, nn.Module], images: Tensor, held_out: Tensor | None
) -> dict[str, dict[str, Any]]:
    """Measures ONNX files: bytes, time, also of the first file's, and how logits compare with its on held-out images.

    Times are medians for the images in ONNX Runtime on the CPU and, for files whose network is given, in torch on the
    images' device. Networks also tell their multiply-adds.
    """
    found: dict[str, dict[str, Any]] = {name: dict(bytes=file.stat().st_size) for name, file in files.items()}
    for name, times in times_of(files, images.cpu().float().contiguous()).items():
        found[name]['onnx_ms'] = statistics.median(times)
        found[name]['of_plain'] = found[name]['onnx_ms'] / next(iter(found.values()))['onnx_ms']
    for name, times in times_of(networks, images).items():
        found[name] |= dict(macs=count_macs(networks[name], images), torch_ms=statistics.median(times))
    if held_out is not None:
        expected = logits_of(next(iter(files.values())), held_out)
        for name, file in files.items():
            found[name] |= compared(logits_of(file, held_out), expected)._asdict()
    return found
