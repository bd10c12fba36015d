"""deploy: plain networks that compute the same, in the forms that are named, ruled or measured."""

import copy

import pytest
import reference
import timm
import torch
from timm.models import get_model_args, reparameterize_model
from torch import nn

from timm_harmonic import HarmonicConv2d, deploy, harmonic_report, harmonize, truncate
from timm_harmonic.common.onnx import onnx_session, write_onnx
from timm_harmonic.conversion import timing
from timm_harmonic.conversion.costs import costs_of, count_macs, forms_by_rule, forms_by_time, multiply_adds, set_forms
from timm_harmonic.conversion.running import uses_of
from timm_harmonic.conversion.swap import harmonic_layers

# One network of each of our families, small, and of timm's one for each peculiarity: paddings, blocks that fuse
# themselves, depth-wise and grouped convolutions, layers used in several places.
OURS = [name for name in reference.FAMILIES if name != 'harmonized']
OTHERS = ['resnet18', 'tf_efficientnet_lite0', 'repvgg_a0']
MORE = 'regnety_002 densenet121 convnext_atto ghostnet_050 mobileone_s0 fastvit_t8 hrnet_w18_small dla34 '
MORE += 'repvit_m0_9 tiny_vit_5m_224'


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return harmonize(reference.small('resnet18', dict(layers=(1, 1, 1, 1), num_classes=10)))


def separable(model):
    """Names of what was fused into two modules."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Sequential) and hasattr(m, 'respond')]


@pytest.mark.parametrize(
    'name', [*OURS, *OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE.split())]
)
def test_a_deployed_network_computes_the_same(name):
    """In each form, at mixed levels, with nothing harmonic left. The network does not change."""
    model = harmonize(reference.small(name, reference.FAMILIES.get(name, dict(num_classes=5))))
    model = truncate(model, levels={name: 1 + place % 3 for place, name in enumerate(harmonic_layers(model))})
    # The own fusing of these drops the dtype.
    dtype, tolerance = (torch.float32, 1e-4) if name in MORE.split()[-2:] else (torch.float64, 1e-9)
    model, x = model.to(dtype), torch.randn(1, 3, 64, 64, dtype=dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        for form in ('auto', 'separable', 'dense'):
            plain = deploy(model, form=form)
            assert reference.relative_error(plain(x), expected) < tolerance
            assert not harmonic_layers(plain)
            assert not plain.training
            assert (form == 'dense') <= (not separable(plain))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {layer.form for layer in harmonic_layers(model).values()} == {'dense'}


def by_onnx_runtime(plain, x, folder):
    write_onnx(plain, x, folder / 'model.onnx')

    def run(x):
        with onnx_session(folder / 'model.onnx') as call:
            return call(x)

    return run


def by_inductor(plain, x, folder):
    path = str(folder / 'model.pt2')
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=path))


def by_export(plain, x, folder):
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    signature = program.graph_signature
    stored = signature.inputs_to_parameters | signature.inputs_to_buffers
    convolutions = [node for node in program.graph.nodes if 'conv' in getattr(node.target, '_opname', '')]
    assert len(convolutions) == sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    assert all(node.args[1].name in stored for node in convolutions)  # no weight is computed
    return program.module()


@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # torch's own
@pytest.mark.parametrize(
    'export', [by_export, by_onnx_runtime, by_inductor, lambda plain, x, folder: torch.jit.script(plain)]
)
@pytest.mark.slow
def test_deployed_networks_are_exported(network, export, tmp_path):
    """With both forms, at three levels. For batches of any size."""
    mixed = truncate(network, levels={'layer1.*': 1, 'layer2.*': 2, 'layer3.*': 3, '*': None})
    separate = ('layer1', 'layer2.0.conv2')
    set_forms(mixed, {name: 'separable' for name in harmonic_layers(mixed) if name.startswith(separate)})
    plain = reparameterize_model(mixed)
    run = export(plain, torch.randn(2, 3, 64, 64), tmp_path)
    x = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        assert reference.relative_error(run(x), mixed(x)) < 1e-4


def test_timms_function_follows_the_forms(network):
    low, x = truncate(network, level=1), torch.randn(1, 3, 64, 64)
    expected = low(x)
    set_forms(low, dict.fromkeys(('layer1.0.conv1', 'layer4.0.conv2'), 'separable'))
    plain = reparameterize_model(low)
    assert separable(plain) == ['layer1.0.conv1', 'layer4.0.conv2']
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize(('runtime', 'channels'), [('torch', 128), ('onnxruntime', 64)])
def test_the_rule(network, runtime, channels):
    """Level 1 always, level 2 in wide layers, more than that never; depth-wise filters never."""
    by_level = {level: forms_by_rule(truncate(network, level=level), runtime) for level in (1, 2, 3, 5)}
    assert set(by_level[1].values()) == {'separable'}
    assert by_level[2] == {
        name: 'separable' if min(layer.in_channels, layer.out_channels) >= channels else 'dense'
        for name, layer in harmonic_layers(network).items()
    }
    assert set(by_level[3].values()) == set(by_level[5].values()) == {'dense'}
    depthwise = harmonize(timm.create_model('convnext_atto'), level=1)
    wide = {name for name, layer in harmonic_layers(depthwise).items() if layer.groups > 1}
    assert {forms_by_rule(depthwise, runtime)[name] for name in wide} == {'dense'}


@pytest.mark.parametrize('form', ['dense', 'separable'])
def test_multiply_adds_are_those_of_the_plain_modules(form):
    for level in (1, 2, 3):
        layer = HarmonicConv2d(8, 16, 3, 2, groups=2, level=level, padding_mode='reflect', form=form)
        plain, x = layer.fuse(), torch.randn(2, 8, 17, 15)
        assert multiply_adds(layer, level, form, uses_of(nn.Sequential(layer), x)['0']) == 2 * count_macs(plain, x)


def test_the_faster_form_is_taken(network, monkeypatch):
    """By the times that are measured, here made up: faster in every round, or only in most of them."""
    low = truncate(network, level=1)

    def times(modules, like):
        assert list(modules) == ['dense', 'separable 1']
        good = [0.5] * 9 if like.shape[1] == 64 else [0.9] * 5 + [1.2] * 4
        return {'dense': [1.0] * 9, 'separable 1': good}

    monkeypatch.setattr(timing, 'times_of', times)
    images = torch.randn(1, 3, 64, 64)
    found = forms_by_time(low, images)
    assert {name for name, form in found.items() if form == 'separable'} == {
        name for name, layer in harmonic_layers(low).items() if layer.in_channels == 64
    }
    assert low.layer1[0].conv1.milliseconds == dict(dense=1.0, separable=0.5)
    assert len(separable(deploy(low, images))) == sum(form == 'separable' for form in found.values())


def test_layers_are_timed_as_they_are_run(network, monkeypatch):
    """Their own input, in its dtype and memory format; equal layers once; complete layers not at all."""
    seen = []
    monkeypatch.setattr(timing, '_ROUNDS', 2)
    measured = timing.times_of
    monkeypatch.setattr(timing, 'times_of', lambda modules, like: seen.append(like) or measured(modules, like))
    low = truncate(network, levels={'layer1.*': 1}).train().to(memory_format=torch.channels_last)
    low.layer1.eval()
    flags = [module.training for module in low.modules()]
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    deploy(low, images)
    assert [like.shape for like in seen] == [(2, 64, 16, 16)]
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(layer.milliseconds['dense'] > 0 for layer in (low.layer1[0].conv1, low.layer1[0].conv2))
    assert low.layer2[0].conv1.milliseconds is None
    (like,) = uses_of(copy.deepcopy(low).bfloat16(), images.bfloat16())['layer1.0.conv1']
    assert like.dtype == torch.bfloat16
    assert [module.training for module in low.modules()] == flags
    assert not any(module._forward_pre_hooks for module in low.modules())


def test_errors(network):
    with pytest.raises(ValueError, match="form must be 'auto' or one of"):
        deploy(network, form='fast')
    with pytest.raises(ValueError, match='images are on meta, the network is on cpu'):
        deploy(network, torch.zeros(1, 3, 64, 64, device='meta'))
    with pytest.raises(TypeError, match='images must be an example batch'):
        deploy(network, [torch.zeros(1, 3, 64, 64)])
    with pytest.raises(TypeError, match=r'change network\.module'):
        deploy(nn.DataParallel(network))
    with pytest.raises(TypeError, match='expected a network'):
        deploy('resnet18')
    hooked = copy.deepcopy(network)
    hooked.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r'cannot deploy layer1\.0\.conv1: has hooks'):
        deploy(hooked)


def test_one_layer_under_two_names():
    """timm's function sees a module of one parent once. Multiply-adds are those of both uses."""
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = harmonize(nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.ReLU(), conv).eval())
    x = torch.randn(1, 3, 16, 16)
    plain = deploy(model)
    assert not harmonic_layers(plain)
    assert plain[1] is plain[3]
    torch.testing.assert_close(plain(x), model(x))
    assert costs_of(model, 'macs', x).present == count_macs(plain, x)


@pytest.mark.parametrize('name', ['repvgg_a0', 'resnet10t'])
def test_costs_are_those_of_the_fused_network(name, monkeypatch):
    """What a block fuses by itself is there once, at whatever level its layers are."""
    model, x = harmonize(timm.create_model(name).eval()), torch.randn(1, 3, 32, 32)
    found = costs_of(model, 'macs', x)
    assert found.present == count_macs(deploy(model, form='dense'), x)
    assert (found.least < found.present) == (name == 'resnet10t')
    if name == 'repvgg_a0':
        monkeypatch.setattr(timing, '_ROUND', 1e-4)
        report = harmonic_report(truncate(model, ratio=1.0, cost='time', images=x), x)
        assert {conv.ms for conv in report.convolutions} == {None}  # nothing there was timed


def test_what_is_made_in_inference_mode_can_be_trained():
    small = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    with torch.no_grad():
        seen = []
        batches = (seen.append(torch.is_grad_enabled()) or torch.randn(16, 3, 32, 32) for _ in range(2))
        truncate(harmonize(timm.create_model('resnet18', **small)), level=2, data=batches, refit=True)
        assert seen == [False, False]
    with torch.inference_mode():
        made = harmonize(timm.create_model('resnet18', **small))
        for options in (dict(level=2), dict(level=2, data=[torch.randn(16, 3, 32, 32)], refit=True)):
            with pytest.raises(ValueError, match='made in inference mode'):
                truncate(timm.create_model('harm_resnet18', **small), inplace=True, **options)
            truncate(made, inplace=True, **options)
        low = truncate(harmonize(timm.create_model('resnet18', **small).eval()), level=2)
        plain = deploy(low)
    for model in (low, plain):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert model.layer1[0].bn1.weight.grad is not None


def test_a_layer_alone():
    layer = HarmonicConv2d(64, 64, 3, padding=1, level=1)
    plain = deploy(layer)
    x = torch.randn(1, 64, 8, 8)
    torch.testing.assert_close(plain(x), layer(x))
    assert separable(nn.Sequential(plain)) == ['0']


@pytest.mark.parametrize('form', ['separable', {'layer1.*.conv1': 'dense', 'layer1*': 'separable'}])
def test_forms_are_noted_with_the_network(form, tmp_path):
    """harmonize and harmonized take them, and a folder keeps them."""
    base = reference.small('resnet18', reference.RESNET)
    model = harmonize(base, level=1, form=form)
    expected = {name: layer.form for name, layer in harmonic_layers(model).items()}
    chosen = expected if form == 'separable' else ['layer1.0.conv2']
    assert expected == {name: 'separable' if name in chosen else 'dense' for name in expected}
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert {name: layer.form for name, layer in harmonic_layers(again).items()} == expected
    assert get_model_args(again).get('form') == get_model_args(model).get('form')
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert len(separable(reparameterize_model(again))) == len(chosen)
    # Harmonizing and truncating again keep them, and other forms replace them.
    for network in (harmonize(again, level=1), truncate(again, level=1)):
        assert {name: layer.form for name, layer in harmonic_layers(network).items()} == expected
    assert {layer.form for layer in harmonic_layers(harmonize(again, form='dense')).values()} == {'dense'}


def test_a_part_of_a_network_takes_the_forms_of_the_whole():
    options = dict(base_model='resnet18', level=1, form={'layer1.*': 'separable', 'layer4.*': 'separable'})
    model = timm.create_model('harmonized', features_only=True, out_indices=(0, 1), **options)
    assert {layer.form for layer in harmonic_layers(model).values()} == {'dense', 'separable'}


@pytest.mark.parametrize(
    ('form', 'error', 'match'),
    [
        ('sparse', ValueError, "must be one of .* got 'sparse'"),
        ({'layer1.*': 'sparse'}, ValueError, "must be one of .* got 'sparse'"),
        ({'layer9.*': 'dense'}, ValueError, "'layer9.*' matches none"),
        (3, TypeError, 'or map patterns of names to them, got 3'),
        ('', ValueError, 'form must'),
        ({1: 'dense'}, TypeError, 'form must'),
    ],
)
def test_wrong_forms(form, error, match):
    with pytest.raises(error, match=match):
        harmonize(timm.create_model('resnet18'), form=form)
    with pytest.raises(error, match=match):
        timm.create_model('harmonized', base_model='resnet18', form=form)
