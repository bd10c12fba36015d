"""The architecture `harmonized`: it behaves as its base, takes weights from anywhere, is saved and loaded by timm."""

import json

import pytest
import reference
import safetensors.torch
import timm
import torch
from timm.models import load_checkpoint, reparameterize_model, resolve_model_input_args, save_for_hf
from torch import nn

from timm_harmonic import harmonize, truncate
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.layers.dct import full_level
from timm_harmonic.models.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures('one_thread')

BASE = 'mobilenetv3_small_050'
HUB_ID = f'timm/{BASE}.lamb_in1k'
# Every way in which timm takes features out of a network.
FEATURES = ['resnet18', BASE]
FEATURES += [pytest.param(name, marks=pytest.mark.slow) for name in ('convnext_atto', 'xception41', 'hrnet_w18_small')]


SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    if 'resnet18' in (name, kwargs.get('base_model')):
        kwargs = SMALL | kwargs
    return reference.randomize_batch_norm(timm.create_model(name, **kwargs)).eval()


def loaded(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def near(found, expected):
    """Outputs that differ by rounding."""
    x = images()
    with torch.inference_mode():
        for ours, theirs in zip(each(found(x)), each(expected(x)), strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def images(channels=3, side=64):
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def same(first, second, channels=3):
    x = images(channels)
    with torch.inference_mode():
        return all(torch.equal(a, b) for a, b in zip(each(first(x)), each(second(x)), strict=True))


def each(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else outputs


@pytest.fixture
def base_on_hub(hub):
    """The base's weights where timm looks for them."""
    base = build(BASE)
    hub.add(HUB_ID, {'model.safetensors': safetensors.torch.save(base.state_dict()), 'config.json': b'{}'})
    return base


@pytest.fixture
def saved(tmp_path):
    """A compressed network, and the folder that timm saved it in."""
    model = truncate(harmonize(build('regnety_002', num_classes=7)), ratio=0.95)
    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    return model, tmp_path / 'folder'


def test_bare_name_is_a_resnet50():
    model = timm.create_model('harmonized', device='meta')
    assert len(harmonic_layers(model)) == 17
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == 'harmonized'
    assert 'description' not in cfg


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0', 'inception_v3'])
def test_config_is_the_bases(name):
    with torch.device('meta'):
        base = timm.create_model(name)
        # As train.py does, which reads the registered config first.
        model = timm.create_model(**resolve_model_input_args('harmonized', base_model=name))
    for key, value in base.pretrained_cfg.items():
        assert model.pretrained_cfg[key] == ('harmonized' if key == 'architecture' else value), key
    assert timm.data.resolve_data_config(model=model) == timm.data.resolve_data_config(model=base)


def test_behaves_as_the_base():
    kwargs = dict(num_classes=5, in_chans=4, drop_rate=0.1, drop_path_rate=0.1)
    base, model = build('regnety_002', **kwargs), build('harmonized', base_model='regnety_002', level=2, **kwargs)
    assert type(model) is type(base)
    assert model(images(4)).shape == (2, 5)
    assert model.group_matcher(coarse=True) == base.group_matcher(coarse=True)
    groups = [timm.models.group_parameters(m, m.group_matcher()) for m in (base, model)]
    assert groups[0] == groups[1]
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(3)
    assert model(images(4)).shape == (2, 3)
    model.set_grad_checkpointing()
    model.train()(images(4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.forward_features(images(4)).shape == base.forward_features(images(4)).shape
    assert len(model.forward_intermediates(images(4), intermediates_only=True)) == 5


@pytest.mark.parametrize('name', FEATURES)
def test_features_are_the_bases(name):
    """At full level with the base's weights the maps are equal; a level reaches every layer that is left."""
    base, kwargs = build(name), dict(base_model=name, features_only=True)
    overlay = dict(state_dict=base.state_dict(), input_size=(3, 64, 64))
    options = SMALL if name == 'resnet18' else {}
    model = timm.create_model('harmonized', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs, **options)
    info = timm.create_model(name, features_only=True, **options).feature_info
    assert model.feature_info.channels() == info.channels()
    assert model.feature_info.reduction() == info.reduction()
    near(model.eval(), lambda x: base.forward_intermediates(x, intermediates_only=True))
    some = timm.create_model('harmonized', level=2, out_indices=(0, 2), **kwargs)
    assert some.feature_info.reduction() == [info.reduction()[i] for i in (0, 2)]
    assert {layer.level for layer in harmonic_layers(some).values()} == {2}


@pytest.mark.parametrize('kind', ['dict', 'hook', 'getter'])
def test_features_of_every_kind(kind):
    base = build('resnet18', features_only=True, feature_cls=kind)
    model = build('harmonized', base_model='resnet18', features_only=True, feature_cls=kind)
    assert type(model) is type(base)
    assert len(model(images())) == len(base(images()))


def test_features_of_a_saved_network(tmp_path):
    save_for_hf(truncate(harmonize(build(BASE)), level=2), tmp_path, safe_serialization=True)
    whole = reparameterize_model(loaded(tmp_path))
    near(loaded(tmp_path, features_only=True), lambda x: whole.forward_intermediates(x, intermediates_only=True))


def test_options_per_layer_are_json(saved):
    """Only where levels are not full, None."""
    model, folder = saved
    config = json.loads((folder / 'config.json').read_text())
    assert (config['architecture'], config['model_args']['base_model']) == ('harmonized', 'regnety_002')
    levels = config['model_args']['levels']
    for name, layer in harmonic_layers(model).items():
        assert levels[name] == (None if layer.level == full_level(layer.kernel_size[0]) else layer.level)
    assert len(set(levels.values())) > 1


def test_saved_by_timm_and_loaded(saved, hub):
    model, folder = saved
    again = loaded(folder)
    assert same(again, model)
    assert str(again) == str(model)
    hub.add('org/small', {path.name: path.read_bytes() for path in folder.iterdir()})
    assert same(timm.create_model('hf-hub:org/small', pretrained=True).eval(), model)
    # Once more, from what was loaded.
    save_for_hf(again, folder.parent / 'second', safe_serialization=True)
    first, second = (json.loads((path / 'config.json').read_text()) for path in (folder, folder.parent / 'second'))
    assert first == second


def test_saved_and_adapted(saved):
    model, folder = saved
    assert loaded(folder, num_classes=3)(images()).shape == (2, 3)
    assert loaded(folder, in_chans=4)(images(4)).shape == (2, 7)
    gray, x = loaded(folder, in_chans=1), images(1)
    torch.testing.assert_close(gray(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    headless = loaded(folder, num_classes=0)
    assert same(headless, lambda x: model.forward_head(model.forward_features(x), pre_logits=True))
    assert set(model.state_dict()) - set(headless.state_dict()) == {'head.fc.weight', 'head.fc.bias'}


def test_saved_after_fusing(saved, tmp_path):
    """A fused network loads as the harmonic one that it was: its filters have no energy above the levels."""
    save_for_hf(reparameterize_model(saved[0]), tmp_path / 'fused', safe_serialization=True)
    near(loaded(tmp_path / 'fused'), saved[0])


def test_our_own_network_with_levels_of_every_layer(tmp_path):
    model = build('harm_resnet18', stem_pool='avg', normalization='ortho', num_classes=3, **SMALL)
    model = truncate(model, ratio=0.6)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert same(loaded(tmp_path), model)
    assert loaded(tmp_path, in_chans=1)(images(1)).shape == (2, 3)


def test_pretrained_takes_the_bases_weights(base_on_hub):
    model = timm.create_model('harmonized', base_model=BASE, pretrained=True, level=3).eval()
    assert same(model, harmonize(base_on_hub, level=3))
    tagged = timm.create_model('harmonized', base_model=f'{BASE}.lamb_in1k', pretrained=True, level=3).eval()
    assert same(tagged, model)
    assert model.pretrained_cfg['tag'] == 'lamb_in1k'
    other = timm.create_model('harmonized', base_model=BASE, pretrained=True, num_classes=4, in_chans=1).eval()
    expected = harmonize(timm.create_model(BASE, pretrained=True, num_classes=4, in_chans=1).eval())
    expected.classifier.load_state_dict(other.classifier.state_dict())
    assert same(other, expected, channels=1)
    features = timm.create_model('harmonized', base_model=BASE, pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        expected = harmonize(base_on_hub).forward_intermediates(images(), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features(images()), expected, strict=True))


def test_weights_that_are_not_there(hub):
    with pytest.raises(Exception, match=r'timm/mobilenetv3_small_050\.lamb_in1k|Repository Not Found'):
        timm.create_model('harmonized', base_model=BASE, pretrained=True)
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('harmonized', base_model=f'{BASE}.nonsense')


@pytest.mark.parametrize('way', ['overlay', 'checkpoint_path', 'load_checkpoint'])
def test_checkpoint_of_the_plain_base(way, tmp_path):
    """Its filters are projected."""
    base = build('resnet18', num_classes=5)
    path = tmp_path / 'plain.pth.tar'
    torch.save(dict(state_dict={f'module.{k}': v for k, v in base.state_dict().items()}, epoch=3), path)
    options = dict(
        overlay=dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=5)),
        checkpoint_path=dict(checkpoint_path=path),
    ).get(way, {})
    model = timm.create_model('harmonized', base_model='resnet18', num_classes=5, level=3, **SMALL, **options)
    if way == 'load_checkpoint':
        load_checkpoint(model, str(path))
    assert model.pretrained_cfg['mean'] == base.pretrained_cfg['mean']
    assert same(model.eval(), harmonize(base, level=3))


def test_checkpoint_of_other_channels_and_classes(tmp_path):
    base = build('resnet18', num_classes=5)
    path = tmp_path / 'plain.pth'
    torch.save(base.state_dict(), path)
    overlay = dict(file=str(path), num_classes=-1)  # as train.py --pretrained-path
    options = dict(base_model='resnet18', num_classes=2, in_chans=1, **SMALL)
    model = timm.create_model('harmonized', pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    expected = harmonize(base)
    expected.conv1.weight = nn.Parameter(expected.conv1.weight.sum(1, keepdim=True))
    torch.testing.assert_close(model.conv1.weight, expected.conv1.weight)
    assert torch.equal(model.layer4[0].conv2.weight, expected.layer4[0].conv2.weight)
    assert model(images(1)).shape == (2, 2)


def test_checkpoints_that_do_not_fit(tmp_path):
    base = build('resnet18', num_classes=5)

    def load(state, **kwargs):
        overlay = dict(state_dict=state, num_classes=5)
        kwargs = dict(base_model='resnet18', num_classes=5, **SMALL) | kwargs
        return timm.create_model('harmonized', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    low = truncate(harmonize(base), level=2).state_dict()
    assert torch.equal(load(low, level=2).conv1.weight, low['conv1.weight'])
    with pytest.raises(
        CheckpointError, match=r'conv1\.weight \(64, 3, 3, 1\) for \(64, 3, 6, 1\).*build the network with'
    ):
        load(low, level=3)
    with pytest.raises(CheckpointError, match=r'missing: layer1\.0\.conv1\.weight'):
        load({key: value for key, value in low.items() if key != 'layer1.0.conv1.weight'}, level=2)
    with pytest.raises(CheckpointError, match='unexpected'):
        load(build('resnet18', num_classes=5, layers=(2, 1, 1, 1)).state_dict())
    with pytest.raises(CheckpointError, match='wrong shape'):
        load(base.state_dict(), base_model='resnet50')
    # A plain network refuses coefficients: the error of timm and torch names the layers and both shapes.
    overlay = dict(state_dict=low, num_classes=5)
    with pytest.raises(RuntimeError, match=r'layer1\.0\.conv1\.weight.*\[8, 64, 3, 1\].*\[8, 64, 3, 3\]'):
        timm.create_model('resnet18', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **SMALL)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'words'),
    [
        (dict(base_model='harmonized'), ValueError, "cannot be 'harmonized' itself"),
        (dict(base_model='resnet51'), ValueError, "no model base_model='resnet51', see timm"),
        (dict(base_model='qqqq'), ValueError, 'see timm.list_models'),
        (dict(base_model=50), TypeError, 'must be the name'),
        (dict(base_model='vit_tiny_patch16_224'), ValueError, 'patch embedding'),
        (dict(base_model='resnet18', levels={'blocks*': 2}), ValueError, 'matches none'),
        (dict(base_model='resnet18', nonsense=1), TypeError, 'nonsense'),
    ],
)
def test_bad_options(kwargs, error, words):
    with pytest.raises(error, match=words):
        timm.create_model('harmonized', **kwargs)


def test_selection_and_normalization_are_kept(tmp_path):
    model = build('harmonized', base_model='resnet18', include=['layer4.*'], level=2, normalization='ortho')
    assert set(harmonic_layers(model)) == {'layer4.0.conv1', 'layer4.0.conv2'}
    assert model.layer4[0].conv1.normalization == 'ortho'
    for name, network in dict(a=model, b=truncate(model, level=1)).items():
        save_for_hf(network, tmp_path / name, safe_serialization=True)
        assert same(loaded(tmp_path / name), network)
        assert str(loaded(tmp_path / name)) == str(network)


@pytest.mark.parametrize(
    ('base', 'options'),
    [
        ('harm_resnet18', dict(level=2)),
        ('harm1_resnet50', dict(level=3)),
        ('harm_vgg11_bn', dict(level=2)),
        ('harm_resnet18', dict(level=2, smoothness=1.0)),
        pytest.param('coat_lite_tiny', {}, marks=pytest.mark.slow),  # uses a convolution twice
    ],
)
def test_files_of_a_harmonic_base(base, options, tmp_path):
    """They give what harmonize makes of the base with those weights."""
    small = dict(mlp_ratio=0.02) if 'vgg' in base else SMALL if 'resnet' in base else dict(img_size=64)
    basis = {key: value for key, value in options.items() if key == 'smoothness'}
    whole = build(base, num_classes=5, **small, **basis)
    torch.save(whole.state_dict(), tmp_path / 'base.pth')
    overlay = dict(file=str(tmp_path / 'base.pth'), num_classes=5)
    kwargs = dict(base_model=base, num_classes=5, **small, **options)
    model = timm.create_model('harmonized', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    near(model, harmonize(whole, **options))


@pytest.mark.parametrize('smoothness', [None, 1])
def test_gray_images_for_a_lower_level_of_a_complete_file(tmp_path, smoothness):
    """What is left out leaves no shift behind."""
    options = dict(depth=10, width=1, smoothness=smoothness)
    model = reference.randomize_batch_norm(timm.create_model('harm_wrn16_8', **options))
    torch.save(model.state_dict(), tmp_path / 'complete.pth')
    overlay = dict(file=str(tmp_path / 'complete.pth'), num_classes=10)
    options |= dict(base_model='harm_wrn16_8', level=2, num_classes=10, pretrained_cfg_overlay=overlay)
    colour, gray = (
        timm.create_model('harmonized', pretrained=True, in_chans=channels, **options).eval() for channels in (3, 1)
    )
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(gray(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    own = timm.create_model('harm_wrn16_8', in_chans=1, depth=10, width=1, smoothness=smoothness)
    torch.save(own.state_dict(), tmp_path / 'complete.pth')
    assert timm.create_model('harmonized', pretrained=True, in_chans=1, **options)(x).shape == (2, 10)
