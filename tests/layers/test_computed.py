"""Weights that torch computes before each forward pass: filters and fused layers are those of the next one."""

import copy

import pytest
import reference
import torch
from timm.models import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, deploy
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.layers import HarmonicConv2dSame

pytestmark = pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated:FutureWarning')
LAYERS = [HarmonicConv2d, HarmonicConv2dSame, HarmonicBlock2d]


def pruned(layer):
    for name in ('weight', 'weight', 'bias'):
        if getattr(layer, name) is not None:
            prune.random_unstructured(layer, name, 0.3)
    return layer


COMPUTED = {
    'pruned': pruned,
    'weight_norm': weight_norm,
    'spectral_norm': spectral_norm,
    'spectral_norm, pruned bias': lambda layer: prune.random_unstructured(spectral_norm(layer), 'bias', 0.5),
    'parametrized': lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
}
each_kind = pytest.mark.parametrize('compute', COMPUTED.values(), ids=COMPUTED)


def changed(module, seed=1):
    """What an optimizer or a file does to parameters; computed weights stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def next_forward(layer, x):
    """A layer whose parameters are what the next forward pass of another has."""
    run = copy.deepcopy(layer)
    run(x)
    kind = next(kind for kind in LAYERS if isinstance(layer, kind))
    plain = kind(3, 8, 3).train(layer.training)
    with torch.no_grad():
        plain.weight.copy_(run.weight)
        plain.bias.copy_(run.bias)
    plain.bn = getattr(layer, 'bn', None)
    return plain


METHODS = [
    lambda layer: layer.filters(),
    lambda layer: layer.coefficients(),
    lambda layer: layer.energies(),
    lambda layer: list(layer.fuse().parameters()),
]


@each_kind
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', LAYERS)
def test_next_forward(kind, training, compute):
    torch.manual_seed(0)
    layer = changed(compute(reference.randomize_batch_norm(kind(3, 8, 3)).eval()))
    # In training each access to a spectrally normalised parametrization is another step.
    layer.train(training and not hasattr(layer, 'parametrizations'))
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    expected = next_forward(layer, torch.randn(2, 3, 9, 9))
    for method in METHODS:
        for form in ('dense', 'separable'):
            stale = copy.deepcopy(layer)
            stale.form = expected.form = form
            torch.testing.assert_close(method(stale), method(expected))
            torch.testing.assert_close(dict(stale.named_buffers()), buffers, rtol=0, atol=0)


@each_kind
def test_gradients_reach_what_is_learned(compute):
    layer = compute(HarmonicConv2d(3, 8, 3))
    for _ in range(2):
        layer.filters().square().sum().backward()
        gradients = [parameter.grad for name, parameter in layer.named_parameters() if 'bias' not in name]
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        with torch.no_grad():
            assert all(parameter.requires_grad for parameter in layer.fuse().parameters())


@each_kind
@torch.no_grad()  # what torch computes for plain convolutions cannot be copied otherwise
def test_fused_networks(compute):
    """By timm's function as by ours; what a plain convolution has stays."""
    torch.manual_seed(0)
    model = reference.small('harm_resnet18', dict(num_classes=3))
    layers = [model.conv1, model.layer1[0].conv1, model.layer2[0].conv2, model.layer2[0].downsample[0]]
    for layer in layers:
        compute(layer) if layer.bias is not None or compute != COMPUTED['spectral_norm, pruned bias'] else None
    changed(model)
    x = torch.randn(2, 3, 64, 64)
    fused = [fuse(copy.deepcopy(model)) for fuse in (deploy, reparameterize_model)]
    expected = model(x)
    for plain in fused:
        assert not harmonic_layers(plain)
        assert reference.relative_error(plain(x), expected) < 1e-4
        shortcut = plain.layer2[0].downsample[0]
        assert len(shortcut._forward_pre_hooks) == len(model.layer2[0].downsample[0]._forward_pre_hooks)


@pytest.mark.parametrize('kind', LAYERS)
def test_a_hook_that_nobody_knows_is_refused(kind):
    layer = kind(3, 8, 3)
    weight = layer.weight
    del layer.weight
    layer.weight_raw = weight
    layer.register_forward_pre_hook(lambda layer, inputs: setattr(layer, 'weight', 2 * layer.weight_raw))
    layer(torch.randn(2, 3, 9, 9))
    for method in METHODS:
        with pytest.raises(ValueError, match='a hook may compute its weight'):
            method(layer)
    with pytest.raises(ValueError, match='has hooks'):
        deploy(layer)


@pytest.mark.parametrize('compute', [pruned, weight_norm, spectral_norm])
def test_a_convolution_is_converted_as_it_is_next(compute):
    conv = changed(compute(nn.Conv2d(3, 8, 3)).eval())
    layer = HarmonicConv2d.from_conv2d(conv)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(layer(x), conv(x))
