"""How long modules take, in torch or in ONNX Runtime."""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn

from ..common import InputError, explained, require
from ..common.onnx import onnx_session, write_onnx
from ..layers import Gather, RepeatChannels

RUNTIMES = ('torch', 'onnxruntime')

_ROUNDS, _ROUND = 9, 3e-3  # rounds of timing, and the least seconds of one


def check_runtime(runtime: str) -> None:
    """Raises InputError if a runtime is unknown or not installed."""
    if runtime not in RUNTIMES:
        raise InputError(f'runtime must be one of {RUNTIMES}, got {runtime!r}.')
    if runtime == 'onnxruntime':
        require(onnx='onnx', onnxruntime='onnxruntime', onnxscript='onnxscript')


def times_of(runs: Mapping[str, Callable[[Tensor], Any] | Path | bytes], x: Tensor) -> dict[str, list[float]]:
    """Times functions in torch, and ONNX files in ONNX Runtime, on an input: milliseconds, one entry a round.

    They take turns in each round. A file has its session for its turn alone: threads of idle sessions spin.
    """
    from torch.utils.benchmark import Timer  # here, because it imports torch's compiler of extensions, which prints

    threads = torch.get_num_threads()
    found: dict[str, list[float]] = {name: [] for name in runs}
    number: dict[str, int] = {}
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            for name, run in runs.items():
                with nullcontext(run) if callable(run) else onnx_session(run) as call:
                    timer = Timer('call(x)', globals=dict(call=call, x=x), num_threads=threads)  # it warms up, too
                    if name not in number:
                        number[name] = max(1, round(_ROUND / timer.timeit(3).mean))
                    found[name].append(1e3 * timer.timeit(number[name]).mean)
    return found


def times_of_layers(layers: Mapping[str, nn.Module], x: Tensor, runtime: str) -> dict[str, list[float]]:
    """Times fused harmonic layers in a runtime, see `times_of`."""
    if runtime == 'torch':
        return times_of(layers, x)
    x = _for_onnx(x)
    return times_of({name: layer_in_onnx(layer, x) for name, layer in layers.items()}, x)


def time_of(network: nn.Module, images: Tensor, runtime: str) -> float:
    """Returns the milliseconds that a plain network takes in a runtime. Raises InputError if it cannot be exported."""
    if runtime == 'torch':
        return statistics.median(times_of({'network': network}, images)['network'])
    with tempfile.TemporaryDirectory() as folder, explained('the network cannot be timed in ONNX Runtime', Exception):
        write_onnx(network, images, path := Path(folder, 'network.onnx'))
        return statistics.median(times_of({'network': path}, _for_onnx(images))['network'])


def _for_onnx(x: Tensor) -> Tensor:
    return x.detach().cpu().float().contiguous()


def layer_in_onnx(layer: nn.Module, x: Tensor) -> bytes:
    """Returns the ONNX file of a fused harmonic layer for inputs like x, in milliseconds: an export takes seconds.

    It is for timing: any padding mode becomes zeros.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, name = [], [], 'images'
    for place, module in enumerate(layer if isinstance(layer, nn.Sequential) else [layer]):
        kind, inputs = 'Concat', [name]
        options: dict[str, Any] = dict(axis=1)
        if isinstance(module, RepeatChannels):
            inputs *= module.times
        elif isinstance(module, Gather):
            kind, inputs = 'Gather', [name, f'{place}.places']
            weights.append(numpy_helper.from_array(module.places.cpu().numpy(), inputs[1]))
        else:
            conv: Any = module
            kind, options = 'Conv', dict(strides=conv.stride, dilations=conv.dilation, group=conv.groups)
            if conv.padding == 'same' or isinstance(conv, Conv2dSame):
                spans = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
                both = [get_same_padding(*span) for span in spans]
                options['pads'] = [of // 2 for of in both] + [of - of // 2 for of in both]
            elif conv.padding != 'valid':
                options['pads'] = 2 * conv.padding
            for key, parameter in conv.named_parameters():
                inputs.append(f'{place}.{key}')
                weights.append(numpy_helper.from_array(parameter.detach().cpu().float().numpy(), inputs[-1]))
        name = str(place)
        nodes.append(helper.make_node(kind, inputs, [name], **options))
    first = helper.make_tensor_value_info('images', TensorProto.FLOAT, x.shape)
    last = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, 'layer', [first], [last], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=8).SerializeToString()
