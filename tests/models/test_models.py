"""Harmonic ResNets and VGGs as timm models: names, options, features, fusing, export, bad input."""

import copy
import subprocess
import sys

import pytest
import reference
import segmentation_models_pytorch as smp
import timm
import torch
from timm.layers import BlurPool2d
from timm.models import reparameterize_model
from timm.models.resnet import ResNet
from timm.models.vgg import VGG
from timm.utils import ModelEmaV3
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, HarmonicResNet, HarmonicVGG, HarmonicWRN

TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
TINY_VGG = dict(mlp_ratio=0.02)
RESNETS = [
    *(f'harm_resnet{depth}' for depth in (18, 34, 50, 101, 152)),
    *('harm_resnet50_avgpool', 'harm_resnet50_progressive', 'harm1_resnet50', 'harm0_resnet50'),
    *('harm_resnext50_32x4d', 'harm_resnext101_32x4d', 'harm_resnext101_32x8d', 'harm_resnext101_64x4d'),
    *('harm_seresnext50_32x4d', 'harm_seresnext101_32x4d', 'harm_seresnext101_64x4d', 'harm0_seresnext101_32x4d'),
]
VGGS = [*(f'harm_vgg{depth}{bn}' for depth in (11, 13, 16, 19) for bn in ('', '_bn')), 'harm1_vgg16_bn']
WRNS = [
    *('harm_wrn16_8', 'harm_wrn16_8_progressive', 'harm_wrn28_10'),
    *('harm1_wrn28_10', 'harm0_wrn16_8', 'harm0_wrn28_10'),
]
STRIDE_4 = {
    *(f'harm_resnet{depth}' for depth in (18, 34, 50, 101, 152)),
    *('harm1_resnet50', 'harm0_resnet50', 'harm_seresnext101_64x4d'),
}


def tiny(name, **kwargs):
    """The architecture with few and narrow layers."""
    return timm.create_model(name, **dict(TINY_VGG if 'vgg' in name else TINY, **kwargs))


def harmonic(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (HarmonicConv2d, HarmonicBlock2d))}


def test_every_promised_model_is_registered():
    assert set(timm.list_models('harm*')) == {*RESNETS, *VGGS, *WRNS, 'harmonized'}
    for name in RESNETS:
        assert issubclass(HarmonicResNet, ResNet)
        assert type(timm.create_model(name, device='meta')) is HarmonicResNet
    for name in VGGS:
        assert issubclass(HarmonicVGG, VGG)
        assert type(timm.create_model(name, device='meta')) is HarmonicVGG
    for name in WRNS:
        assert type(timm.create_model(name, device='meta')) is HarmonicWRN


def test_import_is_silent():
    """No warning, no output, in a fresh interpreter with warnings as errors."""
    code = 'import timm_harmonic, timm; assert timm.is_model("harm_resnet50"); print(timm_harmonic.__version__)'
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.strip().count('.') == 2


@pytest.mark.parametrize('name', [*RESNETS, *VGGS])
def test_what_is_harmonic(name):
    """harm_: every k x k convolution with k > 1; harm1_: the stem; harm0_: none. The classifier is never."""
    model = timm.create_model(name, device='meta')
    stem = 'features.0' if 'vgg' in name else 'conv1'
    layers = harmonic(model)
    plain = {
        n for n, m in model.named_modules() if type(m) is nn.Conv2d and m.kernel_size[0] > 1 and 'pre_logits' not in n
    }
    assert not any(n.startswith(('pre_logits', 'head', 'fc')) for n in layers)
    if name.startswith('harm0_'):
        assert not layers
        return
    assert type(layers.pop(stem)) is HarmonicBlock2d
    if name.startswith('harm1_'):
        assert not layers
        assert plain
        return
    assert layers
    assert not plain
    assert all(type(m) is HarmonicConv2d for m in layers.values())


@pytest.mark.parametrize('name', RESNETS)
def test_stem_and_reductions(name):
    """The stated reductions are the true ones, also for a side that the strides do not divide."""
    model = timm.create_model(name, features_only=True, device='meta')
    expected = [4, 8, 16, 32] if name in STRIDE_4 else [2, 4, 8, 16, 32]
    assert model.feature_info.reduction() == expected
    assert model.conv1.stride == ((4, 4) if name in STRIDE_4 else (2, 2))
    for height, width in ((64, 96), (75, 101)):
        for r, c, feature in zip(
            expected,
            model.feature_info.channels(),
            model(torch.empty(1, 3, height, width, device='meta')),
            strict=True,
        ):
            assert feature.shape == (1, c, -(-height // r), -(-width // r))


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50_avgpool'])
def test_feature_indices(name):
    """The same taps by features_only, forward_intermediates and pruning, counted from either end."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(tiny(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        taps = model.forward_intermediates(x, intermediates_only=True)
        count = len(taps)
        assert count == len(model.feature_info)
        for indices in ([0], [count - 1], [-1], [-count], [0, 2], 2, count):
            wanted = taps[-indices:] if isinstance(indices, int) else [taps[i] for i in indices]
            torch.testing.assert_close(
                model.forward_intermediates(x, indices=indices, intermediates_only=True), wanted, rtol=0, atol=0
            )
            pruned = copy.deepcopy(model)
            taken = pruned.prune_intermediate_layers(indices)
            wanted_taps = range(count - indices, count) if isinstance(indices, int) else [i % count for i in indices]
            assert [i % count for i in taken] == list(wanted_taps)
            found = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for bad in ([count], [-count - 1], 0, count + 1):
        with pytest.raises(ValueError, match='feature indices must be from'):
            model.forward_intermediates(x, indices=bad)


@pytest.mark.parametrize('name', RESNETS)
def test_encoder_of_segmentation_models(name):
    """`tu-<name>`: timm's features as an encoder, with the strides that a decoder expects."""
    model = smp.Unet(f'tu-{name}', encoder_weights=None, in_channels=4, classes=2, **TINY).eval()
    x = torch.randn(1, 4, 64, 96)
    with torch.inference_mode():
        features = model.encoder(x)
        assert model(x).shape == (1, 2, 64, 96)
    for feature, channels, r in zip(features, model.encoder.out_channels, (1, 2, 4, 8, 16, 32), strict=True):
        assert feature.shape == (1, channels, 64 // r, 96 // r)


@pytest.mark.parametrize('name', [*RESNETS, *VGGS])
def test_fuse_whole_network(name):
    """The full architecture in float64 with random statistics: the same outputs, and nothing harmonic is left.

    But for VGG's two linear layers, which are narrow here.
    """
    torch.manual_seed(0)
    kwargs = TINY_VGG if name in VGGS else {}
    model = timm.create_model(name, dtype=torch.float64, num_classes=10, **kwargs)
    model = reference.randomize_batch_norm(model).eval()
    x = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        fused = reparameterize_model(model, inplace=True)
        assert not harmonic(fused)
        assert not any('basis' in n for n, _ in fused.named_buffers())
        assert reference.relative_error(fused(x), expected) < 1e-12
        assert not harmonic(reparameterize_model(fused, inplace=True))


@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50_avgpool', 'harm_seresnext50_32x4d', 'harm_vgg11_bn'])
def test_fuse_feature_extractor(name, feature_cls):
    """Inside timm's wrappers, and in training mode: fusing does not need evaluation."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(tiny(name, features_only=True, feature_cls=feature_cls)).train()
    fused = reparameterize_model(model)
    assert fused.training
    assert all(m.training for m in fused.modules())
    assert harmonic(model)
    assert not harmonic(fused)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        for ours, theirs in zip(fused.eval()(x), model.eval()(x), strict=True):
            assert reference.relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ('name', 'plain', 'kwargs'),
    [
        ('harm_resnet18', 'resnet18', dict(stem_pool='max')),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max')),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', output_stride=8)),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', output_stride=16)),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', stem_type='deep', stem_width=16)),
        ('harm_resnet50_avgpool', 'resnet50', dict(stem_pool='max', replace_stem_pool=True, down_kernel_size=3)),
        ('harm_resnet18', 'resnet18', dict(stem_pool='max', aa_layer=BlurPool2d)),
        ('harm_resnext50_32x4d', 'resnext50_32x4d', {}),
        ('harm_seresnext50_32x4d', 'seresnext50_32x4d', dict(avg_down=True)),
        ('harm_vgg11', 'vgg11', {}),
        ('harm_vgg16_bn', 'vgg16_bn', {}),
    ],
)
def test_fused_network_is_timms(name, plain, kwargs):
    """After fusing, keys and arithmetic are those of timm's network: strides, dilation and groups were kept."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(tiny(name, **kwargs)).eval()
    theirs_kwargs = {k: v for k, v in kwargs.items() if k != 'stem_pool'}
    twin = tiny(plain, **theirs_kwargs).eval()
    fused = reparameterize_model(model)
    state = fused.state_dict()
    bias = [k for k in state if k not in twin.state_dict()]
    assert set(state) - set(bias) == set(twin.state_dict())
    stem = 'conv1.0' if kwargs.get('stem_type') else 'conv1'
    assert bias == ([] if 'vgg' in name else [f'{stem}.bias'])
    if bias:  # timm's stem has none, the shift of the normalisation needs one
        twin.get_submodule(stem).register_parameter('bias', nn.Parameter(torch.empty(len(state[bias[0]]))))
    twin.load_state_dict(state)
    x = torch.randn(2, 3, 64, 80)
    with torch.inference_mode():
        assert torch.equal(fused(x), twin(x))
        assert reference.relative_error(model(x), twin(x)) < 1e-4


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(in_chans=1),
        dict(in_chans=13, num_classes=0),
        dict(global_pool='catavgmax', num_classes=5),
        dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1),
        dict(output_stride=8, levels=(None, 3, 2, 1)),
        dict(levels=2, normalization='ortho'),
        dict(levels=2, smoothness=1),
        dict(aa_layer=BlurPool2d),
        dict(aa_layer=BlurPool2d, stem_pool='avg'),
        dict(stem_pool='max', harmonic_stem=False),
        dict(harmonic_blocks=False),
        dict(block_args=dict(attn_layer='se')),
        dict(block_args=dict(attn_layer='eca'), avg_down=True),
        dict(act_layer='silu', zero_init_last=True),
        dict(norm_layer='layernorm2d'),
        dict(stem_type='deep', stem_width=16, stem_pool='avg'),
        dict(stem_type='deep_tiered', stem_width=16, block_reduce_first=2, down_kernel_size=3),
        dict(stem_pool='max', replace_stem_pool=True, aa_layer=BlurPool2d),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50'])
def test_resnet_options_train(name, kwargs):
    """With every option of timm's ResNet a training step reaches all parameters, and features and fusing work."""
    if name == 'harm_resnet18' and 'block_reduce_first' in kwargs:
        kwargs = {k: v for k, v in kwargs.items() if k != 'block_reduce_first'}
    model = tiny(name, **kwargs).train()
    channels = kwargs.get('in_chans', 3)
    x = torch.randn(2, channels, 64, 64)
    model(x).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    fused = reparameterize_model(model.eval())
    assert not harmonic(fused)
    with torch.inference_mode():
        assert reference.relative_error(fused(x), model(x)) < 1e-4
    for r, feature in zip(
        (info['reduction'] for info in model.feature_info),
        model.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert feature.shape[-1] == 64 // r


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(in_chans=4, num_classes=7),
        dict(levels=3),
        dict(levels=[None, 4, 3, 2, 1], drop_rate=0.5),
        dict(harmonic_stem=False),
        dict(harmonic_blocks=False, normalization='ortho'),
        dict(levels=3, smoothness=2),
        dict(global_pool='max', act_layer=nn.SiLU),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', ['harm_vgg11', 'harm_vgg11_bn'])
def test_vgg_options_train(name, kwargs):
    model = tiny(name, **kwargs).train()
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64)
    model(x).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert not harmonic(reparameterize_model(model))


def test_levels():
    model = tiny('harm_resnet50', levels=[None, 4, 3, 2])
    counts = {n: len(m.basis) for n, m in harmonic(model).items()}
    assert counts == {
        'conv1': 49, 'layer1.0.conv2': 9, 'layer2.0.conv2': 8, 'layer3.0.conv2': 6, 'layer4.0.conv2': 3
    }  # fmt: skip
    assert {len(m.basis) for n, m in harmonic(tiny('harm_resnet50', levels=2)).items() if n != 'conv1'} == {3}
    vgg = timm.create_model('harm_vgg11', levels=[1, 2, 3, 4, 5], device='meta')
    assert [len(m.basis) for m in harmonic(vgg).values()] == [1, 3, 6, 6, 8, 8, 9, 9]
    assert {len(m.basis) for m in harmonic(timm.create_model('harm_vgg11', levels=1, device='meta')).values()} == {1}


@pytest.mark.parametrize('name', RESNETS)
def test_initialisation(name):
    """As the authors': coefficients by Kaiming fan-out, and zero residual branches in SE-ResNeXts only."""
    torch.manual_seed(0)
    model = timm.create_model(name, layers=(1, 1, 1, 1))
    for layer in harmonic(model).values():
        fan_out = layer.out_channels * (1 if isinstance(layer, HarmonicBlock2d) else layer.basis.shape[0])
        assert abs(layer.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.05
    last = [m.bn3 if hasattr(m, 'bn3') else m.bn2 for m in model.modules() if hasattr(m, 'drop_block')]
    assert len(last) == 4
    for norm in last:
        assert bool(norm.weight.any()) is ('seresnext' not in name)
    before = {n: p.std() for n, p in model.named_parameters() if p.ndim == 4}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.init_weights()
    for n, p in model.named_parameters():
        if p.ndim == 4 and not n.endswith('bias'):
            torch.testing.assert_close(p.std(), before[n], rtol=0.2, atol=0)


def test_vgg_classifier_starts_as_the_authors_linear_layers():
    model = timm.create_model('harm_vgg11', num_classes=10)
    for layer in (model.pre_logits.fc1, model.pre_logits.fc2, model.head.fc):
        assert abs(layer.weight.std().item() / 0.01 - 1) < 0.05
        assert not layer.bias.any()


@pytest.mark.parametrize('name', ['harm_resnet50', 'harm_resnet50_avgpool', 'harm_vgg11_bn'])
def test_nothing_more_is_kept_for_the_backward_pass(name):
    """Compared with the plain network, the composed filters and a few numbers more, which do not grow with the batch.

    That includes the stem, which keeps no response.
    """

    def saved_bytes(model, batch):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        constants = {b.untyped_storage().data_ptr() for b in model.buffers()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(batch, 3, 64, 64))  # keeps the graph and its storages alive
        total = sum(size for pointer, size in kept.items() if pointer not in parameters | constants)
        del output
        return total

    torch.manual_seed(0)
    plain = tiny(name, harmonic_stem=False, harmonic_blocks=False).train()
    ours = tiny(name).train()
    filters = sum(4 * m.filters().numel() for m in harmonic(ours).values())
    more = [saved_bytes(ours, batch) - saved_bytes(plain, batch) for batch in (2, 8)]
    assert more[0] == more[1]
    assert filters <= more[0] < filters + 500_000  # the stem's, in float64, and bases


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50_avgpool', 'harm_seresnext50_32x4d', 'harm_vgg11_bn'])
def test_export(name):
    """torch.export with a free batch size, fused and unfused."""
    model = reference.randomize_batch_norm(tiny(name)).eval()
    x = torch.randn(2, 3, 64, 96)
    for network in (model, reparameterize_model(model)):
        exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
        for batch in (1, 5):
            other = torch.randn(batch, 3, 64, 96)
            with torch.inference_mode():
                assert reference.relative_error(exported(other), network(other)) < 1e-4


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11_bn'])
def test_average_of_weights(name):
    """ModelEmaV3 changes weights in place while it evaluates, and outputs follow."""
    model = tiny(name, num_classes=5)
    ema = ModelEmaV3(model, decay=0.5)
    x = torch.randn(2, 3, 64, 64)
    ema.module.eval()(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    ema.update(model)
    expected = tiny(name, num_classes=5).eval()
    expected.load_state_dict(ema.module.state_dict())
    with torch.inference_mode():
        assert torch.equal(ema.module(x), expected(x))


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11_bn'])
def test_precision_round_trip(name):
    model = tiny(name).eval()
    with torch.no_grad():  # weights that bfloat16 holds exactly, so that only the basis could be damaged
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16).float())
    model.apply(lambda m: m.init_non_persistent_buffers() if hasattr(m, 'init_non_persistent_buffers') else None)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert torch.equal(model.float()(x), expected)


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11'])
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
        (dict(levles=3), TypeError, 'levles'),
    ],
    ids=str,
)
def test_bad_options(name, kwargs, error, words):
    with pytest.raises(error, match=words):
        timm.create_model(name, **kwargs)


def test_bad_resnet_options():
    with pytest.raises(TypeError, match=r"levels=.*: a level must be None or an integer .*, got '3'"):
        timm.create_model('harm_resnet18', levels=[None, None, '3', 2])
    with pytest.raises(ValueError, match=r"stem_pool must be one of .* got 'min'"):
        timm.create_model('harm_resnet18', stem_pool='min')
    with pytest.raises(ValueError, match='replace_stem_pool replaces max pooling'):
        timm.create_model('harm_resnet18', replace_stem_pool=True)
