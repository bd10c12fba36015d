"""Slow and obvious definitions for the tests to compare with, the rule behind the golden data, small networks."""

import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

import timm_harmonic  # noqa: F401  registers the models
from timm_harmonic.common.onnx import onnx_session, write_onnx

DATA = Path(__file__).parent / 'data'
RESNET = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), num_classes=5)
# A network of each family, and the options that make it small.
FAMILIES = {
    'harm_resnet18': RESNET,
    'harm_resnet50_avgpool': RESNET,
    'harm_seresnext50_32x4d': RESNET,
    'harm_vgg11_bn': dict(mlp_ratio=0.02, num_classes=5),
    'harm_wrn16_8': dict(depth=10, width=1, num_classes=5),
    'harmonized': dict(base_model='resnet18', **RESNET),
}


def small(name, options=None, **kwargs):
    """A small network with batch-norms as of training, in evaluation; `options` if it has none in FAMILIES."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**(FAMILIES[name] if options is None else options), **kwargs})
    return randomize_batch_norm(model).eval()


def spectrum(k, level=None, dc=True, smoothness=None):
    """What smoothness scales the functions by, one number at a time: float64 tensor (P,)."""
    factors = []
    for i in range(k):
        for j in range(k):
            if (level is None or i + j < level) and (dc or i + j > 0):
                factors.append((1 + i + j) ** -float(smoothness or 0))
    mean_square = sum(s * s for s in factors) / len(factors)
    return torch.tensor([s / math.sqrt(mean_square) for s in factors], dtype=torch.float64)


def dct_functions(k, level=None, dc=True, normalization='l1', smoothness=None):
    """The DCT functions by their formula, one number at a time: float64 tensor (P, k, k)."""
    if smoothness is not None:
        factors = spectrum(k, level, dc, smoothness)
        return dct_functions(k, level, dc, 'ortho') * factors[:, None, None]
    functions = []
    for i in range(k):
        for j in range(k):
            if (level is not None and i + j >= level) or (not dc and i == j == 0):
                continue
            d = torch.tensor(
                [
                    [math.cos(math.pi * (x + 0.5) * i / k) * math.cos(math.pi * (y + 0.5) * j / k) for y in range(k)]
                    for x in range(k)
                ],
                dtype=torch.float64,
            )
            functions.append(d / (d.abs().sum() if normalization == 'l1' else d.norm()))
    return torch.stack(functions)


def responses(x, functions, stride=1, padding=0, dilation=1, padding_mode='zeros'):
    """Every channel filtered by every DCT function, depth-wise: (B, C * P, H', W')."""
    k, channels = functions.shape[-1], x.shape[1]
    if padding == 'same':
        total = dilation * (k - 1)
        pads = (total // 2, total - total // 2) * 2
    else:
        pads = (0 if padding == 'valid' else padding,) * 4
    x = F.pad(x, pads, mode='constant' if padding_mode == 'zeros' else padding_mode)
    filters = functions.to(x).repeat(channels, 1, 1).unsqueeze(1)
    return F.conv2d(x, filters, stride=stride, dilation=dilation, groups=channels)


def mix(filtered, weight, bias, groups):
    """1 x 1 convolution of the responses by coefficients (O, I, P, 1)."""
    return F.conv2d(filtered, weight.reshape(len(weight), -1, 1, 1), bias, groups=groups)


def generated_tensor(seed, name, shape):
    """A parameter of the golden data, generated from its name (see tests/data/README.md)."""
    random = np.random.RandomState(zlib.crc32(f'{seed}:{name}'.encode()))
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    if name.endswith('running_mean'):
        values = 0.1 * random.standard_normal(shape)
    elif name.endswith('running_var'):
        values = 0.5 + random.random_sample(shape)
    elif len(shape) == 1 and name.endswith('weight'):
        values = 0.5 + 0.5 * random.random_sample(shape)
    elif len(shape) == 1:
        values = 0.1 * random.standard_normal(shape)
    else:
        values = random.standard_normal(shape) * math.sqrt(2 / np.prod(shape[1:])) * (3.0 if len(shape) == 5 else 1.0)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def generated_state_dict(name, seed=None):
    """A state dict in the authors' layout, with `.dct` tensors, as tests/data/<name>.json lists it."""
    spec = json.loads((DATA / f'{name}.json').read_text())
    state = {}
    for key, shape in spec['keys']:
        if key.endswith('.dct'):
            state[key] = authors_dct(shape)
        else:
            state[key] = generated_tensor(spec['seed'] if seed is None else seed, key, shape)
    return state


def authors_dct(shape):
    """The frozen tensor that the authors' layer keeps: (1, P, k, k), or (C * P, 1, k, k) before normalisation."""
    k = shape[-1]
    full = dct_functions(k).float()
    if shape[0] != 1:
        return full.repeat(shape[0] // k**2, 1, 1).unsqueeze(1)
    level = next(level for level in range(1, 2 * k) if len(dct_functions(k, level)) == shape[1])
    return dct_functions(k, level).float().unsqueeze(0)


def generated_images(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def relative_error(actual, expected):
    """Largest difference over largest expected magnitude; 0 if there is no difference."""
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item() if difference != 0 else 0.0


def randomize_batch_norm(model, seed=0):
    """Gives every batch-norm statistics and scales, as training would. New ones would hide mistakes in fusing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    with torch.no_grad():
                        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return model


def check_every_way(layer, x, path):
    """A layer scripted, traced, exported and compiled without a break has its outputs, and compiled its gradients."""
    torch.compiler.reset()  # all layers share a limit of variants
    write_onnx(layer, x, path)
    ways = [
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.fx.symbolic_trace(layer.fuse()),
        torch.jit.script(layer.fuse()),
        torch.export.export(layer, (x,)).module(),
        compiled := torch.compile(copy.deepcopy(layer).train(), fullgraph=True, backend='aot_eager'),
    ]
    with onnx_session(path) as in_onnx:
        for way in (*ways, in_onnx):
            torch.testing.assert_close(way(x), layer(x), rtol=1e-4, atol=1e-5)
    for module in (layer, compiled):
        module(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def smooth_images(count, size):
    """Random images as smooth as photographs are: many functions matter little in them."""
    small = torch.randn(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, size=(size, size), mode='bicubic', align_corners=False)
