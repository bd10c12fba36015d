"""What layers launch on CUDA, counted on the CPU, and what holds for the basis that they choose there."""

import copy
import pickle

import cuda_way
import pytest
import reference
import timm
import torch
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.common.device import allows_tf32
from timm_harmonic.conversion.swap import harmonic_layers

pytestmark = pytest.mark.usefixtures('one_thread')
FORMATS = [torch.contiguous_format, torch.channels_last]


def above_plain(ours, plain, x, **kwargs):
    """Kernels and views of one network above those of another."""
    found = [cuda_way.dispatched(model, x, **kwargs) for model in (ours, plain)]
    return tuple(a - b for a, b in zip(*found, strict=True))


@pytest.mark.parametrize('memory_format', FORMATS, ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize(
    ('precision', 'tf32', 'channels', 'training', 'evaluation'),
    [
        (torch.bfloat16, True, 64, 2, 1),
        (torch.bfloat16, True, 8, 2, 1),
        (torch.float16, True, 64, 6, 3),
        (None, True, 64, 6, 3),
        (torch.float16, False, 64, 2, 1),
        (None, False, 64, 2, 1),
        (None, False, 8, 6, 3),
    ],
)
def test_kernels_of_a_layer(precision, tf32, channels, training, evaluation, memory_format, monkeypatch):
    """A product forward and one backward; in float64 four casts more."""
    cuda_way.take(monkeypatch, tf32)
    layer = HarmonicConv2d(channels, 24, 3, padding=1).to(memory_format=memory_format)
    x = torch.randn(2, channels, 9, 9).contiguous(memory_format=memory_format)
    plain = layer.fuse()
    kernels, views = above_plain(layer, plain, x, precision=precision)
    assert kernels == training
    assert views <= (6 if memory_format is torch.contiguous_format else 12)
    assert above_plain(layer.eval(), plain.eval(), x, precision=precision)[0] == evaluation


@pytest.mark.parametrize('memory_format', FORMATS, ids=['contiguous', 'channels_last'])
def test_kernels_of_the_stem(memory_format, monkeypatch):
    cuda_way.take(monkeypatch)
    stem = HarmonicBlock2d(3, 16, 7, stride=4, padding=3, bias=False).to(memory_format=memory_format)
    plain = nn.Conv2d(3, 16, 7, stride=4, padding=3, bias=False).to(memory_format=memory_format)
    assert above_plain(stem, plain, torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format))[0] <= 30


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('resnet50', reference.RESNET),
        ('seresnext101_32x4d', reference.RESNET),
        pytest.param('resnet50', {}, marks=pytest.mark.slow),
    ],
)
def test_kernels_of_a_training_step(name, options, monkeypatch):
    """Above the paper's own plain network: two a layer, and 40 in the stem."""
    cuda_way.take(monkeypatch)
    ours, plain = (timm.create_model(f'{kind}_{name}', **options).train() for kind in ('harm', 'harm0'))
    for model in (ours, plain):
        model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert above_plain(ours, plain, x)[0] <= 2 * (len(harmonic_layers(ours)) - 1) + 40


@pytest.mark.parametrize('cls', [HarmonicConv2d, HarmonicBlock2d])
@pytest.mark.parametrize(
    'changed',
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.bfloat16().float(),
        lambda layer: layer.double().half().float(),
        lambda layer: layer.to('meta').to_empty(device='cpu'),
        lambda layer: layer.to(memory_format=torch.channels_last),
    ],
)
def test_both_bases_survive(cls, changed, monkeypatch):
    cuda_way.take(monkeypatch)
    layer = cls(20, 8, 3)
    assert layer.state_dict().keys().isdisjoint({'basis', 'rounded', 'functions'})
    exact, new = layer.basis.clone(), changed(layer)
    assert torch.equal(new.basis, exact)
    assert torch.equal(new.rounded, exact.float())
    assert new.double().rounded is None


@pytest.mark.parametrize('cls', [HarmonicConv2d, HarmonicBlock2d])
def test_fused_filters_are_exact_under_autocast(cls, monkeypatch):
    cuda_way.take(monkeypatch)
    layer = reference.randomize_batch_norm(cls(64, 32, 3)).eval()
    expected = copy.deepcopy(layer).double().fuse().weight
    with cuda_way.TensorFloat32(), torch.autocast('cpu', torch.bfloat16):
        for found in (layer.filters(), layer.fuse().weight):
            assert reference.relative_error(found.double(), expected) < 2e-7


@pytest.mark.parametrize('cls', [HarmonicConv2d, HarmonicBlock2d])
@pytest.mark.parametrize('training', [False, True])
def test_exported(cls, training, monkeypatch):
    cuda_way.take(monkeypatch)
    layer = reference.randomize_batch_norm(cls(20, 8, 3)).train(training)
    x = torch.randn(3, 20, 9, 9)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize(('value', 'expected'), [('highest', False), ('high', True)])
def test_tf32_is_read(value, expected):
    """Also where a new switch was set: there the old one raises."""
    before, products = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision(value)
        assert allows_tf32() is expected
        if hasattr(products, 'fp32_precision'):  # since torch 2.9
            products.fp32_precision = 'ieee' if expected else 'tf32'
            assert allows_tf32() is not expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def compiler():
    torch.compiler.reset()  # all layers share a limit of variants
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures('compiler')
@pytest.mark.parametrize('precision', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('way', ['CPU', 'CUDA'])
@pytest.mark.parametrize('cls', [HarmonicConv2d, HarmonicBlock2d, lambda *args: HarmonicConv2d(*args).at_pairs(90)])
def test_compiled_gradients_are_not_rounded(cls, way, precision, monkeypatch):
    """Compiled, the backward pass runs under autocast: its error is that of the eager one. There is no graph break."""
    if way == 'CUDA':
        cuda_way.take(monkeypatch)
    torch.manual_seed(0)
    layer, x = cls(20, 8, 3), torch.randn(4, 20, 9, 9)
    compiled = torch.compile(copy.deepcopy(layer), backend='aot_eager', fullgraph=True)
    gradients = []
    for model in (copy.deepcopy(layer).double(), layer, compiled):
        with torch.autocast('cpu', precision, enabled=bool(gradients)):
            y = model(x if gradients else x.double())
        y.double().square().sum().backward()
        gradients.append(next(model.parameters()).grad.double())
    errors = [(found - gradients[0]).square().mean().sqrt() for found in gradients[1:]]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.slow
@pytest.mark.usefixtures('compiler')
@pytest.mark.filterwarnings('ignore:`torch.jit')  # the compiler's own imports
def test_compiled_composition_is_one_kernel(monkeypatch):
    """Forward, and backward, by inductor."""
    from torch._inductor import metrics

    cuda_way.take(monkeypatch)
    layer = HarmonicConv2d(64, 16, 3)

    @torch.compile(fullgraph=True)
    def filters(weight):
        return cuda_way.LAYERS[-1].compose(weight, layer.rounded)

    metrics.reset()
    filters(layer.weight).sum().backward()
    assert metrics.generated_kernel_count == 2
