"""harmonize: exact for networks of many families, fused back without a trace, with a reason for what it refuses."""

import copy
import json

import numpy as np
import pytest
import reference
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.models import get_model_args, reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, harmonic_report, harmonize, truncate
from timm_harmonic.conversion.swap import harmonic_layers, reasons_to_skip
from timm_harmonic.layers.compose import compose
from timm_harmonic.layers.conv import HarmonicConv2dSame

# One of each family, and how many of its convolutions become harmonic.
FAMILIES = {
    'resnet18': 9,
    'resnetv2_50': 17,
    'regnety_002': 14,
    'tf_efficientnet_lite0': 17,  # dynamic padding
    'convnext_atto': 16,
    'densenet121': 59,
    'hrnet_w18_small': 65,
    'repvgg_a0': 22,
    'xception41': 41,
    'inception_v3': 20,
    'vgg11_bn': 9,
    'repghostnet_050': 42,
    'fastvit_t8': 29,
}
REFUSED = {
    'inception_v3': {'not square (1 x 3)', 'not square (3 x 1)', 'not square (1 x 7)', 'not square (7 x 1)'},
}


FAST = ('resnet18', 'tf_efficientnet_lite0')
SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))

each_family = pytest.mark.parametrize(
    'name', [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
pytestmark = pytest.mark.usefixtures('one_thread')


HOOKS = ('forward', 'forward_pre', 'full_backward', 'full_backward_pre', 'state_dict_post', 'load_state_dict_post')


def network(name, seed=0, dtype=torch.float64, **kwargs):
    """A network with random weights everywhere: several of timm's start with zeros that would hide differences."""
    torch.manual_seed(seed)
    small = {'vgg11_bn': dict(mlp_ratio=1 / 64), 'resnet18': SMALL, 'harm1_resnet50': SMALL}
    model = timm.create_model(name, num_classes=10, **small.get(name, {}), **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return reference.randomize_batch_norm(model).to(dtype)


def images(model, batch=2):
    side = 96 if 'Inception' in type(model).__name__ else 64
    return torch.randn(batch, 3, side, side, dtype=next(model.parameters()).dtype)


def outputs(model, x):
    torch.manual_seed(1)  # dropout
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def close(found, expected, tolerance=1e-9):
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@each_family
def test_exact_in_evaluation_and_fused_back(name):
    plain = network(name).eval()
    before = copy.deepcopy(plain.state_dict())
    harmonic = harmonize(plain)
    assert len(harmonic_layers(harmonic)) == FAMILIES[name]
    assert set(reasons_to_skip(harmonic).values()) - {'1 x 1'} == REFUSED.get(name, set())
    x = images(plain)
    with torch.no_grad():
        expected = outputs(plain, x)
        close(outputs(harmonic, x), expected)
        fused, fused_plain = reparameterize_model(harmonic), reparameterize_model(plain)
        close(outputs(fused, x), expected)
    assert [type(module) for module in fused.modules()] == [type(module) for module in fused_plain.modules()]
    assert list(fused.state_dict()) == list(fused_plain.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


@each_family
def test_exact_in_a_training_step(name):
    plain = network(name).train()
    harmonic = harmonize(plain)
    x = images(plain, batch=3)
    expected, found = outputs(plain, x), outputs(harmonic, x)
    close(found, expected, 1e-8)
    for y in (expected, found):
        y.square().mean().backward()
    layers, convs = harmonic_layers(harmonic), dict(plain.named_modules())
    for key, parameter in harmonic.named_parameters():
        name = key.rpartition('.')[0]
        expected = plain.get_parameter(key).grad
        if expected is None:
            assert parameter.grad is None
            continue
        grad = parameter.grad
        if name in layers and key.endswith('weight'):  # the chain rule, back from coefficients to filters
            basis = layers[name].basis
            assert convs[name].weight is plain.get_parameter(key)
            grad = compose(grad / basis.square().sum((1, 2))[:, None], basis)
        scale = max(1e-6 * max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None), 1e-30)
        assert (grad - expected).abs().max() <= 1e-6 * expected.abs().max() + scale, key
    for key, value in plain.named_buffers():
        assert (harmonic.get_buffer(key) - value).abs().max() <= 1e-7 * value.abs().max(), key


def test_twice_is_once():
    plain = network('resnet18')
    for options in (dict(), dict(level=3), dict(levels={'layer4.*': 2}), dict(include='layer1.*')):
        once = harmonize(plain, **options)
        twice = harmonize(once, **options)
        assert str(once) == str(twice)
        assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
        assert get_model_args(twice) == get_model_args(once)


def test_levels_and_selections():
    plain = network('resnet18')
    harmonic = harmonize(plain, level=3, levels={'layer4.*': 2, 'layer*.conv1': None, 'conv1': 9})
    levels = {name: layer.level for name, layer in harmonic_layers(harmonic).items()}
    assert levels['conv1'] == 9
    assert levels['layer4.0.conv1'] == 2  # the first pattern counts
    assert levels['layer3.0.conv1'] == 5  # None: all frequencies
    assert levels['layer3.0.conv2'] == 3
    only = harmonize(plain, include=['layer1.*', 'layer2.*'], exclude=lambda name, conv: conv.stride == (2, 2))
    names = set(harmonic_layers(only))
    assert names == {'layer1.0.conv1', 'layer1.0.conv2', 'layer2.0.conv2'}
    mixed = harmonize(network('convnext_atto'), level=5)  # more than 2 x 2 filters have
    assert {layer.kernel_size[0]: layer.level for layer in harmonic_layers(mixed).values()} == {2: 3, 4: 5, 7: 5}


def test_layers_keep_their_place():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, dtype=torch.float64),
        nn.Conv2d(8, 8, 5, padding='same', padding_mode='reflect', groups=8, bias=False, dtype=torch.float64),
        Conv2dSame(8, 6, 3, stride=2, dtype=torch.float64),
        nn.Conv2d(6, 6, 2, dilation=2, dtype=torch.float64),
    ).eval()
    model[0].weight.requires_grad_(False)
    harmonic = harmonize(model)
    assert [type(m) for m in harmonic] == [HarmonicConv2d, HarmonicConv2d, HarmonicConv2dSame, HarmonicConv2d]
    assert not harmonic[0].weight.requires_grad
    assert harmonic[1].weight.requires_grad
    assert not any(m.training for m in harmonic.modules())
    for size in (17, 32):
        x = torch.randn(2, 4, size, size + 3, dtype=torch.float64)
        close(harmonic(x), model(x))
        close(reparameterize_model(harmonic)(x), model(x))
    assert [type(m) for m in reparameterize_model(harmonic)] == [type(m) for m in model]


class Subclass(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Two(nn.Module):
    """The second shares a parameter of the first."""

    def __init__(self, name, shares):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), shares
        setattr(self.second, name, getattr(self.first, name))


def hooked(kind):
    conv = nn.Conv2d(3, 3, 3)
    getattr(conv, f'register_{kind}_hook')(lambda *args: None)
    return conv


def spoiled(**attributes):
    """A convolution that another layer in its place would change, as libraries do that move weights on demand."""
    conv = nn.Conv2d(3, 3, 3)
    for name, value in attributes.items():
        setattr(conv, name, value)
    return conv


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated:FutureWarning')
@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (lambda: nn.Conv1d(3, 3, 3), '1-D'),
        (lambda: nn.Conv3d(3, 3, 3), '3-D'),
        (lambda: nn.ConvTranspose2d(3, 3, 3), 'transposed'),
        (lambda: nn.Conv2d(3, 3, 1), '1 x 1'),
        (lambda: nn.Conv2d(3, 3, (3, 5)), r'not square \(3 x 5\)'),
        (lambda: StdConv2d(3, 3, 3), r'standardised \(StdConv2d\)'),
        (lambda: ScaledStdConv2d(3, 3, 3), r'standardised \(ScaledStdConv2d\)'),
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), 'its weight is computed'),
        (lambda: nn.utils.weight_norm(nn.Conv2d(3, 3, 3)), 'its weight is computed'),
        (lambda: Subclass(3, 3, 3), 'Subclass may compute something other'),
        (lambda: Two('weight', nn.Conv2d(3, 3, 3)), 'shares its weight with'),
        (lambda: Two('bias', nn.Conv2d(3, 3, 3)), 'shares its bias with'),
        (lambda: Two('weight', nn.Module()), 'shares its weight with'),
        *((lambda kind=kind: hooked(kind), 'has hooks') for kind in HOOKS),
        (lambda: spoiled(forward=lambda x: x), 'its forward was replaced'),
        (lambda: spoiled(_conv_forward=lambda x, weight, bias: x), 'replaced'),
        (lambda: spoiled(scale=nn.Parameter(torch.ones(1))), 'of its own'),
        (lambda: spoiled(mask=nn.Buffer(torch.ones(1))), 'buffers'),
        (lambda: spoiled(out_channels=8), 'contradict its arguments'),
        (lambda: spoiled(weight=nn.Parameter(torch.ones(3, 3, 3, 3, dtype=torch.int8), False)), 'int8'),
        (lambda: nn.LazyConv2d(8, 3), 'has no weights yet'),
        (lambda: nn.Linear(3, 3), 'it has no convolutions'),
        (lambda: timm.create_model('vit_tiny_patch16_224'), 'patch embedding'),
    ],
)
def test_refused(make, reason):
    model = nn.Sequential(make())
    with pytest.raises(ValueError, match=f'no convolution that can become harmonic.*{reason}'):
        harmonize(model, inplace=True)
    assert not harmonic_layers(model)


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(level=14), ValueError, 'from 1 to 13.*got 14'),
        (dict(level=2.0), TypeError, 'integer'),
        (dict(levels={'layer1.*': 0}), ValueError, r"'layer1\.\*' must be None or an integer from 1 to 13 .*, got 0"),
        (dict(levels={'layer9.*': 2}), ValueError, r"levels: 'layer9\.\*' matches none of the 9 .*'layer1\.\*'"),
        (dict(levels=[3, 2, 2, 1]), TypeError, 'must map patterns'),
        (dict(include='layer9'), ValueError, "include: 'layer9' matches none"),
        (dict(exclude=['layer1.*', 'head*']), ValueError, r"exclude: 'head\*' matches none"),
        (dict(include='*.downsample.*'), ValueError, r'stay plain: layer1\.0\.downsample\.0, 1 x 1'),
        (dict(exclude='*'), ValueError, 'leave none of the 9'),
        (dict(include=lambda name, conv: False), ValueError, 'leave none of the 9'),
        (dict(normalization='l2'), ValueError, 'normalization'),
    ],
)
def test_bad_options_change_nothing(options, error, words):
    model = network('resnet18')
    with pytest.raises(error, match=words):
        harmonize(model, inplace=True, **options)
    assert not harmonic_layers(model)
    assert model.pretrained_cfg['architecture'] == 'resnet18'


def test_a_copy_shares_nothing():
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    model.again = [model[0]]
    harmonic = harmonize(model)
    assert harmonic.again[0] is not model[0]
    assert truncate(harmonic, level=2)[0] is not harmonic[0]


def test_coefficients_beyond_half_precision():
    with pytest.raises(ValueError, match=r'overflow torch\.float16: lower the smoothness'):
        harmonize(nn.Sequential(nn.Conv2d(16, 16, 7)).half(), smoothness=8.0)
    layer = HarmonicConv2d(16, 16, 7, smoothness=8.0).half()
    with pytest.raises(RuntimeError, match='overflow'):
        layer.load_state_dict(nn.Conv2d(16, 16, 7).state_dict())


def test_forms_are_for_what_is_asked_for():
    model = harmonize(harmonize(network('resnet18')), include='layer1.*', form='separable')
    forms = {name: layer.form for name, layer in harmonic_layers(model).items()}
    assert forms == {name: 'separable' if name.startswith('layer1') else 'dense' for name in forms}


def test_a_basis_is_checked_where_no_layer_is_new():
    model = timm.create_model('harm_resnet18', channels=(8, 8, 8, 8))
    with pytest.raises(TypeError, match='smoothness must be'):
        harmonize(model, smoothness='abc')
    with pytest.raises(ValueError, match='normalization must be'):
        harmonize(model, normalization='foo')
    with pytest.raises(ValueError, match=r"the basis 'smoothness=1\.0' differs"):
        harmonize(model, level=3, smoothness=1)
    with pytest.raises(TypeError, match='smoothness must be'):
        timm.create_model('harm0_resnet50', smoothness='abc', device='meta')


def test_normalizations_do_not_mix():
    part = harmonize(network('resnet18'), include='layer1.*', normalization='ortho')
    with pytest.raises(ValueError, match="use 'ortho'"):
        harmonize(part)
    whole = harmonize(part, normalization='ortho')
    # Nothing is left to convert, so the default is not compared.
    assert get_model_args(harmonize(whole)) == get_model_args(whole)


def test_our_own_networks():
    """Harmonic layers stay, and lose the frequencies from the level on."""
    model = network('harm1_resnet50').eval()
    harmonic = harmonize(model)
    assert isinstance(harmonic.conv1, HarmonicBlock2d)
    assert len(harmonic_layers(harmonic)) == 5
    x = images(model)
    with torch.no_grad():
        close(harmonic(x), model(x))
    low = harmonize(model, level=3)
    assert low.conv1.weight.shape[2] == 6
    options = dict(base_model='harm1_resnet50', num_classes=10, in_chans=3, global_pool='avg', level=3)
    assert get_model_args(low) == dict(options, **SMALL)


def test_on_the_meta_device():
    with torch.device('meta'):
        model = timm.create_model('resnet18')
    harmonic = harmonize(model, level=3)
    assert harmonic.layer1[0].conv1.weight.is_meta
    assert harmonic_report(harmonic).parameters == sum(p.numel() for p in harmonic.parameters())
    assert truncate(harmonic, level=2).layer1[0].conv1.weight.shape[2] == 3


def test_plain_weights_are_projected_when_loaded():
    plain = network('resnet18').eval()
    full, low = harmonize(network('resnet18', seed=1)), harmonize(network('resnet18', seed=1), level=2)
    state = plain.state_dict()
    keys = {key: value.clone() for key, value in state.items()}
    for harmonic in (full, low):
        harmonic.load_state_dict(state)
    assert all(torch.equal(value, keys[key]) for key, value in state.items())
    x = images(plain)
    with torch.no_grad():
        close(full.eval()(x), plain(x))
    expected = harmonize(plain, level=2)
    assert all(torch.equal(a, b) for a, b in zip(low.parameters(), expected.parameters(), strict=True))


# --- the report


def test_report():
    model = harmonize(network('resnet18'), level=3, exclude='layer4*')
    report = harmonic_report(model)
    by_name = {conv.name: conv for conv in report.convolutions}
    assert list(by_name) == [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, HarmonicConv2d))]
    first = by_name['conv1']
    assert (first.kernel_size, first.groups, first.level, first.kept, first.frequencies) == ((7, 7), 1, 3, 6, 49)
    assert (first.parameters_before, first.parameters, first.reason) == (64 * 3 * 49, 64 * 3 * 6, '')
    assert 0 < first.energy_kept < 1
    assert by_name['layer2.0.downsample.0'].reason == '1 x 1'
    assert (by_name['layer4.0.conv1'].level, by_name['layer4.0.conv1'].reason) == (None, '')
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters_before == sum(p.numel() for p in network('resnet18').parameters())
    assert json.loads(json.dumps(report.to_dict()))['model'] == 'resnet18'
    printed = str(report)
    assert 'not selected' in printed
    assert max(map(len, printed.splitlines())) <= 140
    rows = [line.split('|')[1:-1] for line in report.to_markdown().splitlines() if line.startswith('|')]
    assert [row[0].strip() for row in rows[2:]] == list(by_name)
    assert len({len(row) for row in rows}) == 1


def test_report_of_other_networks():
    report = harmonic_report(nn.Sequential(nn.Linear(2, 2)))
    assert (report.convolutions, report.model, report.parameters) == ((), 'Sequential', 6)
    assert '0 of 0' in str(report)
    lazy = harmonic_report(nn.Sequential(nn.LazyConv2d(3, 3), nn.Conv2d(3, 3, 3)))
    assert 'no weights yet' in lazy.convolutions[0].reason
    assert lazy.parameters == 84
    own, whole = (timm.create_model(f'harm_resnet50_{of}', **SMALL) for of in ('progressive', 'avgpool'))
    energies = {conv.name: conv.energy_kept for conv in harmonic_report(own).convolutions}
    assert energies['layer1.0.conv2'] == 1
    assert energies['layer4.0.conv2'] is None  # initialised at its level
    assert harmonic_report(own).parameters_before == sum(p.numel() for p in whole.parameters())


def test_energy_kept_is_the_product_of_truncations():
    at_once = harmonize(network('resnet18'), level=2)
    in_steps = truncate(truncate(harmonize(network('resnet18')), level=4), level=2)
    assert in_steps.layer1[0].conv1.energy_kept == pytest.approx(at_once.layer1[0].conv1.energy_kept)
    at_once.load_state_dict(in_steps.state_dict())
    assert at_once.conv1.energy_kept is None  # unknown for coefficients that were loaded
    for model, unknown in ((in_steps, False), (at_once, True)):
        report = harmonic_report(model)
        for text in (str(report), report.to_markdown()):
            assert ('unknown (?) for coefficients loaded' in text) == unknown


@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # torch's own
@pytest.mark.parametrize(
    ('wrap', 'error', 'words'),
    [
        (nn.DataParallel, TypeError, r'DataParallel holds the network: change network\.module'),
        (torch.compile, TypeError, 'OptimizedModule holds the network: change the network before you compile it'),
        (lambda network: torch.jit.trace(network, torch.randn(1, 3, 8, 8)), TypeError, 'scripted or traced'),
        (lambda network: 'resnet18', TypeError, "expected a network .* got 'resnet18'"),
        (lambda network: network[0], ValueError, 'from_conv2d|harmonize it first'),
    ],
)
def test_what_is_no_network_is_refused(wrap, error, words):
    """What holds one would go on with the layers of before."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for change in (lambda network: harmonize(network, inplace=True), lambda network: truncate(network, level=2)):
        with pytest.raises(error, match=words):
            change(wrap(network))
    assert not harmonic_layers(network)


def test_data_that_are_no_batches():
    model = harmonize(network('resnet18'))
    with pytest.raises(TypeError, match=r'got images \(2, 3, 64, 64\): pass \[images\]'):
        truncate(model, ratio=0.6, data=torch.randn(2, 3, 64, 64))
    for batch, words in (({'image': 1}, 'dict'), (np.zeros((2, 3, 64, 64)), 'ndarray')):
        with pytest.raises(ValueError, match=f'batch 0 of data must be images .* got {words}'):
            truncate(model, ratio=0.6, data=[batch])
