"""Wide residual networks: what the authors' papers say of them, their own options and their checkpoints."""

import math

import pytest
import reference
import timm
import torch
from torch import nn

from timm_harmonic import HarmonicWRN
from timm_harmonic.export.folder import convert
from timm_harmonic.models.checkpoints import CheckpointError


def wrn(name='harm_wrn16_8', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'millions'),
    [
        ('harm1_wrn28_10', {}, 36.5),
        ('harm_wrn28_10', dict(levels=2), 12.3),
        ('harm0_wrn28_10', dict(width=8), 23.4),
    ],
)
def test_parameters_are_those_of_the_authors_table(name, kwargs, millions):
    count = sum(p.numel() for p in timm.create_model(name, device='meta', **kwargs).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize('stem_stride', [1, 2])
@pytest.mark.parametrize('features_only', [False, True])
def test_reductions_are_true(stem_stride, features_only):
    model = wrn(width=1, stem_stride=stem_stride, features_only=features_only).eval()
    info = model.feature_info if not features_only else model.feature_info.get_dicts()
    images = torch.randn(1, 3, 64, 96)
    found = model(images) if features_only else model.forward_intermediates(images, intermediates_only=True)
    assert [of['reduction'] for of in info] == [stem_stride * r for r in (1, 1, 2, 4)]
    for of, features in zip(info, found, strict=True):
        assert features.shape == (1, of['num_chs'], 64 // of['reduction'], 96 // of['reduction'])


@pytest.mark.parametrize('output_stride', [1, 4])
def test_output_stride_dilates(output_stride):
    model = wrn(width=1, output_stride=output_stride).eval()
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-1] == 32 // output_stride
    assert model.feature_info[-1]['reduction'] == output_stride
    dilation = model.stages[2].blocks[1].conv1.dilation
    assert dilation == (4 // output_stride,) * 2


def test_dropout_is_between_the_convolutions_of_a_block():
    model = wrn(width=1, conv_drop_rate=1.0).train()
    block = model.stages[1].blocks[1]
    assert torch.equal(block(x := torch.randn(2, 32, 8, 8)), x)  # nothing reaches the second convolution
    model.eval()
    assert not torch.equal(block(x), x)
    assert not any(isinstance(m, nn.Dropout) for m in wrn(width=1).stages.modules())


@pytest.mark.parametrize('kwargs', [{}, dict(smoothness=1)])
def test_starts_as_the_authors_network(kwargs):
    """Kaiming normal over fan-in, batch-norm weights uniform in [0, 1]."""
    model = wrn(**kwargs)
    conv = model.stages[2].blocks[1].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert model.stem.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.15)
    weights = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine])
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert weights.mean().item() == pytest.approx(0.5, abs=0.03)
    assert model.head.fc.bias.abs().max() == 0


def test_zero_init_last():
    model = wrn(width=1, zero_init_last=True)
    block = model.stages[0].blocks[1]
    assert torch.equal(block(x := torch.randn(2, 16, 8, 8)), x)


def authors_file(path, width, channels=3, plain_stem=False):
    """A checkpoint in the authors' layout, and the network that it is of."""
    model = reference.randomize_batch_norm(wrn(depth=10, width=width, in_chans=channels, harmonic_stem=not plain_stem))
    params = {}
    for key, value in model.state_dict().items():
        key = key.replace('stages.', 'group').replace('.blocks.', '.block')
        key = key.replace('.norm1.', '.bn0.').replace('.norm2.', '.bn1.').replace('.downsample.conv.weight', '.convdim')
        key = key.replace('.conv1.weight', '.harmonic0.conv').replace('.conv2.weight', '.harmonic1.conv')
        key = key.replace('stem.conv.weight', 'conv0' if plain_stem else 'harmonic0.conv')
        key = key.replace('stem.conv.bn', 'harmonic0.bn').replace('head.fc', 'fc')
        key = 'bn.' + key.removeprefix('norm.') if key.startswith('norm.') else key
        if key == 'fc.weight':
            value = value.flatten(1)
        elif key.startswith('group') and key.endswith('.conv'):
            value = value[..., None]
        elif key == 'harmonic0.conv':
            value = value.reshape(16, -1, 1, 1)
        if not key.endswith('num_batches_tracked'):
            params[key] = value
    torch.save(dict(params=params, epoch=3, optimizer={}), path)
    return model.eval()


@pytest.mark.parametrize(('width', 'plain_stem'), [(1, True), (2, False)])
def test_the_authors_files_load_and_convert(width, plain_stem, tmp_path):
    path = tmp_path / 'model.pt7'
    source = authors_file(path, width, plain_stem=plain_stem)
    kwargs = dict(depth=10, width=width, harmonic_stem=not plain_stem)
    loaded = timm.create_model('harm_wrn16_8', True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), source(images))
    convert(path, 'harm_wrn16_8', tmp_path / 'folder', model_kwargs=kwargs)
    folder = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert isinstance(folder, HarmonicWRN)
    torch.testing.assert_close(folder(images), source(images))


@pytest.mark.parametrize('width', [1, 2])
def test_gray_images_are_answered_as_in_all_three_channels(width, tmp_path):
    """Also where the stem's output is passed on by the first blocks, which have no convolution on their shortcut."""
    path = tmp_path / 'model.pt7'
    source = authors_file(path, width)
    overlay = dict(file=str(path))
    options = dict(depth=10, width=width, in_chans=1)
    gray = timm.create_model('harm_wrn16_8', True, pretrained_cfg_overlay=overlay, **options).eval()
    images = torch.randn(2, 1, 32, 32)
    ours, theirs = (m.stem.conv(x) for m, x in ((gray, images), (source, images.repeat(1, 3, 1, 1))))
    shift = ours - theirs
    torch.testing.assert_close(shift, shift[:1, :, :1, :1].expand_as(shift), rtol=0, atol=1e-4)
    torch.testing.assert_close(gray(images), source(images.repeat(1, 3, 1, 1)), rtol=1e-3, atol=1e-4)


def test_a_file_of_another_width_is_refused(tmp_path):
    path = tmp_path / 'model.pt7'
    authors_file(path, 1)
    with pytest.raises(CheckpointError, match='wrong shape'):
        timm.create_model('harm_wrn16_8', True, pretrained_cfg_overlay=dict(file=str(path)), depth=10, width=2)
