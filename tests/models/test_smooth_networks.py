"""Smoothness in whole networks: in conversions, files and folders, and as part of what coefficients are."""

import json

import pytest
import reference
import timm
import torch
import yaml
from timm.models import reparameterize_model

import timm_harmonic_cli as cli
from timm_harmonic import harmonic_report, harmonize, truncate
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.export.folder import convert
from timm_harmonic.models.checkpoints import CheckpointError

TINY = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=5)
VGG = dict(mlp_ratio=0.02, num_classes=5)
NETWORKS = {
    'resnet': ('harm_resnet18', dict(TINY, stem_pool='avg')),
    'seresnext': ('harm_seresnext50_32x4d', dict(layers=(1, 1, 1, 1), num_classes=5)),
    'vgg': ('harm_vgg11_bn', VGG),
    'wrn': ('harm_wrn16_8', dict(width=1, depth=10, num_classes=5)),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def build(name='harm_resnet18', seed=0, **kwargs):
    torch.manual_seed(seed)
    options = TINY if name == 'harm_resnet18' else {}
    return reference.randomize_batch_norm(timm.create_model(name, **{**options, **kwargs})).eval()


def smoothness_of(model):
    return {layer.smoothness for layer in harmonic_layers(model).values()}


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('smoothness', [0, 0.5, 2])
def test_every_layer_has_it_and_fuses(name, smoothness):
    architecture, kwargs = NETWORKS[name]
    model = build(architecture, smoothness=smoothness, **kwargs)
    assert smoothness_of(model) == {smoothness}
    plain = timm.create_model(architecture, harmonic_stem=False, harmonic_blocks=False, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    with torch.inference_mode():
        expected = model(IMAGES)
        low = truncate(model, level=2)
        fused = reparameterize_model(model)
        assert reference.relative_error(fused(IMAGES), expected) < 1e-4
        lower = truncate(build(architecture, smoothness=smoothness, **kwargs), levels={'*': 2})
        assert reference.relative_error(reparameterize_model(low)(IMAGES), lower(IMAGES)) < 1e-4


@pytest.mark.parametrize('smoothness', [0, 1, 3])
def test_any_network_keeps_its_outputs(smoothness):
    plain = build('resnet18', num_classes=5)
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
    part = harmonize(build('resnet18'), include='layer1.*', smoothness=1)
    with pytest.raises(ValueError, match=r"the basis 'smoothness=2\.0' differs .* use 'smoothness=1\.0'"):
        harmonize(part, smoothness=2)
    assert smoothness_of(harmonize(part, smoothness=1)) == {1.0}


def test_report_says_the_basis():
    report = harmonic_report(build(smoothness=1))
    assert {conv.basis for conv in report.convolutions} == {'smoothness=1.0', None}
    assert 'smoothness=1.0' in str(report)
    assert json.loads(json.dumps(report.to_dict()))['convolutions'][0]['basis'] == 'smoothness=1.0'
    assert {conv.basis for conv in harmonic_report(build()).convolutions} == {'l1', None}


@pytest.mark.parametrize(
    ('ours', 'theirs'), [({}, dict(smoothness=1)), (dict(smoothness=1), {}), ({}, dict(normalization='ortho'))], ids=str
)
@pytest.mark.parametrize('name', NETWORKS)
def test_coefficients_of_another_basis_are_refused(name, ours, theirs, tmp_path):
    architecture, kwargs = NETWORKS[name]
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict=build(architecture, **kwargs, **theirs).state_dict(), epoch=1), path)
    for load in (
        dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=5)),
        dict(checkpoint_path=str(path)),  # as validate.py --checkpoint does
    ):
        with pytest.raises(RuntimeError, match='refer to the basis'):
            timm.create_model(architecture, **kwargs, **ours, **load)
    loaded = timm.create_model(architecture, checkpoint_path=str(path), **kwargs, **theirs).eval()
    torch.testing.assert_close(loaded(IMAGES), build(architecture, **kwargs, **theirs)(IMAGES))


@pytest.mark.parametrize('options', [dict(smoothness=0.5), dict(normalization='ortho'), dict(smoothness=0)], ids=str)
def test_convert_reads_the_basis_off_the_checkpoint(options, tmp_path):
    model = build(**options)
    path = tmp_path / 'model.pth'
    torch.save(model.state_dict(), path)
    kwargs = {key: TINY[key] for key in ('layers', 'channels')}
    convert(path, 'harm_resnet18', tmp_path / 'folder', model_kwargs=kwargs)
    folder = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    torch.testing.assert_close(folder(IMAGES), model(IMAGES))
    card = (tmp_path / 'folder' / 'README.md').read_text()
    assert next(f'{key}={float(value)}' if key == 'smoothness' else value for key, value in options.items()) in card


def test_a_run_with_smoothness_becomes_a_folder(tmp_path):
    """The options of a run are in args.yaml beside the checkpoint, as timm's train.py writes it."""
    kwargs = dict(layers=[1, 1, 1, 1], channels=[8, 16, 32, 64], smoothness=1)
    model = build(**kwargs)
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


def test_compress_with_smoothness(tmp_path):
    plain = build('resnet18', num_classes=5)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    options = ['--checkpoint', str(tmp_path / 'plain.pth'), '--level', '3', '--img-size', '64']
    assert cli.main(['compress', 'resnet18', '--out', str(tmp_path / 'small'), *options, '--smoothness', '1']) == 0
    small = timm.create_model(f'local-dir:{tmp_path / "small"}', pretrained=True).eval()
    assert smoothness_of(small) == {1.0}
    expected = truncate(harmonize(plain), level=3)
    torch.testing.assert_close(small(IMAGES), expected(IMAGES), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['resnet', 'vgg', 'wrn'])
def test_gray_images_are_answered_as_in_all_channels(name, tmp_path):
    """timm sums the weights of the channels. What their means differ by goes into the next shift."""
    architecture, kwargs = NETWORKS[name]
    model = build(architecture, smoothness=1, **kwargs)
    path = tmp_path / 'model.pth'
    torch.save(model.state_dict(), path)
    overlay = dict(file=str(path), num_classes=5)
    gray = timm.create_model(architecture, True, pretrained_cfg_overlay=overlay, in_chans=1, smoothness=1, **kwargs)
    images = IMAGES[:, :1]
    torch.testing.assert_close(gray.eval()(images), model(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_harmonized_remembers_it(tmp_path):
    model = truncate(build('harmonized', base_model='resnet18', smoothness=2, num_classes=5), level=3)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    kwargs = dict(base_model='resnet18', level=3)
    convert(tmp_path / 'model.pth', 'harmonized', tmp_path / 'folder', model_kwargs=kwargs)
    folder = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert smoothness_of(folder) == {2.0}
    torch.testing.assert_close(folder(IMAGES), model(IMAGES))
    base = build('harmonized', base_model='harm_resnet18', smoothness=2, num_classes=5)
    assert smoothness_of(base) == {2.0}


def test_a_training_step_reaches_every_parameter():
    for name, kwargs in NETWORKS.values():
        model = build(name, smoothness=1, **kwargs).train()
        model(IMAGES).square().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
