"""timm-harmonic compress: the folder, the report, the picture, and what it refuses."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import reference
import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import timm_harmonic_cli as cli
from timm_harmonic import harmonize, truncate
from timm_harmonic.common import InputError
from timm_harmonic.conversion import report
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.export.folder import convert
from timm_harmonic.models.checkpoints import CheckpointError
from timm_harmonic_cli.compress import compress

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
]

NAME = 'resnet18'
KWARGS = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
FILES = ['README.md', 'compression.json', 'compression.md', 'compression.png', 'config.json', 'model.safetensors']


DRAW = report.draw_truncation


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Most tests need no picture, which takes longer than the rest."""
    monkeypatch.setattr(report, 'draw_truncation', lambda path, whole, small: path.write_text(''))


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return reference.randomize_batch_norm(timm.create_model(NAME, **{**KWARGS, 'num_classes': 3, **kwargs})).eval()


@pytest.fixture
def checkpoint(tmp_path):
    model = build()
    path = tmp_path / 'plain.pth'
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """An image folder of three classes and two splits."""
    folder = tmp_path_factory.mktemp('pictures')
    generator = torch.Generator().manual_seed(0)
    for split in ('train', 'validation'):
        for label in 'abc':
            (folder / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f'{i}.png')
    return folder


def same(first, second, channels=3):
    x = torch.randn(2, channels, 64, 64)
    with torch.inference_mode():
        return torch.equal(first.eval()(x), second.eval()(x))


def test_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'draw_truncation', DRAW)
    record = compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, ratio=0.5)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == FILES
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    expected = truncate(harmonize(build()), ratio=0.5)
    assert same(model, expected)
    assert json.loads((tmp_path / 'out' / 'compression.json').read_text()) == json.loads(json.dumps(record))
    assert record['options'] == dict(ratio=0.5)
    assert record['report']['parameters'] == sum(p.numel() for p in model.parameters())
    assert {c['name']: c['level'] for c in record['report']['convolutions'] if c['level']} == {
        name: layer.level for name, layer in harmonic_layers(model).items()
    }
    markdown = (tmp_path / 'out' / 'compression.md').read_text()
    assert 'Weights: plain.pth. ratio=0.5' in markdown
    assert re.search(r'^\| layer2\.0\.downsample\.0 +\| +1 x 1 \|', markdown, re.MULTILINE)
    with Image.open(tmp_path / 'out' / 'compression.png') as picture:
        picture.verify()
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.license is None  # timm's licence is that of timm's weights
    assert "`harmonized` (`base_model='resnet18'`)" in card.text
    assert '**Compressed:**' in card.text
    assert '`levels` of 9 layers, in config.json' in card.text
    assert 'plain.pth' in card.text


@pytest.mark.parametrize('amount', [dict(level=2), dict(energy=0.9)])
def test_amounts(checkpoint, tmp_path, amount):
    compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, **amount)
    expected = truncate(harmonize(build()), **amount)
    assert same(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), expected)


def test_selection_and_normalization(checkpoint, tmp_path):
    options = dict(include=['layer*'], exclude=['layer1.*'], normalization='ortho')
    compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, level=2, **options)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert set(harmonic_layers(model)) == {f'layer{i}.0.conv{j}' for i in (2, 3, 4) for j in (1, 2)}
    assert same(model, truncate(harmonize(build(), **options), level=2))


def test_data_and_evaluation(checkpoint, pictures, tmp_path):
    options = dict(img_size=32, checkpoint=checkpoint, model_kwargs=KWARGS, batch_size=4)
    compress(NAME, tmp_path / 'a', ratio=0.5, data=pictures, batches=2, evaluate=pictures, **options)
    compress(NAME, tmp_path / 'b', ratio=0.5, data=pictures, batches=2, evaluate=pictures, **options)
    first, second = ((tmp_path / name / 'compression.json').read_text() for name in 'ab')
    assert first == second  # the same images were drawn
    record = json.loads(first)
    assert record['weighed_by'] == 'outputs on 2 batches of 4 images'
    assert set(record['accuracy']['before']) == {'top1'}  # three classes have no top five
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]

    # The accuracies are those of the network.
    model = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    right = 0
    for index, label in enumerate('abc'):
        for path in (pictures / 'validation' / label).iterdir():
            with Image.open(path) as image, torch.inference_mode():
                right += int(model(transform(image.convert('RGB')).unsqueeze(0)).argmax()) == index
    assert record['accuracy']['after']['top1'] == pytest.approx(100 * right / 12)
    assert '| top1 |' in (tmp_path / 'a' / 'compression.md').read_text()


@pytest.mark.slow
def test_refit_by_multiply_adds_and_deploy(checkpoint, pictures, tmp_path):
    """Everything at once: the folder gives the refitted network in its forms, and the ONNX file is that network."""
    import onnxruntime

    options = dict(checkpoint=checkpoint, model_kwargs=KWARGS, img_size=64)
    found = dict(ratio=0.6, cost='macs', refit=True, deploy=True, channels_last=True, data=pictures, workers=1)
    record = compress(NAME, tmp_path / 'out', **options, **found, batches=2, batch_size=6)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted([*FILES, 'deployed.onnx'])
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    forms = {name: layer.form for name, layer in harmonic_layers(model).items()}
    convolutions = record['report']['convolutions']
    assert forms == {conv['name']: conv['form'] for conv in convolutions if conv['form']}
    assert convolutions[0]['macs_before'] == 64 * 3 * 49 * 32 * 32
    assert record['options'] == dict(ratio=0.6, cost='macs', refit=True)
    deployed = record['deployed']
    assert deployed['compressed']['macs'] <= 0.6 * deployed['plain']['macs']
    assert deployed['compressed']['bytes'] == (tmp_path / 'out' / 'deployed.onnx').stat().st_size
    assert all(value > 0 for of in deployed.values() for value in of.values())
    assert '| multiply-adds |' in (tmp_path / 'out' / 'compression.md').read_text()
    session = onnxruntime.InferenceSession(tmp_path / 'out' / 'deployed.onnx', providers=['CPUExecutionProvider'])
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {'images': x.numpy()})[0]), expected, rtol=0, atol=1e-3
    )


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused(checkpoint, tmp_path, monkeypatch):
    """Nothing is left behind."""
    monkeypatch.setattr('timm_harmonic.export.onnx._TOLERANCE', 0.0)
    with pytest.raises(InputError, match=r'deployed.onnx differs from the network by \S+ of the largest output'):
        compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, level=1, deploy=True)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_gray_images(pictures, tmp_path):
    path = tmp_path / 'gray.pth'
    torch.save(build(in_chans=1).state_dict(), path)
    options = dict(checkpoint=path, model_kwargs=KWARGS, img_size=32)
    compress(NAME, tmp_path / 'out', energy=0.9, data=pictures, evaluate=pictures, **options)
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert cfg['input_size'] == [1, 32, 32]
    assert cfg['mean'] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.slow
def test_a_run_of_timm_then_again_and_on_the_hub(tmp_path, hub):
    """compress, train the network of the folder, convert, load by hf-hub, and compress once more."""
    run = tmp_path / 'run'
    run.mkdir()
    torch.save(dict(state_dict=build().state_dict(), epoch=4), run / 'last.pth.tar')
    listed = {key: list(value) for key, value in KWARGS.items()}
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model=NAME, model_kwargs=listed, img_size=48, mean=[0.1] * 3)))
    compress(NAME, tmp_path / 'small', checkpoint=run / 'last.pth.tar', ratio=0.6, repo='org/small')
    cfg = json.loads((tmp_path / 'small' / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean']) == ([3, 48, 48], [0.1] * 3)

    model = timm.create_model(f'local-dir:{tmp_path / "small"}', pretrained=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    tuned = tmp_path / 'tuned'
    tuned.mkdir()
    torch.save(dict(state_dict=model.state_dict(), epoch=9), tuned / 'last.pth.tar')
    (tuned / 'args.yaml').write_text(yaml.safe_dump(dict(model=f'local-dir:{tmp_path / "small"}', img_size=48)))
    convert(
        tuned / 'last.pth.tar',
        f'local-dir:{tmp_path / "small"}',
        tmp_path / 'final',
        license='mit',
        repo_id='org/final',
    )
    assert same(timm.create_model(f'local-dir:{tmp_path / "final"}', pretrained=True), model)

    hub.add('org/final', {path.name: path.read_bytes() for path in (tmp_path / 'final').iterdir()})
    assert same(timm.create_model('hf-hub:org/final', pretrained=True), model)

    compress('hf-hub:org/final', tmp_path / 'smaller', level=2)
    assert same(timm.create_model(f'local-dir:{tmp_path / "smaller"}', pretrained=True), truncate(model, level=2))


@pytest.mark.slow
def test_forms_and_refitted_weights_on_the_hub(checkpoint, pictures, tmp_path, hub):
    """They come back to the last bit, with the forms."""
    options = dict(checkpoint=checkpoint, model_kwargs=KWARGS, img_size=64, data=pictures)
    options.update(ratio=0.5, cost='macs', refit=True, batches=2, batch_size=6, repo='org/fast')
    compress(NAME, tmp_path / 'fast', **options)
    hub.add('org/fast', {path.name: path.read_bytes() for path in (tmp_path / 'fast').iterdir()})
    here, there = (
        timm.create_model(name, pretrained=True) for name in (f'local-dir:{tmp_path / "fast"}', 'hf-hub:org/fast')
    )
    forms = {name: layer.form for name, layer in harmonic_layers(here).items()}
    assert set(forms.values()) == {'dense', 'separable'}
    assert {name: layer.form for name, layer in harmonic_layers(there).items()} == forms
    weights = there.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in here.state_dict().items())
    assert same(here, there)


@pytest.mark.slow
def test_a_checkpoint_for_a_folder(tmp_path, checkpoint):
    compress(NAME, tmp_path / 'small', checkpoint=checkpoint, model_kwargs=KWARGS, level=3)
    other = truncate(harmonize(build(seed=1)), level=3)
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    compress(f'local-dir:{tmp_path / "small"}', tmp_path / 'smaller', checkpoint=tmp_path / 'other.pth', level=2)
    assert same(timm.create_model(f'local-dir:{tmp_path / "smaller"}', pretrained=True), truncate(other, level=2))


@pytest.mark.slow
def test_weights_of_timm(hub, tmp_path):
    base = timm.create_model('mobilenetv3_small_050').eval()
    weights = {'model.safetensors': safetensors.torch.save(base.state_dict()), 'config.json': b'{}'}
    hub.add('timm/mobilenetv3_small_050.lamb_in1k', weights)
    compress('mobilenetv3_small_050', tmp_path / 'out', pretrained=True, energy=0.8)
    assert same(
        timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), truncate(harmonize(base), energy=0.8)
    )
    assert "mobilenetv3_small_050.lamb_in1k (timm's weights)" in (tmp_path / 'out' / 'README.md').read_text()


def test_our_own_network_of_the_authors_layout(tmp_path):
    kwargs = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(timm.create_model('harm_resnet18', num_classes=3, **kwargs)).eval()
    state = {f'module.{key.replace("conv1.", "harm1.")}': value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / 'theirs.pth')
    compress('harm_resnet18', tmp_path / 'out', checkpoint=tmp_path / 'theirs.pth', model_kwargs=kwargs, level=3)
    assert same(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), truncate(model, level=3))


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(level=0), ValueError, 'from 1 to 13'),
        (dict(ratio=1.5), ValueError, 'at most 1'),
        (dict(level=2, include=['nothing*']), ValueError, "'nothing\\*' matches none"),
        (dict(level=2, model_kwargs={}), CheckpointError, 'nothing was loaded'),
        (dict(level=2, model='vit_tiny_patch16_224', checkpoint=None), ValueError, 'patch embedding'),
        (dict(level=2, model='nonsense', checkpoint=None), InputError, 'Unknown model'),
        (dict(ratio=0.5, data='nowhere'), InputError, 'not an image folder'),
        (dict(ratio=0.5, refit=True), InputError, '--refit needs --data'),
        (dict(level=2, cost='time'), InputError, '--cost needs --ratio'),
        (dict(level=2, device='nowhere'), ValueError, "device 'nowhere' cannot be used here"),
        (dict(level=2, mean=[1, 2]), ValueError, 'mean has 2 values, the network takes 3 channels'),
        (
            dict(level=2, model='maxvit_rmlp_pico_rw_256', checkpoint=None, img_size=72),
            InputError,
            r'the network cannot run on images of 72 x 72 pixels \(see --img-size\)',
        ),
        (dict(ratio=0.5, evaluate='nowhere'), InputError, 'not an image folder'),
    ],
)
def test_refused_without_a_trace(checkpoint, tmp_path, monkeypatch, options, error, words):
    monkeypatch.chdir(tmp_path)
    arguments = dict(model=NAME, checkpoint=checkpoint, model_kwargs=KWARGS) | options
    for key in ('data', 'evaluate'):
        if key in arguments:
            arguments[key] = Path(arguments[key])
    if arguments['checkpoint'] is None:
        arguments['model_kwargs'] = {}
    with pytest.raises(error, match=words):
        compress(arguments.pop('model'), tmp_path / 'out', **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['plain.pth']


@pytest.mark.slow
@pytest.mark.parametrize('cost', ['parameters', 'macs'])
def test_the_card_tells_what_the_forms_cost(cost, tmp_path):
    compress('resnet18', tmp_path / 'out', ratio=0.5, cost=cost, img_size=64)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert ('Multiply-adds are the same.' in card) == (cost == 'parameters')
    assert ('every harmonic layer becomes a plain convolution' in card) == (cost == 'parameters')
    assert ('of the layers take fewer multiply-adds' in card) == (cost == 'macs')


def test_features_are_no_whole_network(tmp_path):
    with pytest.raises(InputError, match='compress writes complete networks'):
        compress('resnet18', tmp_path / 'out', level=2, model_kwargs=dict(features_only=True))


def test_more_classes_than_the_network_has(pictures, tmp_path):
    path = tmp_path / 'two.pth'
    torch.save(build(num_classes=2).state_dict(), path)
    with pytest.raises(InputError, match='3 classes, the network 2'):
        compress(NAME, tmp_path / 'out', checkpoint=path, model_kwargs=KWARGS, level=2, evaluate=pictures)


def test_harmonic_checkpoint_for_a_plain_network(tmp_path):
    torch.save(harmonize(build(), level=2).state_dict(), tmp_path / 'harmonic.pth')
    options = dict(checkpoint=tmp_path / 'harmonic.pth', model_kwargs=KWARGS, level=1)
    with pytest.raises(CheckpointError, match=r'holds coefficients of a harmonic network.*conv1\.weight.*local-dir'):
        compress(NAME, tmp_path / 'out', **options)


def test_random_weights_are_said_to_be_random(tmp_path):
    with pytest.warns(UserWarning, match='resnet18 has random weights: pass --pretrained or --checkpoint FILE'):
        compress(NAME, tmp_path / 'out', model_kwargs=KWARGS, level=2)
    assert 'Source:** resnet18 with random weights' in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize('channels', [1, 13])
def test_other_channels(channels, tmp_path):
    """The folder takes images of as many as the network."""
    compress(NAME, tmp_path / 'out', model_kwargs=dict(KWARGS, in_chans=channels), level=2)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert model.pretrained_cfg['input_size'] == (channels, 224, 224)
    assert model(torch.randn(1, channels, 64, 64)).shape == (1, 1000)


def test_other_classes_cannot_be_evaluated(checkpoint, pictures, tmp_path):
    with pytest.raises(InputError, match='has 3 classes, the network 7'):
        compress(NAME, tmp_path / 'out', model_kwargs=dict(KWARGS, num_classes=7), level=2, evaluate=pictures)
    assert not (tmp_path / 'out').exists()


def test_out_must_be_new(checkpoint, tmp_path):
    with pytest.raises(InputError, match='not an empty folder'):
        compress(NAME, tmp_path, checkpoint=checkpoint, model_kwargs=KWARGS, level=2)


def test_deploy_without_onnx(checkpoint, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else found(name))
    with pytest.raises(InputError, match='pip install onnxscript'):
        compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, level=2, deploy=True)
    assert not (tmp_path / 'out').exists()


def test_no_picture_without_matplotlib(checkpoint, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'matplotlib' else find(name))
    compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, level=2)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted({*FILES} - {'compression.png'})


def test_command(checkpoint, pictures, tmp_path, capsys):
    arguments = ['compress', NAME, '--checkpoint', str(checkpoint), '--ratio', '0.5', '--data', str(pictures)]
    arguments += ['--batches', '1', '--batch-size', '4', '--evaluate', str(pictures), '--img-size', '32']
    arguments += ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(8,16,32,64)', '--exclude', 'conv1']
    assert cli.main([*arguments, '--out', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    assert 'layer4.0.conv2' in printed
    assert '8 of 13 convolutions are harmonic' in printed
    assert '| accuracy, %, measured | before | after |\n|---|---|---|\n| top1 |' in printed
    assert f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)' in printed
    assert 'weigh' not in printed  # progress is on stderr
    assert cli.main([*arguments, '--out', str(tmp_path / 'out')]) == 1
    assert 'not an empty folder' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['compress', NAME, '--out', 'x'], 'one of the arguments --level --energy --ratio is required'),
        (['compress', NAME, '--level', '2', '--ratio', '0.5', '--out', 'x'], 'not allowed with'),
        (['compress', NAME, '--level', '2'], '--out'),
        (['compress', NAME, '--level', 'two', '--out', 'x'], 'must be an integer of at least 1'),
    ],
)
def test_bad_arguments(capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_a_level_takes_no_data(capsys, tmp_path):
    assert cli.main(['compress', NAME, '--level', '2', '--data', 'x', '--out', str(tmp_path / 'out')]) == 1
    assert '--data is for --refit, --energy and --ratio' in capsys.readouterr().err
