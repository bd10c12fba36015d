"""timm-harmonic compress: the folder, the report, the picture, and what it refuses."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import reference
import timm
import torch
import yaml
from commands import compress
from huggingface_hub import ModelCard
from PIL import Image

import timm_harmonic_cli as cli
from timm_harmonic import deploy, export_onnx, harmonize, truncate
from timm_harmonic.common import InputError, images
from timm_harmonic.conversion import report
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.export.folder import convert
from timm_harmonic.models.checkpoints import CheckpointError
from timm_harmonic_cli.compress import _advice

pytestmark = pytest.mark.usefixtures('one_thread')

NAME = 'resnet18'
KWARGS = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
FILES = ['README.md', 'compression.json', 'compression.md', 'compression.png', 'config.json', 'model.safetensors']
DRAW = report.draw_truncation


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Most tests need no picture, which takes longer than the rest."""
    monkeypatch.setattr(report, 'draw_truncation', lambda path, *networks: path.write_text(''))


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return reference.randomize_batch_norm(timm.create_model(NAME, **{**KWARGS, 'num_classes': 3, **kwargs})).eval()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'plain.pth'
    torch.save(build().state_dict(), path)
    return path


def loaded(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


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
    out = tmp_path / 'out'
    record = compress(NAME, out, checkpoint=checkpoint, model_kwargs=KWARGS, ratio=0.5)
    assert sorted(path.name for path in out.iterdir()) == FILES
    model = loaded(out)
    assert same(model, truncate(harmonize(build()), ratio=0.5))
    assert json.loads((out / 'compression.json').read_text()) == json.loads(json.dumps(record))
    assert record['options'] == dict(ratio=0.5)
    assert record['report']['parameters'] == sum(p.numel() for p in model.parameters())
    assert {c['name']: c['level'] for c in record['report']['convolutions'] if c['level']} == {
        name: layer.level for name, layer in harmonic_layers(model).items()
    }
    markdown = (out / 'compression.md').read_text()
    assert 'Weights: plain.pth. ratio=0.5' in markdown
    assert re.search(r'^\| layer2\.0\.downsample\.0 +\| +1 x 1 \|', markdown, re.MULTILINE)
    with Image.open(out / 'compression.png') as picture:
        picture.verify()
    card = ModelCard.load(out / 'README.md')
    assert card.data.license is None  # timm's licence is that of timm's weights
    for words in ("`harmonized` (`base_model='resnet18'`)", '**Compressed:**', '`levels` of 9 layers', 'plain.pth'):
        assert words in card.text


@pytest.mark.parametrize(
    ('amount', 'options'),
    [(dict(energy=0.9), {}), (dict(level=2), dict(include=['layer*'], exclude=['layer1.*'], normalization='ortho'))],
)
def test_amounts_and_selections(checkpoint, tmp_path, amount, options):
    compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, **amount, **options)
    assert same(loaded(tmp_path / 'out'), truncate(harmonize(build(), **options), **amount))


def test_data_and_evaluation(checkpoint, pictures, tmp_path):
    options = dict(img_size=32, checkpoint=checkpoint, model_kwargs=KWARGS, batch_size=4)
    for name in 'ab':
        compress(NAME, tmp_path / name, ratio=0.5, data=pictures, batches=2, evaluate=pictures, **options)
    first, second = ((tmp_path / name / 'compression.json').read_text() for name in 'ab')
    assert first == second  # the same images were drawn
    record, out = json.loads(first), tmp_path / 'a'
    assert record['weighed_by'] == 'outputs on 2 batches of 4 images'
    assert set(record['accuracy']['before']) == {'top1'}  # three classes have no top five
    assert json.loads((out / 'config.json').read_text())['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert 'Accuracy, measured: top1' in (out / 'compression.md').read_text()

    # The accuracies are those of the network.
    model = loaded(out)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    right = 0
    for index, label in enumerate('abc'):
        for path in (pictures / 'validation' / label).iterdir():
            with Image.open(path) as image, torch.inference_mode():
                right += int(model(transform(image.convert('RGB')).unsqueeze(0)).argmax()) == index
    assert record['accuracy']['after']['top1'] == pytest.approx(100 * right / 12)


@pytest.mark.slow
def test_refit_by_multiply_adds_and_deploy(checkpoint, pictures, tmp_path, monkeypatch, hub):
    """Everything at once: the folder gives the refitted network in its forms, and the ONNX file is that network."""
    import onnxruntime

    options = dict(checkpoint=checkpoint, model_kwargs=KWARGS, img_size=64, repo='org/fast')
    found = dict(ratio=0.6, cost='macs', refit=True, deploy=True, channels_last=True, data=pictures)
    out = tmp_path / 'out'
    monkeypatch.setattr('timm_harmonic.conversion.costs.forms_by_time', lambda *args: {})  # as truncate chose
    record = compress(NAME, out, **options, **found, batches=2, batch_size=6)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, 'deployed.onnx'])
    hub.add('org/fast', {path.name: path.read_bytes() for path in out.iterdir()})
    model, there = loaded(out), timm.create_model('hf-hub:org/fast', pretrained=True)
    forms = {name: layer.form for name, layer in harmonic_layers(model).items()}
    assert {name: layer.form for name, layer in harmonic_layers(there).items()} == forms
    assert same(model, there)
    convolutions = record['report']['convolutions']
    assert forms == {conv['name']: conv['form'] for conv in convolutions if conv['form']}
    assert convolutions[0]['macs_before'] == 64 * 3 * 49 * 32 * 32
    assert record['options'] == dict(ratio=0.6, cost='macs', refit=True)
    deployed = record['deployed']
    assert deployed['compressed']['macs'] <= 0.6 * deployed['plain']['macs']
    assert deployed['compressed']['bytes'] == (out / 'deployed.onnx').stat().st_size
    assert all(value > 0 for of in deployed.values() for value in of.values())
    assert '| multiply-adds |' in (out / 'compression.md').read_text()
    session = onnxruntime.InferenceSession(out / 'deployed.onnx', providers=['CPUExecutionProvider'])
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    found = torch.from_numpy(session.run(None, {'images': x.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_functions_for_each_channel(checkpoint, pictures, tmp_path, monkeypatch):
    """The folder has them, or levels if those came nearer; the report says which, and the picture shows it."""
    monkeypatch.setattr(report, 'draw_truncation', DRAW)
    options = dict(checkpoint=checkpoint, model_kwargs=KWARGS, img_size=32, batch_size=8, batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'levels come nearer')
        record = compress(NAME, tmp_path / 'out', ratio=0.6, per='channel', refit=True, data=pictures, **options)
    assert record['options'] == dict(ratio=0.6, per='channel', refit=True)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == FILES
    sizes = [sum(p.numel() for p in model.parameters()) for model in (build(), loaded(tmp_path / 'out'))]
    assert sizes[1] <= 0.6 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize('ratio', [0.6, 1.0])
def test_eight_bits(checkpoint, pictures, tmp_path, ratio):
    """Four files are compared, or two if nothing is cut, and one is recommended."""
    out, options = tmp_path / 'out', dict(checkpoint=checkpoint, model_kwargs=KWARGS, img_size=32, batch_size=4)
    deployed = dict(ratio=ratio, refit=True, deploy=True, int8=True, evaluate=pictures)
    record = compress(NAME, out, **options, **deployed, data=pictures, batches=2)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, 'deployed.onnx', 'deployed-int8.onnx'])
    rows = record['deployed']
    names = ['plain', 'compressed'] if ratio < 1 else ['plain']
    assert list(rows) == [row for name in names for row in (name, f'{name}, int8')]
    assert (rows['plain']['error'], rows['plain']['agreement'], rows['plain']['of_plain']) == (0, 1, 1)
    for name in names:
        assert rows[f'{name}, int8']['bytes'] < 0.4 * rows[name]['bytes']
        assert abs(rows[f'{name}, int8']['error'] - rows[name]['error']) < 0.1
        assert {'top1', 'onnx_ms'} <= rows[f'{name}, int8'].keys()
    assert rows[f'{names[-1]}, int8']['bytes'] == (out / 'deployed-int8.onnx').stat().st_size
    assert '\nTake ' in (out / 'compression.md').read_text()


@pytest.mark.parametrize(
    ('key', 'values', 'words'),
    [
        ('agreement', (1, 0.98, 0.96, 0.95), 'Take compressed, int8 (`deployed-int8.onnx`): 0.25 of the time'),
        ('agreement', (1, 0.94, 0.96, 0.9), 'Take compressed (`deployed.onnx`): 0.75 of the time'),
        ('top1', (70, 69.5, 68.5, 68), 'Take plain, int8 (`deployed-int8.onnx`, which `--ratio 1 --int8` writes): 0.5'),
        ('top1', (70, 68, 60, 60), 'Take plain (`deployed.onnx`, which'),
    ],
)
def test_which_file_to_take(key, values, words):
    rows = zip(('plain', 'plain, int8', 'compressed', 'compressed, int8'), values, (1, 0.5, 0.75, 0.25), strict=True)
    files = {name: {'onnx_ms': time, 'of_plain': time, 'bytes': 100, key: value} for name, value, time in rows}
    assert _advice(files, True).startswith(words)
    assert 'no 8-bit dot products' in _advice(files, False)


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused(checkpoint, tmp_path, monkeypatch):
    """Nothing is left behind."""
    monkeypatch.setattr('timm_harmonic.export.onnx._TOLERANCE', 0.0)
    with pytest.raises(InputError, match=r'deployed.onnx differs from the network by \S+ of the largest output'):
        compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, level=1, deploy=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('channels', [1, 13])
def test_other_channels(channels, pictures, tmp_path):
    """The folder takes images of as many as the network, prepared as timm does."""
    torch.save(build(in_chans=channels).state_dict(), tmp_path / 'other.pth')
    options = dict(checkpoint=tmp_path / 'other.pth', model_kwargs=dict(KWARGS, in_chans=channels), img_size=32)
    folders = dict(data=pictures, evaluate=pictures) if channels == 1 else {}
    compress(NAME, tmp_path / 'out', energy=0.9, **folders, **options)
    model = loaded(tmp_path / 'out')
    assert model.pretrained_cfg['input_size'] == (channels, 32, 32)
    if channels == 1:
        assert model.pretrained_cfg['mean'] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert model(torch.randn(1, channels, 32, 32)).shape == (1, 3)


@pytest.mark.slow
def test_a_run_of_timm_then_again_and_on_the_hub(tmp_path, hub):
    """compress, train the network of the folder, convert, load by hf-hub, and compress once more."""
    run, small, final = (tmp_path / name for name in ('run', 'small', 'final'))
    run.mkdir()
    torch.save(dict(state_dict=build().state_dict(), epoch=4), run / 'last.pth.tar')
    listed = {key: list(value) for key, value in KWARGS.items()}
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model=NAME, model_kwargs=listed, img_size=48, mean=[0.1] * 3)))
    compress(NAME, small, checkpoint=run / 'last.pth.tar', ratio=0.6, repo='org/small')
    model = loaded(small)
    assert [list(model.pretrained_cfg[key]) for key in ('input_size', 'mean')] == [[3, 48, 48], [0.1] * 3]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    torch.save(dict(state_dict=model.state_dict(), epoch=9), run / 'last.pth.tar')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model=f'local-dir:{small}', img_size=48)))
    convert(run / 'last.pth.tar', f'local-dir:{small}', final, license='mit', repo_id='org/final')
    assert same(loaded(final), model)
    hub.add('org/final', {path.name: path.read_bytes() for path in final.iterdir()})
    assert same(timm.create_model('hf-hub:org/final', pretrained=True), model)
    compress('hf-hub:org/final', tmp_path / 'smaller', level=2)
    assert same(loaded(tmp_path / 'smaller'), truncate(model, level=2))
    other = truncate(harmonize(build(seed=1)), levels={n: of.level for n, of in harmonic_layers(model).items()})
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    compress(f'local-dir:{small}', tmp_path / 'third', checkpoint=tmp_path / 'other.pth', level=2)
    assert same(loaded(tmp_path / 'third'), truncate(other, level=2))


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(level=0), ValueError, 'from 1 to 13'),
        (dict(level=2, include=['nothing*']), ValueError, r"'nothing\*' matches none"),
        (dict(level=2, model_kwargs={}), CheckpointError, 'nothing was loaded'),
        (dict(level=2, model='vit_tiny_patch16_224'), ValueError, 'patch embedding'),
        (dict(level=2, model='nonsense'), InputError, 'neither a folder nor a model of timm'),
        (dict(ratio=0.5, data=Path('nowhere')), InputError, 'not an image folder'),
        (dict(ratio=0.5, refit=True), InputError, '--refit needs --data'),
        (dict(level=2, data=Path('x')), InputError, '--data is for --refit, --int8, --energy and --ratio'),
        (dict(level=2, int8=True, data=Path()), InputError, '--int8 needs --deploy'),
        (dict(ratio=1.0, int8=True, deploy=True), InputError, '--int8 needs --deploy, and --data'),
        (dict(level=2, cost='time'), InputError, '--cost and --per mixture need --ratio'),
        (dict(ratio=0.5, per='channel'), InputError, '--per channel needs --ratio or --energy, and --data with'),
        (dict(level=2, per='channel', refit=True, data=Path()), InputError, '--per channel needs --ratio'),
        (dict(energy=0.9, per='mixture', refit=True, data=Path()), InputError, '--per mixture need --ratio'),
        (dict(level=2, device='nowhere'), ValueError, "device 'nowhere' cannot be used here"),
        (dict(level=2, mean=[1, 2]), ValueError, 'mean has 2 values, the network takes 3 channels'),
        (dict(level=2, model='maxvit_rmlp_pico_rw_256', img_size=72), InputError, r'model requires \(256, 256\)'),
        (dict(level=2, model_kwargs=dict(features_only=True)), InputError, 'compress writes complete networks'),
    ],
)
def test_refused_without_a_trace(checkpoint, tmp_path, monkeypatch, options, error, words):
    monkeypatch.chdir(tmp_path)
    arguments = dict(model=NAME, model_kwargs=KWARGS) | options
    if arguments['model'] != NAME:
        arguments['model_kwargs'] = {}
    elif arguments['model_kwargs'] != dict(features_only=True):
        arguments['checkpoint'] = checkpoint
    with pytest.raises(error, match=words):
        compress(arguments.pop('model'), tmp_path / 'out', **arguments)
    assert list(tmp_path.iterdir()) == []


def fail(*args, **kwargs):
    raise ImportError('a broken package')


@pytest.mark.parametrize(
    ('options', 'patched', 'words'),
    [
        (dict(license='no licence'), '', "license 'no licence' is not an id"),
        (dict(repo='a/b/c'), '', 'a/b/c'),
        (dict(), 'timm_harmonic.conversion.report.draw_truncation', 'matplotlib cannot draw .* a broken package'),
        (dict(), 'timm_harmonic.conversion.costs.FlopCounterMode', 'multiply-adds of ResNet cannot be counted'),
        (dict(deploy=True), 'timm_harmonic.export.onnx.write_onnx', 'deployed.onnx cannot be written or run'),
        (dict(out='file/below/out'), '', "out' cannot be written: NotADirectoryError"),
        (dict(evaluate='damaged'), '', 'bad.png'),
    ],
)
def test_what_cannot_be_reported_fails_before_the_work(checkpoint, tmp_path, monkeypatch, options, patched, words):
    monkeypatch.setattr('timm_harmonic.truncate', lambda *args, **kwargs: pytest.fail('it has worked for minutes'))
    if patched:
        monkeypatch.setattr(patched, fail)
    for label in 'abc':
        (tmp_path / 'damaged' / label).mkdir(parents=True)
        (tmp_path / 'damaged' / label / 'bad.png').write_text('no image')
    (tmp_path / 'file').write_text('')
    before = sorted(tmp_path.rglob('*'))
    paths = {key: tmp_path / options[key] for key in ('out', 'evaluate') if key in options}
    given = dict(level=2, img_size=32, checkpoint=checkpoint, model_kwargs=KWARGS, out=tmp_path / 'out') | options
    with pytest.raises(InputError, match=words):
        compress(NAME, **given | paths)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_file_that_fails_late_loses_nothing_else(checkpoint, tmp_path, monkeypatch):
    """The folder is there, with the forms that are faster here; only the file that failed is not."""
    written = []

    def export(network, images, path, int8):
        path.write_text('')
        written.append(path)
        if len(written) == 2:  # the first is that of the complete network
            raise InputError('it broke.')

    monkeypatch.setattr('timm_harmonic.export.onnx.export_onnx', export)
    monkeypatch.setattr('timm_harmonic.conversion.costs.forms_by_time', lambda *args: {'layer4.0.conv1': 'separable'})
    out, options = tmp_path / 'out', dict(ratio=0.9, cost='macs', deploy=True, img_size=32)
    with pytest.raises(InputError, match=r'it broke\. The folder .* is complete but for that'):
        compress(NAME, out, checkpoint=checkpoint, model_kwargs=KWARGS, **options)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert harmonic_layers(loaded(out))['layer4.0.conv1'].form == 'separable'


def test_a_budget_of_time_in_onnx_runtime(checkpoint, tmp_path, monkeypatch):
    """Times are made up: the files that are timed decide."""

    def times(runs, x):
        assert not any(callable(run) for run in runs.values())
        return {name: [dict(dense=1.0, network=20.0).get(name, 0.25)] * 9 for name in runs}

    monkeypatch.setattr('timm_harmonic.conversion.timing.times_of', times)
    monkeypatch.setattr('timm_harmonic.conversion.timing.write_onnx', lambda network, images, path: None)
    options = dict(ratio=0.8, cost='time', runtime='onnxruntime')
    record = compress(NAME, tmp_path / 'out', checkpoint=checkpoint, model_kwargs=KWARGS, img_size=32, **options)
    assert record['options'] == options
    assert record['timed'].startswith('one image in ONNX Runtime on the CPU, ')
    forms = {layer.form for layer in harmonic_layers(loaded(tmp_path / 'out')).values()}
    assert forms == {'dense', 'separable'}


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_onnx_files_are_compared_in_float32(dtype, tmp_path):
    network = deploy(harmonize(build(), level=1)).to(dtype)
    export_onnx(network, torch.randn(1, 3, 64, 64, dtype=dtype), tmp_path / 'some.onnx')
    assert next(network.parameters()).dtype == dtype


def test_scale_is_given_once(checkpoint, tmp_path):
    """The folder keeps it, and is compressed again without. An option of timm's runs has the same name."""
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(model=NAME, scale=[0.08, 1.0])))
    torch.save(torch.load(checkpoint), tmp_path / 'last.pth')
    for i in range(8):
        (tmp_path / 'images' / 'train' / 'class').mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(i).random((40, 40, 3), np.float32) * 1000
        np.save(tmp_path / 'images' / 'train' / 'class' / f'{i}.npy', array)
    options = dict(checkpoint=tmp_path / 'last.pth', model_kwargs=KWARGS, data=tmp_path / 'images', img_size=32)
    with pytest.raises(images.DepthError, match=r'\.npy holds float32: .* --scale'):
        compress(NAME, tmp_path / 'none', energy=0.9, **options)
    compress(NAME, tmp_path / 'a', energy=0.9, scale=1000.0, **options)
    compress(str(tmp_path / 'a'), tmp_path / 'b', energy=0.9, data=tmp_path / 'images')
    for name, scale in dict(a=1000, b=1000).items():
        assert images.noted_scale(loaded(tmp_path / name).pretrained_cfg['notes']) == scale
    compress(NAME, tmp_path / 'c', level=2, **{**options, 'data': None})
    assert images.noted_scale(loaded(tmp_path / 'c').pretrained_cfg.get('notes')) is None


def test_other_classes_cannot_be_evaluated(pictures, tmp_path):
    with pytest.raises(InputError, match='has 3 classes, not 2'):
        compress(NAME, tmp_path / 'out', model_kwargs=dict(KWARGS, num_classes=2), level=2, evaluate=pictures)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize('cost', ['parameters', 'macs'])
def test_the_card_tells_what_the_forms_cost(cost, tmp_path):
    compress(NAME, tmp_path / 'out', ratio=0.5, cost=cost, img_size=64)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert ('Multiply-adds are the same.' in card) == (cost == 'parameters')
    assert ('every harmonic layer becomes a plain convolution' in card) == (cost == 'parameters')
    assert ('of the layers take fewer multiply-adds' in card) == (cost == 'macs')


def test_harmonic_checkpoint_for_a_plain_network(tmp_path):
    torch.save(harmonize(build(), level=2).state_dict(), tmp_path / 'harmonic.pth')
    options = dict(checkpoint=tmp_path / 'harmonic.pth', model_kwargs=KWARGS, level=1)
    with pytest.raises(CheckpointError, match=r'wrong shape: conv1\.weight \(64, 3, 3, 1\) for \(64, 3, 7, 7\)'):
        compress(NAME, tmp_path / 'out', **options)


def test_random_weights_are_said_to_be_random(tmp_path):
    with pytest.warns(UserWarning, match='resnet18 has random weights: pass --pretrained or --checkpoint FILE'):
        compress(NAME, tmp_path / 'out', model_kwargs=KWARGS, level=2)
    assert 'Source:** resnet18 with random weights' in (tmp_path / 'out' / 'README.md').read_text()


def test_packages_that_are_missing(checkpoint, tmp_path, monkeypatch):
    find, options = importlib.util.find_spec, dict(checkpoint=checkpoint, model_kwargs=KWARGS, level=2)
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name: None if name in ('matplotlib', 'onnxscript') else find(name)
    )
    with pytest.raises(InputError, match='pip install onnxscript'):
        compress(NAME, tmp_path / 'out', deploy=True, **options)
    assert not (tmp_path / 'out').exists()
    compress(NAME, tmp_path / 'out', **options)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted({*FILES} - {'compression.png'})


def test_command(checkpoint, pictures, tmp_path, capsys):
    arguments = ['compress', NAME, '--checkpoint', str(checkpoint), '--ratio', '0.5', '--data', str(pictures)]
    arguments += ['--batches', '1', '--batch-size', '4', '--evaluate', str(pictures), '--img-size', '32']
    arguments += ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(8,16,32,64)', '--exclude', 'conv1']
    assert cli.main([*arguments, '--out', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    assert '8 of 13 convolutions are harmonic' in printed
    assert re.search(r'Accuracy, measured: top1 [\d.]+ % before, [\d.]+ % after', printed)
    assert f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)' in printed
    assert 'weigh' not in printed  # progress is on stderr
    assert cli.main([*arguments, '--out', str(tmp_path / 'out')]) == 1
    assert 'not an empty folder' in capsys.readouterr().err
