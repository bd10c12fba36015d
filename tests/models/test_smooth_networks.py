"""Smoothness in whole networks: in conversions, files and folders, and as part of what coefficients are."""

import json

import pytest
import reference
import timm
import torch
import yaml
from reference import FAMILIES, RESNET, small
from timm.models import reparameterize_model

import timm_harmonic_cli as cli
from timm_harmonic import harmonic_report, harmonize, truncate
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.export.folder import convert
from timm_harmonic.models.checkpoints import CheckpointError

SMOOTHNESS = dict(harm_resnet18=0.5, harm_seresnext50_32x4d=2, harm_vgg11_bn=1, harm_wrn16_8=0)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def smoothness_of(model):
    return {layer.smoothness for layer in harmonic_layers(model).values()}


@pytest.mark.parametrize(('name', 'smoothness'), SMOOTHNESS.items())
def test_every_layer_has_it_fuses_and_trains(name, smoothness):
    model = small(name, smoothness=smoothness)
    assert smoothness_of(model) == {smoothness}
    plain = small(name, harmonic_stem=False, harmonic_blocks=False)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    low = truncate(model, level=2)
    with torch.inference_mode():
        assert reference.relative_error(reparameterize_model(model)(IMAGES), model(IMAGES)) < 1e-4
        assert reference.relative_error(reparameterize_model(low)(IMAGES), low(IMAGES)) < 1e-4
    model.train()(IMAGES).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize('smoothness', [0, 3])
def test_any_network_keeps_its_outputs(smoothness):
    plain = small('resnet18', RESNET)
    smooth = harmonize(plain, smoothness=smoothness)
    assert smoothness_of(smooth) == {float(smoothness)}
    with torch.inference_mode():
        assert reference.relative_error(smooth(IMAGES), plain(IMAGES)) < 1e-4
    ours, plainly = (
        [conv.energy_kept for conv in harmonic_report(truncate(model, level=2)).convolutions if conv.energy_kept]
        for model in (smooth, harmonize(plain))
    )
    assert ours == pytest.approx(plainly, rel=1e-4)  # of the filters, not of the coefficients


def test_bases_do_not_mix():
    part = harmonize(small('resnet18', RESNET), include='layer1.*', smoothness=1)
    with pytest.raises(ValueError, match=r"the basis 'smoothness=2\.0' differs .* use 'smoothness=1\.0'"):
        harmonize(part, smoothness=2)
    assert smoothness_of(harmonize(part, smoothness=1)) == {1.0}


def test_report_says_the_basis():
    report = harmonic_report(small('harm_resnet18', smoothness=1))
    assert {conv.basis for conv in report.convolutions} == {'smoothness=1.0', None}
    assert 'smoothness=1.0' in str(report)
    assert json.loads(json.dumps(report.to_dict()))['convolutions'][0]['basis'] == 'smoothness=1.0'
    assert {conv.basis for conv in harmonic_report(small('harm_resnet18')).convolutions} == {'l1', None}


@pytest.mark.parametrize(
    ('name', 'ours', 'theirs'),
    [
        ('harm_resnet18', {}, dict(smoothness=1)),
        ('harm_seresnext50_32x4d', dict(smoothness=1), {}),
        ('harm_vgg11_bn', {}, dict(normalization='ortho')),
        ('harm_wrn16_8', dict(smoothness=1), dict(smoothness=2)),
    ],
)
def test_coefficients_of_another_basis_are_refused(name, ours, theirs, tmp_path):
    kwargs, path = FAMILIES[name], tmp_path / 'model.pth'
    model = small(name, **theirs)
    torch.save(dict(state_dict=model.state_dict(), epoch=1), path)
    for load in (
        dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=5)),
        dict(checkpoint_path=str(path)),  # as validate.py --checkpoint does
    ):
        with pytest.raises(RuntimeError, match='refer to the basis'):
            timm.create_model(name, **kwargs, **ours, **load)
    loaded = timm.create_model(name, checkpoint_path=str(path), **kwargs, **theirs).eval()
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


def test_a_run_with_smoothness_becomes_a_folder(tmp_path):
    """The options of a run are in args.yaml beside the checkpoint, as timm's train.py writes it."""
    kwargs = dict(layers=[1, 1, 1, 1], channels=[8, 16, 32, 64], smoothness=1)
    model = small('harm_resnet18', {**kwargs, 'num_classes': 5})
    torch.save(dict(state_dict=model.state_dict(), epoch=2), tmp_path / 'model_best.pth.tar')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(model='harm_resnet18', model_kwargs=kwargs)))
    convert(tmp_path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'folder')
    config = json.loads((tmp_path / 'folder' / 'config.json').read_text())
    assert config['model_args']['smoothness'] == 1
    folder = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert smoothness_of(folder) == {1.0}
    torch.testing.assert_close(folder(IMAGES), model(IMAGES))
    with pytest.raises(CheckpointError, match='refer to the basis'):
        timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True, smoothness=2)


@pytest.mark.slow
def test_compress_with_smoothness(tmp_path):
    plain = small('resnet18', dict(num_classes=5))
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    options = ['--checkpoint', str(tmp_path / 'plain.pth'), '--level', '3', '--img-size', '64']
    assert cli.main(['compress', 'resnet18', '--out', str(tmp_path / 'small'), *options, '--smoothness', '1']) == 0
    cut = timm.create_model(f'local-dir:{tmp_path / "small"}', pretrained=True).eval()
    assert smoothness_of(cut) == {1.0}
    expected = truncate(harmonize(plain), level=3)
    torch.testing.assert_close(cut(IMAGES), expected(IMAGES), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11_bn'])
def test_gray_images_are_answered_as_in_all_channels(name, tmp_path):
    """timm sums the weights of the channels. What their means differ by goes into the next shift."""
    model, path = small(name, smoothness=1), tmp_path / 'model.pth'
    torch.save(model.state_dict(), path)
    overlay = dict(file=str(path), num_classes=5)
    gray = timm.create_model(
        name, True, pretrained_cfg_overlay=overlay, in_chans=1, smoothness=1, **FAMILIES[name]
    ).eval()
    images = IMAGES[:, :1]
    torch.testing.assert_close(gray(images), model(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_harmonized_remembers_it(tmp_path):
    model = truncate(small('harmonized', smoothness=2), level=3)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    kwargs = {key: value for key, value in FAMILIES['harmonized'].items() if key != 'num_classes'}
    convert(tmp_path / 'model.pth', 'harmonized', tmp_path / 'folder', model_kwargs=dict(kwargs, level=3))
    folder = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert smoothness_of(folder) == {2.0}
    torch.testing.assert_close(folder(IMAGES), model(IMAGES))
    assert smoothness_of(small('harmonized', base_model='harm_resnet18', smoothness=2)) == {2.0}
