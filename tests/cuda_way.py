"""The way that layers take on CUDA, on the CPU: which operations a step dispatches, and products in TF32."""

import importlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = [importlib.import_module(f'timm_harmonic.layers.{name}') for name in ('base', 'block', 'compose')]
# They launch nothing, and their schema does not say so.
_FREE = {'_unsafe_view', 'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'promote_types'}


def take(monkeypatch, tf32=True):
    """Makes layers on the CPU compute as on CUDA, where TF32 is allowed or not."""
    for module in LAYERS:
        kind_of = module.kind_of
        monkeypatch.setattr(module, 'kind_of', lambda x, kind_of=kind_of: {'cpu': 'cuda'}.get(kind_of(x), kind_of(x)))
        if hasattr(module, 'allows_tf32'):
            monkeypatch.setattr(module, 'allows_tf32', lambda: tf32)


class Dispatched(TorchDispatchMode):
    """Counts what a GPU computes (`kernels`), and what only describes memory anew (`views`), by operation."""

    def __init__(self):
        super().__init__()
        self.kernels, self.views = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix('aten::')
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        (self.views if view or name in _FREE else self.kernels)[name] += 1
        return func(*args, **(kwargs or {}))


def dispatched(model, x, precision=torch.bfloat16):
    """Numbers of kernels and views of a forward pass and, in training, of the backward pass, under autocast."""
    for parameter in model.parameters():
        parameter.grad = None
    with Dispatched() as found:
        with torch.autocast('cpu', precision, enabled=precision is not None):
            y = model(x)
        if model.training:
            y.backward(torch.ones_like(y))
    return found.kernels.total(), found.views.total()


class TensorFloat32(TorchDispatchMode):
    """Rounds the factors of matrix products in float32 to TF32: 11 bits. Convolutions stay as they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ('aten::mm', 'aten::bmm', 'aten::addmm', 'aten::baddbmm'):
            args = [_rounded(x) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))


def _rounded(x):
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
