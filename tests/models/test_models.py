"""Harmonic ResNets, VGGs and wide ResNets as timm models: names, options, features, fusing, bad input."""

import copy

import pytest
import reference
import segmentation_models_pytorch as smp
import timm
import torch
from reference import FAMILIES, small
from timm.layers import BlurPool2d
from timm.models import reparameterize_model
from timm.models.resnet import ResNet
from timm.models.vgg import VGG
from timm.utils import ModelEmaV3
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, HarmonicResNet, HarmonicVGG, HarmonicWRN

pytestmark = pytest.mark.usefixtures('one_thread')

STRIDE_4 = [
    *(f'harm_resnet{depth}' for depth in (18, 34, 50, 101, 152)),
    *('harm1_resnet50', 'harm0_resnet50', 'harm_seresnext101_64x4d'),
]
RESNETS = [
    *(*STRIDE_4, 'harm_resnet50_avgpool', 'harm_resnet50_progressive', 'harm0_seresnext101_32x4d'),
    *('harm_resnext50_32x4d', 'harm_resnext101_32x4d', 'harm_resnext101_32x8d', 'harm_resnext101_64x4d'),
    *('harm_seresnext50_32x4d', 'harm_seresnext101_32x4d'),
]
VGGS = [*(f'harm_vgg{depth}{bn}' for depth in (11, 13, 16, 19) for bn in ('', '_bn')), 'harm1_vgg16_bn']
WRNS = [
    *('harm_wrn16_8', 'harm_wrn16_8_progressive', 'harm_wrn28_10'),
    *('harm1_wrn28_10', 'harm0_wrn16_8', 'harm0_wrn28_10'),
]


def images(channels=3, height=64, width=64, **kwargs):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1), **kwargs)


def harmonic(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (HarmonicConv2d, HarmonicBlock2d))}


def test_every_promised_model_is_registered():
    """harm_: every k x k convolution with k > 1 is harmonic; harm1_: the stem; harm0_: none. The classifier never."""
    assert set(timm.list_models('harm*')) == {*RESNETS, *VGGS, *WRNS, 'harmonized'}
    assert issubclass(HarmonicResNet, ResNet)
    assert issubclass(HarmonicVGG, VGG)
    for names, kind, stem in (
        (RESNETS, HarmonicResNet, 'conv1'),
        (VGGS, HarmonicVGG, 'features.0'),
        (WRNS, HarmonicWRN, 'stem.conv'),
    ):
        for name in names:
            model = timm.create_model(name, device='meta')
            assert type(model) is kind
            layers = harmonic(model)
            plain = {n: m for n, m in model.named_modules() if type(m) is nn.Conv2d and 'pre_logits' not in n}
            spatial = {n for n, m in {**layers, **plain}.items() if m.kernel_size[0] > 1}
            expected = dict(harm_=spatial, harm1={stem}, harm0=set())[name[:5]]
            assert layers.keys() == expected, name
            assert all(type(m) is (HarmonicBlock2d if n == stem else HarmonicConv2d) for n, m in layers.items())
            if kind is HarmonicResNet:
                assert model.conv1.stride == ((4, 4) if name in STRIDE_4 else (2, 2))


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50_avgpool', 'harm_seresnext50_32x4d'])
def test_reductions(name):
    """The stated reductions are the true ones, also for a side that the strides do not divide."""
    model = timm.create_model(name, features_only=True, device='meta')
    expected = [4, 8, 16, 32] if name in STRIDE_4 else [2, 4, 8, 16, 32]
    assert model.feature_info.reduction() == expected
    for height, width in ((64, 96), (75, 101)):
        features = model(torch.empty(1, 3, height, width, device='meta'))
        for r, c, feature in zip(expected, model.feature_info.channels(), features, strict=True):
            assert feature.shape == (1, c, -(-height // r), -(-width // r))


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50_avgpool'])
def test_feature_indices(name):
    """The same taps by features_only, forward_intermediates and pruning, counted from either end."""
    model, x = small(name), images()
    with torch.inference_mode():
        taps = model.forward_intermediates(x, intermediates_only=True)
        count = len(taps)
        assert count == len(model.feature_info)
        for indices in ([0], [-1], [-count], [0, 2], 2, count):
            places = range(count - indices, count) if isinstance(indices, int) else [i % count for i in indices]
            wanted = [taps[place] for place in places]
            found = model.forward_intermediates(x, indices=indices, intermediates_only=True)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            pruned = copy.deepcopy(model)
            taken = pruned.prune_intermediate_layers(indices)
            assert [i % count for i in taken] == list(places)
            found = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for bad in ([count], [-count - 1], 0, count + 1):
        with pytest.raises(ValueError, match='feature indices must be from'):
            model.forward_intermediates(x, indices=bad)


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnext50_32x4d'])
def test_encoder_of_segmentation_models(name):
    """`tu-<name>`: timm's features as an encoder, with the strides that a decoder expects."""
    kwargs = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
    model = smp.Unet(f'tu-{name}', encoder_weights=None, in_channels=4, classes=2, **kwargs).eval()
    x = images(4, 64, 96)
    with torch.inference_mode():
        features = model.encoder(x)
        assert model(x).shape == (2, 2, 64, 96)
    for feature, channels, r in zip(features, model.encoder.out_channels, (1, 2, 4, 8, 16, 32), strict=True):
        assert feature.shape == (2, channels, 64 // r, 96 // r)


@pytest.mark.parametrize('name', FAMILIES)
def test_fuse(name):
    """The same outputs, to rounding in float64, and nothing harmonic is left."""
    model, x = small(name, dtype=torch.float64), images(dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        fused = reparameterize_model(model, inplace=True)
        assert not harmonic(fused)
        assert not any('basis' in n for n, _ in fused.named_buffers())
        assert reference.relative_error(fused(x), expected) < 1e-12


@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11_bn'])
def test_fuse_feature_extractor(name, feature_cls):
    """Inside timm's wrappers, and in training mode: fusing does not need evaluation."""
    model = small(name, features_only=True, feature_cls=feature_cls).train()
    fused = reparameterize_model(model)
    assert all(m.training for m in fused.modules())
    assert harmonic(model)
    assert not harmonic(fused)
    with torch.inference_mode():
        for ours, theirs in zip(fused.eval()(images()), model.eval()(images()), strict=True):
            assert reference.relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ('name', 'plain', 'kwargs'),
    [
        ('harm_resnet18', 'resnet18', dict(stem_pool='max', aa_layer=BlurPool2d)),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max')),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', output_stride=8)),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', stem_type='deep', stem_width=16)),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', replace_stem_pool=True, down_kernel_size=3)),
        ('harm_seresnext50_32x4d', 'seresnext50_32x4d', dict(avg_down=True)),
        ('harm_vgg11_bn', 'vgg11_bn', {}),
    ],
)
def test_fused_network_is_timms(name, plain, kwargs):
    """After fusing, keys and arithmetic are those of timm's network: strides, dilation and groups were kept."""
    model = small(name, **kwargs)
    twin = small(plain, FAMILIES[name], **{k: v for k, v in kwargs.items() if k != 'stem_pool'})
    fused = reparameterize_model(model)
    state = fused.state_dict()
    bias = [k for k in state if k not in twin.state_dict()]
    assert set(state) - set(bias) == set(twin.state_dict())
    stem = 'conv1.0' if kwargs.get('stem_type') else 'conv1'
    assert bias == ([] if 'vgg' in name else [f'{stem}.bias'])
    if bias:  # timm's stem has none, the shift of the normalisation needs one
        twin.get_submodule(stem).register_parameter('bias', nn.Parameter(torch.empty(len(state[bias[0]]))))
    twin.load_state_dict(state)
    x = images(3, 64, 80)
    with torch.inference_mode():
        assert torch.equal(fused(x), twin(x))
        assert reference.relative_error(model(x), twin(x)) < 1e-4


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('harm_resnet50', dict(in_chans=1)),
        ('harm_resnet50', dict(in_chans=13, num_classes=0)),
        ('harm_resnet18', dict(global_pool='catavgmax', num_classes=5)),
        ('harm_resnet18', dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1)),
        ('harm_resnet18', dict(output_stride=8, levels=(None, 3, 2, 1))),
        ('harm_resnet50', dict(levels=2, normalization='ortho')),
        ('harm_resnet50', dict(levels=2, smoothness=1)),
        ('harm_resnet18', dict(aa_layer=BlurPool2d, stem_pool='avg')),
        ('harm_resnet18', dict(stem_pool='max', harmonic_stem=False)),
        ('harm_resnet18', dict(harmonic_blocks=False)),
        ('harm_resnet50', dict(block_args=dict(attn_layer='eca'), avg_down=True)),
        ('harm_resnet50', dict(act_layer='silu', zero_init_last=True)),
        ('harm_resnet18', dict(norm_layer='layernorm2d')),
        ('harm_resnet50', dict(stem_type='deep', stem_width=16, stem_pool='avg')),
        ('harm_resnet50', dict(stem_type='deep_tiered', stem_width=16, block_reduce_first=2, down_kernel_size=3)),
        ('harm_vgg11_bn', dict(in_chans=4, num_classes=7)),
        ('harm_vgg11_bn', dict(levels=[None, 4, 3, 2, 1], drop_rate=0.5)),
        ('harm_vgg11_bn', dict(harmonic_stem=False, levels=3, smoothness=2)),
        ('harm_vgg11', dict(harmonic_blocks=False, normalization='ortho', global_pool='max', act_layer=nn.SiLU)),
        ('harm_wrn16_8', dict(levels=(3, 2, 1), smoothness=1, conv_drop_rate=0.1, in_chans=2)),
    ],
    ids=str,
)
def test_options_train(name, kwargs):
    """With every option of timm's networks a training step reaches all parameters, and features and fusing work."""
    model = small(name, FAMILIES.get(name, FAMILIES['harm_vgg11_bn' if 'vgg' in name else 'harm_resnet18']), **kwargs)
    x = images(kwargs.get('in_chans', 3))
    model.train()(x).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    fused = reparameterize_model(model.eval())
    assert not harmonic(fused)
    with torch.inference_mode():
        assert reference.relative_error(fused(x), model(x)) < 1e-4
    features = model.forward_intermediates(x, intermediates_only=True)
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape[-1] == 64 // info['reduction']


def test_levels():
    model = small('harm_resnet50_avgpool', levels=[None, 4, 3, 2])
    assert {n: len(m.basis) for n, m in harmonic(model).items()} == {
        'conv1': 49, 'layer1.0.conv2': 9, 'layer2.0.conv2': 8, 'layer3.0.conv2': 6, 'layer4.0.conv2': 3
    }  # fmt: skip
    vgg = timm.create_model('harm_vgg11', levels=[1, 2, 3, 4, 5], device='meta')
    assert [len(m.basis) for m in harmonic(vgg).values()] == [1, 3, 6, 6, 8, 8, 9, 9]
    assert {len(m.basis) for m in harmonic(timm.create_model('harm_vgg11', levels=1, device='meta')).values()} == {1}
    wrn = timm.create_model('harm_wrn16_8_progressive', width=1)
    assert [wrn.stem.conv.level, *(group.blocks[0].conv1.level for group in wrn.stages)] == [5, 5, 3, 2]


@pytest.mark.parametrize('name', ['harm_resnet50', 'harm_seresnext50_32x4d'])
def test_initialisation(name):
    """As the authors': coefficients by Kaiming fan-out, and zero residual branches in SE-ResNeXts only."""
    torch.manual_seed(0)
    model = timm.create_model(name, layers=(1, 1, 1, 1))
    for layer in harmonic(model).values():
        fan_out = layer.out_channels * (1 if isinstance(layer, HarmonicBlock2d) else layer.basis.shape[0])
        assert abs(layer.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.05
    last = [m.bn3 for m in model.modules() if hasattr(m, 'drop_block')]
    assert len(last) == 4
    assert all(bool(norm.weight.any()) is ('seresnext' not in name) for norm in last)
    before = {n: p.std() for n, p in model.named_parameters() if p.ndim == 4}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.init_weights()
    for n, p in model.named_parameters():
        if p.ndim == 4 and not n.endswith('bias'):
            torch.testing.assert_close(p.std(), before[n], rtol=0.2, atol=0)


def test_vgg_classifier_starts_as_the_authors_linear_layers():
    model = timm.create_model('harm_vgg11', num_classes=10, mlp_ratio=0.25)
    for layer in (model.pre_logits.fc1, model.pre_logits.fc2, model.head.fc):
        assert abs(layer.weight.std().item() / 0.01 - 1) < 0.05
        assert not layer.bias.any()


@pytest.mark.parametrize('name', ['harm_resnet50_avgpool', 'harm_vgg11_bn'])
def test_nothing_more_is_kept_for_the_backward_pass(name):
    """Compared with the plain network, the composed filters and a few numbers more, which do not grow with the batch.

    That includes the stem, which keeps no response.
    """

    def saved_bytes(model, batch):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        stored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(batch, 3, 64, 64))  # keeps the graph and its storages alive
        total = sum(size for pointer, size in kept.items() if pointer not in stored)
        del output
        return total

    plain = small(name, harmonic_stem=False, harmonic_blocks=False).train()
    ours = small(name).train()
    filters = sum(4 * m.filters().numel() for m in harmonic(ours).values())
    more = [saved_bytes(ours, batch) - saved_bytes(plain, batch) for batch in (2, 8)]
    assert more[0] == more[1]
    assert filters <= more[0] < filters + 500_000  # the stem's, in float64, and bases


def test_average_of_weights():
    """ModelEmaV3 changes weights in place while it evaluates, and outputs follow."""
    model, x = small('harm_resnet18'), images()
    ema = ModelEmaV3(model, decay=0.5)
    ema.module.eval()(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    ema.update(model)
    expected = small('harm_resnet18')
    expected.load_state_dict(ema.module.state_dict())
    with torch.inference_mode():
        assert torch.equal(ema.module(x), expected(x))


@pytest.mark.parametrize('name', FAMILIES)
def test_precision_and_memory_format(name):
    """Through bfloat16 and back to the same bits, and channels_last to the same numbers."""
    model, x = small(name), images()
    with torch.no_grad():  # weights that bfloat16 holds exactly, so that only the basis could be damaged
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16).float())
    model.apply(lambda m: m.init_non_persistent_buffers() if hasattr(m, 'init_non_persistent_buffers') else None)
    with torch.inference_mode():
        expected = model(x)
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert torch.equal(model.float()(x), expected)
        found = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        assert reference.relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ('kwargs', 'error', 'words'),
    [
        (dict(levels=0), ValueError, 'level must be None or an integer from 1 to 5'),
        (dict(levels=6), ValueError, 'got 6'),
        (dict(levels=(None, 3)), ValueError, r'levels must have \d entries, one per stage, got 2'),
        (dict(levels='3'), TypeError, 'levels must be None, an integer, or'),
        (dict(levels=2.5), TypeError, 'levels must be None, an integer, or'),
        (dict(levels=True), TypeError, 'levels=True: a level must be None or an integer'),
        (dict(num_classes=-1), ValueError, 'num_classes must be 0 .* or more, got -1'),
        (dict(in_chans=0), ValueError, 'in_chans must be at least 1, got 0'),
        (dict(normalization='l2'), ValueError, 'normalization must be one of'),
        (dict(smoothness='1'), TypeError, 'smoothness must be'),
        (dict(levles=3), TypeError, 'levles'),
    ],
    ids=str,
)
def test_bad_options(kwargs, error, words):
    for name in ('harm_resnet18', 'harm_vgg11', 'harm_wrn16_8'):
        with pytest.raises(error, match=words):
            timm.create_model(name, **kwargs, device='meta')


@pytest.mark.parametrize(
    ('name', 'kwargs', 'error', 'words'),
    [
        ('harm_resnet18', dict(levels=[None, None, '3', 2]), TypeError, r"levels=.*: a level must be .*, got '3'"),
        ('harm_resnet18', dict(stem_pool='min'), ValueError, r"stem_pool must be one of .* got 'min'"),
        ('harm_resnet18', dict(replace_stem_pool=True), ValueError, 'replace_stem_pool replaces max pooling'),
        ('harm_wrn16_8', dict(depth=18), ValueError, 'depth must be 6 n'),
        ('harm_wrn16_8', dict(depth=4), ValueError, 'depth must be 6 n'),
        ('harm_wrn16_8', dict(stem_stride=4), ValueError, 'stem_stride must be 1 or 2, got 4'),
        ('harm_wrn16_8', dict(stem_stride=2, output_stride=1), ValueError, 'output_stride must be .* got 1'),
        ('harm_wrn16_8', dict(output_stride=3), ValueError, 'output_stride must be a power of 2 .* got 3'),
    ],
    ids=str,
)
def test_bad_options_of_a_family(name, kwargs, error, words):
    with pytest.raises(error, match=words):
        timm.create_model(name, **kwargs)
