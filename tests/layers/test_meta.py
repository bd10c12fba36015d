"""Networks made on meta, and filled as torch, accelerate and transformers do: the basis comes with the weights."""

from contextlib import contextmanager

import pytest
import reference
import torch
from torch import nn

from timm_harmonic.conversion.swap import harmonic_layers

PAIRS = dict(pairs={'layer1.0.conv2': 50, 'layer3.0.conv1': 100}, form={'layer3.*': 'separable'})
MODELS = [
    ('harm_resnet18', dict(reference.RESNET, smoothness=1)),
    ('harmonized', dict(reference.FAMILIES['harmonized'], **PAIRS)),
]


@contextmanager
def empty_weights():
    """Moves parameters to meta as they are registered, but no buffers, as accelerate's init_empty_weights does."""
    register = nn.Module.register_parameter

    def empty(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to('meta'), parameter.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, 'register_parameter', empty)
        yield


def by_dict(model, state):
    """As accelerate's set_module_tensor_to_device."""
    for name, value in state.items():
        owner, _, key = name.rpartition('.')
        module = model.get_submodule(owner)
        if key in module._buffers:
            module._buffers[key] = value
        else:
            module._parameters[key] = nn.Parameter(value)


def by_dict_and_moved(model, state):
    by_dict(model, state)
    model.to('cpu')


def by_attribute(model, state):
    for name, value in state.items():
        owner, _, key = name.rpartition('.')
        module = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(value) if key in module._parameters else value)


def emptied(model, state):
    model.to_empty(device='cpu').load_state_dict(state)


FILLED = [by_dict, by_dict_and_moved, by_attribute, emptied, lambda m, state: m.load_state_dict(state, assign=True)]


@pytest.mark.parametrize('fill', FILLED)
@pytest.mark.parametrize('made', [empty_weights, lambda: torch.device('meta')])
@pytest.mark.parametrize(('name', 'options'), MODELS)
def test_filled(name, options, made, fill):
    torch.manual_seed(0)
    options = dict(options, num_classes=3)
    model = reference.small(name, options).eval()
    with made():
        empty = reference.small(name, options).eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.bfloat16().float()
    fill(empty, {key: value.clone() for key, value in model.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(empty(x), model(x))
    assert not any(layer._forward_pre_hooks for layer in harmonic_layers(empty).values())


@pytest.mark.parametrize(('name', 'options'), MODELS)
def test_buffers_stay_where_parameters_alone_go_to_meta(name, options):
    """accelerate moves the buffers of such a network to its devices itself, and needs their values."""
    with empty_weights():
        model = reference.small(name, options)
    for _ in range(2):
        assert not any(buffer.is_meta for buffer in model.buffers())
        model.bfloat16().float()
    assert all(buffer.is_meta for buffer in model.to('meta').buffers())


def test_filters_without_a_forward_pass():
    with torch.device('meta'):
        model = reference.small('harm_resnet18', dict(smoothness=1))
    filled = reference.small('harm_resnet18', dict(smoothness=1))
    by_dict(model, filled.state_dict())
    for name, layer in harmonic_layers(model).items():
        assert torch.equal(layer.filters(), filled.get_submodule(name).filters())
        assert torch.equal(layer.fuse().weight, filled.get_submodule(name).fuse().weight)
