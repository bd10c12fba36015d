"""export_onnx: float32 and 8 bits, as close to the network as stated, whole or not at all."""

import importlib.util

import numpy as np
import onnx
import pytest
import reference
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from timm_harmonic import HarmonicConv2d, dct_basis, deploy, export_onnx, harmonize, truncate
from timm_harmonic.common import InputError
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.export import onnx as ours

pytestmark = pytest.mark.usefixtures('one_thread')

STATED = 0.05  # error of the logits in 8 bits


def gratings(count, seed):
    """Noisy stripes (N, 1, 32, 32) in four directions, their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 4
    phase, angle = 6.3 * torch.rand(count, 1, 1, 1, generator=generator), classes.view(-1, 1, 1, 1) * torch.pi / 4
    x = torch.arange(32.0)
    stripes = torch.sin(0.8 * (x * angle.cos() + x[:, None] * angle.sin()) + phase)
    return stripes + 0.5 * torch.randn(count, 1, 32, 32, generator=generator), classes


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    options = dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 32), in_chans=1, num_classes=4)
    model = timm.create_model('resnet18', **options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(30):
        images, classes = gratings(32, step)
        cross_entropy(model(images), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope='module')
def batches():
    return [gratings(32, seed) for seed in (1000, 1001)]


def test_float32(trained, batches, tmp_path):
    """Harmonic layers are deployed on the way, and the network stays as it was."""
    model = truncate(harmonize(trained), level=2).double().train()
    check = export_onnx(model, batches[0][0].double(), tmp_path / 'x.onnx')
    assert check.error < 1e-5
    assert check.agreement == 1
    assert harmonic_layers(model)
    assert (model.training, next(model.parameters()).dtype) == (True, torch.float64)
    images, _ = gratings(7, 2000)
    with torch.no_grad():
        expected = model.eval()(images.double()).float()
    assert reference.relative_error(ours.logits_of(tmp_path / 'x.onnx', images), expected) < 1e-5


@pytest.mark.parametrize('level', [*(pytest.param(level, marks=pytest.mark.slow) for level in (None, 1)), 3])
def test_eight_bits(trained, batches, level, tmp_path):
    """Close to the network on images that nobody saw; every convolution in 8 bits; fixed filters exact."""
    low = harmonize(trained, exclude='conv1', level=level)  # the stem's filters have one channel
    network, file = deploy(low, form='dense' if level is None else 'separable'), tmp_path / 'x.onnx'
    found = export_onnx(network, batches[0][0], file, int8=batches)
    images, _ = gratings(64, 2000)
    with torch.inference_mode():
        check = ours.compared(ours.logits_of(file, images), network(images))
    assert max(found.error, check.error) < STATED
    assert min(found.agreement, check.agreement) > 0.9

    graph = onnx.load(file).graph
    made = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == 'Conv']
    assert len(convolutions) == sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    functions = dct_basis(3, level).numpy()
    functions /= np.abs(functions).max((1, 2), keepdims=True)
    for node in convolutions:
        weights = constants[made[node.input[1]].input[0]]
        assert made[node.input[0]].op_type == 'DequantizeLinear'
        assert (weights.dtype, np.abs(weights).max()) == (np.int8, 64)  # sums of two products fit into 16 bits
        if onnx.helper.get_node_attr_value(node, 'group') > 1:
            filters = weights / np.abs(weights).max((1, 2, 3), keepdims=True)  # (C, 1, k, k), any scale
            distances = np.abs(filters - functions).max((2, 3))  # from every function
            assert distances.min(1).max() < 1e-7


@pytest.mark.parametrize('groups', [1, 2])
def test_eight_bits_with_a_channel_that_is_rarely_active(groups, tmp_path):
    """Its large weights must not round the others away."""
    torch.manual_seed(0)
    layer = HarmonicConv2d(8, 16, 3, padding=1, groups=groups, level=2, form='separable')
    images = torch.randn(32, 8, 16, 16)
    with torch.no_grad():
        images[:, 2] /= 1000
        layer.weight[:, 2] *= 50
        network = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        plain = deploy(network, form='separable')
        before = plain(images)
        check = export_onnx(plain, images[:1], tmp_path / 'int8.onnx', int8=[images])
        assert check.error < STATED
        assert torch.equal(plain(images), before)


def test_eight_bits_of_a_network_that_resizes(batches, tmp_path):
    """As U-Nets do, by a factor: onnxruntime cannot infer their symbolic shapes."""
    layers = torch.nn.Conv2d(1, 8, 3, stride=2, padding=1), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(8, 2, 1)
    assert export_onnx(torch.nn.Sequential(*layers), batches[0][0], tmp_path / 'x.onnx', int8=batches).error < STATED


@pytest.mark.slow
def test_the_better_ranges_are_taken(trained, batches, tmp_path, monkeypatch):
    alone = {}
    for method in ours._METHODS:
        monkeypatch.setattr(ours, '_METHODS', (method,))
        alone[method] = export_onnx(trained, batches[0][0], tmp_path / method, int8=batches).error
    monkeypatch.undo()
    assert len(set(alone.values())) == len(alone) > 1
    assert export_onnx(trained, batches[0][0], tmp_path / 'best', int8=batches).error == min(alone.values())


@pytest.mark.parametrize(
    ('int8', 'error', 'words'),
    [
        ([], InputError, 'data hold no batches'),
        ([torch.randn(7, 1, 32, 32)], InputError, 'data hold 7 images: at least 8 are needed'),
        ([torch.full((8, 1, 32, 32), torch.nan)], InputError, 'batch 0 of data has values that are not finite'),
        ([torch.randn(8, 1, 16, 16)], InputError, 'x.onnx cannot be written or run'),
        (torch.randn(8, 1, 32, 32), TypeError, 'data must be batches of images'),
        ('missing', InputError, 'missing packages: pip install onnxruntime'),
        ('unwritable', InputError, 'cannot be written: NotADirectoryError'),
    ],
)
def test_refused_without_a_trace(trained, batches, int8, error, words, tmp_path, monkeypatch):
    """A file that was there stays."""
    path = tmp_path / 'x.onnx'
    path.write_text('old')
    if int8 == 'missing':
        find = importlib.util.find_spec
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'onnxruntime' else find(name))
    target, data = (path / 'y', None) if int8 == 'unwritable' else (path, int8)
    with pytest.raises(error, match=words):
        export_onnx(trained, batches[0][0], target, int8=data)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [('x.onnx', 'old')]
