"""`timm-harmonic compare`: what it reads and refuses, the same search for all, interruptions and time limits."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from commands import compare, predict
from PIL import Image
from timm.data import create_dataset

import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
from timm_harmonic.common.images import DepthError, Preparation
from timm_harmonic.small_data import results, tasks
from timm_harmonic.small_data.protocol import RANGES, Protocol, Store, run
from timm_harmonic.small_data.tasks import Images, read_folder
from timm_harmonic.small_data.training import NAMED, Recipe, baseline, network

pytestmark = pytest.mark.usefixtures('one_thread')
FAST = dict(trials=1, seeds=2, epochs=1, img_size=32)
DRAW = results.draw


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Most tests need no picture, which takes longer than their training."""
    monkeypatch.setattr(results, 'draw', lambda found, title, path: path.write_text(''))


def picture(random, label, size, channels=3):
    """Noise over stripes, whose direction is the class."""
    stripes = np.sin(np.arange(size) / (2 + label))
    waves = 60 * (stripes if label % 2 else stripes[:, None])
    return np.clip(128 + waves + 20 * random.standard_normal((size, size)), 0, 255)[..., None].repeat(channels, 2)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.npy':
        np.save(path, array.astype(np.float32))
    elif path.suffix == '.tif':
        tifffile.imwrite(path, array.astype(np.uint16), photometric='minisblack', planarconfig='contig')
    else:
        Image.fromarray(array.astype(np.uint8).squeeze()).save(path)


def make(folder, count=10, classes=('cat', 'dog', 'emu'), splits=('train', 'test'), suffix='.png', channels=3, size=40):
    """An image folder of `count` images a class and split."""
    random = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            for i in range(count):
                save(folder / split / name / f'{i}{suffix}', picture(random, label, size, channels))
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make(tmp_path_factory.mktemp('pictures'))


def test_a_comparison_from_the_command_line(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, 'draw', DRAW)
    models = ['harm0', 'harm_resnet18:layers=(1,1,1,1),channels=(8,16,32,64),levels=3']
    options = ['--trials', '2', '--seeds', '3', '--epochs', '1', '--img-size', '32', '--augment', 'zoom']
    command = ['compare', str(pictures), '--out', str(tmp_path), '--models', *models, *options]
    assert cli.main(command) == 0
    assert sorted(os.listdir(tmp_path)) == ['compare.png', 'results.json', 'runs.json']
    found = json.loads((tmp_path / 'results.json').read_text())
    assert list(found['networks']) == models
    assert found['baseline'] == 'harm0'
    for name, of in found['networks'].items():
        assert len(of['accuracy']) == 3
        gains = np.subtract(of['accuracy'], found['networks']['harm0']['accuracy'])
        assert of['difference']['mean'] == pytest.approx(gains.mean())
        best = max(of['trials'], key=lambda trial: trial['accuracy'])
        assert best['accuracy'] == max(trial['accuracy'] for trial in of['trials'])
        assert of['chosen'] == [{key: best[key] for key in ('lr', 'weight_decay')}], name
        low, high = of['over_images']
        assert low <= of['difference']['mean'] <= high
        assert len(of['accuracy_as_trained']) == 3
    settings = [[(t['lr'], t['weight_decay']) for t in of['trials']] for of in found['networks'].values()]
    assert settings[0] == settings[1]  # the same search for all
    with Image.open(tmp_path / 'compare.png') as image:
        assert image.size[0] > 1000
    printed = capsys.readouterr().out
    assert '30 training and 30 test images' in printed.replace('\n', ' ')
    assert f'Wrote {tmp_path / "results.json"} and' in printed
    # Everything is there already: the same command trains nothing, and other options are refused.
    before = (tmp_path / 'runs.json').read_bytes()
    assert cli.main(command) == 0
    assert json.loads((tmp_path / 'results.json').read_text())['networks'] == found['networks']
    assert cli.main([*command, '--epochs', '3']) == 1
    assert 'other settings (recipe): choose another --out' in capsys.readouterr().err
    assert (tmp_path / 'runs.json').read_bytes() == before


@pytest.mark.parametrize('splits', [('train', 'test'), ('.',)], ids=['test folder', 'split by seed'])
def test_test_images_choose_nothing(splits, tmp_path, monkeypatch):
    """Other test images change what is measured in the end, and nothing before."""
    folder = make(tmp_path / 'images', 8, splits=splits)
    compare(folder, tmp_path / 'a', ['harm0'], **dict(FAST, trials=2))
    draw = tasks.Task.draw

    def other(task, seed):
        train, test = draw(task, seed)
        return train, Images(torch.zeros_like(test.pixels), test.labels)

    monkeypatch.setattr(tasks.Task, 'draw', other)
    compare(folder, tmp_path / 'b', ['harm0'], **dict(FAST, trials=2))
    runs = [json.loads((tmp_path / out / 'runs.json').read_text())['results'] for out in 'ab']
    first, second = ({key: of for key, of in by_key.items() if key.startswith('search')} for by_key in runs)
    assert first == second
    assert len(first) == 2 * 2
    assert runs[0] != runs[1]


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same(pictures, tmp_path):
    options = ['--models', 'harm0', 'smooth', '--trials', '2', '--seeds', '2', '--epochs', '4', '--img-size', '32']
    command = [sys.executable, '-m', 'timm_harmonic', 'compare', str(pictures), *options, '--out']
    env = dict(os.environ, OMP_NUM_THREADS='1')
    runs = tmp_path / 'killed' / 'runs.json'
    deadline = time.monotonic() + 120
    with subprocess.Popen([*command, str(runs.parent)], env=env, stdout=subprocess.DEVNULL) as process:
        while not (runs.exists() and runs.read_text().count('"loss"') >= 4):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert runs.read_text().count('"loss"') < 2 * (2 * 2 + 2)
    found = []
    for out in ('killed', 'whole'):
        subprocess.run([*command, str(tmp_path / out)], env=env, timeout=300, check=True)
        found.append(json.loads((tmp_path / out / 'results.json').read_text())['networks'])
    assert found[0] == found[1]


@pytest.mark.parametrize('text', ['[1]', 'text', '{"settings": {}}'])
def test_a_file_of_something_else_is_refused(text, pictures, tmp_path):
    (tmp_path / 'runs.json').write_text(text)
    with pytest.raises(InputError, match=r'runs\.json is not a file of runs: choose another --out'):
        compare(pictures, tmp_path, ['harm0'], **FAST)
    assert (tmp_path / 'runs.json').read_text() == text


def test_results_inside_the_folder_are_no_class(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path / 'images', 8, splits=('.',)))
    first, again = (compare(Path(), Path('compare'), ['harm0'], **FAST) for _ in range(2))
    assert again['data']['classes'] == first['data']['classes'] == ['cat', 'dog', 'emu']
    assert again['networks'] == first['networks']


def test_what_is_a_split_and_what_is_a_class(tmp_path):
    one = picture(np.random.default_rng(0), 0, 40)
    vehicles = make(tmp_path / 'vehicles', 4, classes=('car', 'train'), splits=('.',))
    assert read_folder(vehicles).classes == ['car', 'train']
    hidden = make(tmp_path / 'hidden', 4)
    save(hidden / 'train' / 'cat' / '.ipynb_checkpoints' / '0.png', one)
    with pytest.warns(UserWarning, match='is passed over'):
        assert len(read_folder(hidden).train) == 12
    for where in ('flat/train', 'flat/test', 'mixed/train', 'mixed/test', 'mixed/a', 'mixed/b'):
        save(tmp_path / where / '0.png', one)
    save(make(tmp_path / 'unlabelled', 4, splits=('train',)) / 'test' / '0.png', one)

    make(tmp_path / 'no_train', 4, splits=('validation', 'test'))
    for name, words in dict(
        flat='0.png lies beside the class folders',
        mixed='has train/, test/ beside classes',
        unlabelled='test/0.png lies beside the class folders',
        no_train=r'has \w+/ and \w+/, but no train/',
    ).items():
        with pytest.raises(InputError, match=words):
            read_folder(tmp_path / name)


def test_large_values(tmp_path):
    """Sums of them leave float32; values that do so themselves are refused."""
    folder = make(tmp_path / 'images', 4, suffix='.npy')
    paths = list(folder.rglob('*.npy'))
    for path in paths:
        np.save(path, np.load(path) * np.float32(1e35))
    assert compare(folder, tmp_path / 'out', ['harm0'], scale=1e37, **FAST)['data']['std'][0] > 0.1
    with pytest.raises(InputError, match='too large for a scale of 1'):
        read_folder(folder, scale=1.0)
    np.save(paths[0], np.full((40, 40, 3), 1e300))
    with pytest.raises(InputError, match='not finite in float32'):
        read_folder(folder, scale=1.0)


@pytest.mark.parametrize('suffix', ['.npy', '.tif'])
def test_thirteen_channels(suffix, tmp_path):
    task = read_folder(make(tmp_path / 'images', 4, suffix=suffix, channels=13), scale=255.0)
    assert task.train.pixels.shape == (12, 13, 40, 40)
    assert task.notes == ["timm's train.py cannot read these images: use --keep, or a training loop of your own."]
    assert task.config['scale'] == 255
    assert len(task.config['mean']) == len(task.config['std']) == 13
    assert run(network('smooth'), task.train, task.test, 3, Recipe(epochs=1), 0)['accuracy'] >= 0


def test_classes_alone_are_split_by_a_seed(tmp_path):
    folder = make(tmp_path / 'images', 8, splits=('.',))
    found = compare(folder, tmp_path / 'out', ['harm0'], opt='momentum', **FAST)
    assert (found['data']['train'], found['data']['test']) == (18, 6)
    assert tuple(found['search']['ranges']['lr']) == RANGES['momentum']['lr']
    of = found['networks']['harm0']
    assert len(of['chosen']) == FAST['seeds']  # a search for each
    assert 'over_images' not in of
    first, again, other = (read_folder(folder).draw(seed)[1].pixels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_search_sees_no_test_image_of_its_seed(tmp_path):
    """Nor does a network's normalisation."""
    task = read_folder(make(tmp_path / 'images', 8, splits=('.',)))
    number = torch.arange(len(task.train.labels), dtype=torch.float32)
    task = dataclasses.replace(task, train=Images(number[:, None, None, None] + torch.rand(24, 1, 4, 4), number // 8))
    protocol = Protocol(task.draw, [], task.classes, Recipe(), 1, 3, nested=True)
    seen = []
    for seed in range(3):
        train, test = task.draw(seed)
        assert train.pixels.mean() == pytest.approx(0, abs=1e-5)
        inner = [image.flatten().tolist() for part in protocol.inner(seed) for image in part.pixels]
        assert sorted(inner) == sorted(image.flatten().tolist() for image in train.pixels)
        assert not any(image.flatten().tolist() in inner for image in test.pixels)
        assert list(protocol.splits(seed)) == [seed]
        seen.append(sorted(test.labels.tolist()))
    assert seen == [sorted([0, 0, 1, 1, 2, 2])] * 3
    assert list(protocol.splits()) == [0, 1, 2]


def test_validation_judges_where_there_is_a_test_split_too(tmp_path):
    folder = make(tmp_path / 'images', 6, splits=('train', 'val', 'test'))
    task = read_folder(folder)
    protocol = Protocol(task.draw, [], task.classes, Recipe(), 1, 3, validation=task.validation)
    assert protocol.inner(0)[1] is task.validation
    assert list(protocol.splits()) == [0]
    assert len(task.validation) == len(task.test) == 18
    task = read_folder(make(tmp_path / 'other', 6, splits=('train', 'val')))
    assert (len(task.test), task.validation) == (18, None)


def spoil(folder, what):
    """Makes a good folder a bad one."""
    first = folder / 'train' / 'cat' / '0.png'
    if what == 'unreadable':
        first.write_bytes(b'no image')
    elif what == 'not finite':
        np.save(first.with_suffix('.npy'), np.full((40, 40, 3), np.nan))
    elif what == 'pickle':
        np.save(first.with_suffix('.npy'), np.array([object()]), allow_pickle=True)
    elif what == 'bands':
        np.save(first.with_suffix('.npy'), np.zeros((40, 40, 13), np.uint8))
    elif what == 'gray':
        Image.open(first).convert('L').save(first)
    elif what == 'one image':
        for path in (folder / 'train' / 'cat').glob('[1-9].png'):
            path.unlink()
    elif what == 'class only in test':
        save(folder / 'test' / 'new' / '0.png', np.zeros((40, 40, 3)))
    elif what == 'one class':
        for path in (*folder.glob('*/dog/*'), *folder.glob('*/emu/*')):
            path.unlink()
    elif what == 'no test':
        (folder / 'test').rename(folder / 'others')
    elif what == 'constant':
        for path in folder.rglob('*.png'):
            Image.new('RGB', (40, 40)).save(path)


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('unreadable', r'1 files cannot be read; pass --skip-bad .*\n  train/cat/0.png: cannot identify'),
        ('not finite', r'train/cat/0.npy: holds 4800 values that are NaN'),
        ('pickle', r'train/cat/0.npy: '),
        ('bands', r'same number of channels: .* has 3, .* has 13'),
        ('one image', r'class cat has 1 image to learn from: at least two'),
        ('class only in test', r'train of .* has no images of new'),
        ('one class', r'has 1 class with images: two are needed'),
        ('no test', r'has train/, but neither validation/ nor test/'),
        ('constant', r'channel 0 is constant'),
    ],
)
def test_bad_folders(what, message, tmp_path):
    folder = make(tmp_path / 'images', 4)
    spoil(folder, what)
    with pytest.raises(InputError, match=message):
        compare(folder, tmp_path / 'out', ['harm0'], **FAST)
    assert not (tmp_path / 'out').exists()


def test_bad_files_can_be_left_out_and_are_named(tmp_path, capsys):
    folder = make(tmp_path / 'images', 4)
    spoil(folder, 'unreadable')
    found = compare(folder, tmp_path / 'out', ['harm0'], skip_bad=True, **FAST)
    assert found['data']['train'] == 11
    assert found['data']['skipped'][0].startswith('train/cat/0.png')
    assert '1 files were left out: train/cat/0.png' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('no_such_model', "'no_such_model' is neither"),
        ('resnet18:3=4', "must be NAME=VALUE, got '3=4'"),
        ('harm0:features_only=True', 'it does not return logits'),
        ('harm0:nope=1', r'harm0:nope=1 cannot be used on images of 40 x 40 pixels: TypeError'),
        ('vit_tiny_patch16_224', 'vit_tiny_patch16_224 cannot be used .* AssertionError'),
    ],
)
def test_bad_networks(text, message):
    with pytest.raises(InputError, match=message):
        baseline([network('harm0'), network(text)], 3, 3, 40)


def test_names_of_networks():
    assert network('harm:levels=(1,2,3,4),smoothness=0.5').options == {
        **NAMED['harm'], 'levels': (1, 2, 3, 4), 'smoothness': 0.5
    }  # fmt: skip
    assert network('resnet18:stem_type=deep').options == dict(stem_type='deep')
    assert network('smooth').model == 'harm_resnet18'
    assert baseline([network('harm'), network('harm0'), network('harm1')], 3, 3, 40) == 'harm0'
    assert baseline([network('harm'), network('smooth')], 3, 3, 40) == 'harm'


def test_images_are_prepared_as_the_kept_network_says(tmp_path):
    """In one step, from any size: what predict computes from the config is what the networks were trained on."""
    random = np.random.default_rng(0)
    for name in 'ab':
        for i in range(4):
            save(tmp_path / name / f'{i}.png', picture(random, 0, 30 + 30 * i))
    for size, side in ((None, 64), (32, 32)):
        task = read_folder(tmp_path, size)
        assert task.train.pixels.shape[2:] == (side, side)
        prepare = Preparation(task.config)
        for path in tmp_path.rglob('*.png'):
            assert (task.train.pixels - prepare.read(path)).abs().amax((1, 2, 3)).min() < 1e-5
        shrunk = 'Images were shrunk from 75 to 64 pixels (median shorter side): see --img-size.'
        assert task.notes == ([shrunk] if size is None else [])
    assert task.config['scale'] is None
    small = make(tmp_path / 'small', 3, size=20)
    assert read_folder(small).train.pixels.shape == (9, 3, 20, 20)


def test_gray_among_colour_is_read_as_most_are(tmp_path):
    folder = make(tmp_path / 'images', 4)
    spoil(folder, 'gray')
    task = read_folder(folder)
    assert task.train.pixels.shape[1] == 3
    assert task.notes == ['1 of 24 images are gray and were read as colour.']
    first = task.train.pixels[0] * torch.tensor(task.config['std'])[:, None, None]
    gray = first + torch.tensor(task.config['mean'])[:, None, None]
    torch.testing.assert_close(gray[0], gray[1])
    for path in folder.glob('*/*/[1-9].png'):
        Image.open(path).convert('L').save(path)
    task = read_folder(folder)
    assert task.train.pixels.shape[1] == 1
    assert task.notes == ['5 of 24 images are colour and were read as gray.']


def test_classes_and_their_numbers_are_timms(tmp_path):
    """Links, folders in folders, numbers and letters in any case; an image without a class is an error."""
    one = picture(np.random.default_rng(0), 0, 40)
    for split in ('train', 'validation'):
        for name in ('class10', 'class9', 'Apple', 'zoo/bear'):
            for i in range(4):
                save(tmp_path / 'images' / split / name / f'{i}.png', one + i)
        (tmp_path / 'images' / split / 'zoo' / 'link').symlink_to(tmp_path / 'images' / split / 'Apple')
    task = read_folder(tmp_path / 'images')
    timms = create_dataset('', tmp_path / 'images', split='validation').reader
    assert {name: i for i, name in enumerate(task.classes)} == timms.class_to_idx
    assert sorted(task.test.labels.tolist()) == sorted(label for _, label in timms.samples)
    save(tmp_path / 'images' / 'train' / 'stray.png', one)
    with pytest.raises(InputError, match=r'stray\.png lies beside the class folders'):
        read_folder(tmp_path / 'images')


def test_sixteen_bits_beside_eight_are_an_error(tmp_path):
    """Even if unreadable files may be left out, and if the files are of two classes."""
    folder = make(tmp_path / 'images', 3, channels=1)
    for path in folder.glob('*/dog/*'):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
    with pytest.raises(DepthError, match=r'cat/0\.png holds uint8, .*dog/0\.png holds uint16'):
        read_folder(folder, skip_bad=True)


def test_a_kept_network_predicts_as_it_was_trained(tmp_path, capsys):
    """Floats of 13 bands: size, mean, deviation, scale and class names are in the folder."""
    folder = make(tmp_path / 'images', 8, suffix='.npy', channels=13)
    for path in folder.rglob('*.npy'):
        np.save(path, (np.load(path) * 30).astype(np.float32))
    with pytest.raises(DepthError, match=r'0\.npy holds float32: state the value .* --scale'):
        compare(folder, tmp_path / 'out', ['harm0'], **FAST)
    options = dict(FAST, epochs=25, img_size=24, scale=7650.0, keep=tmp_path / 'kept')
    found = compare(folder, tmp_path / 'out', ['harm0', 'smooth'], **options)
    printed = capsys.readouterr().out.replace('\n', ' ')
    name = re.search(r'Wrote (\w+), which the search judged best', printed)[1]
    judged = {net: of['trials'][0]['accuracy'] for net, of in found['networks'].items()}
    assert judged[name] == max(judged.values())
    assert '--scale 7650.' in printed
    rows = predict(str(tmp_path / 'kept'), [folder / 'test'])
    named = [row['classes'][0]['name'] == Path(row['file']).parent.name for row in rows]
    assert 100 * np.mean(named) == pytest.approx(found['networks'][name]['accuracy'][0])
    assert np.mean(named) > 0.6
    with pytest.raises(InputError, match='is not an empty folder'):
        compare(folder, tmp_path / 'out', ['harm0'], **options)


def test_a_kept_network_has_the_smoothness_that_was_chosen(tmp_path):
    """It is an ordinary network afterwards, trained on all images."""
    folder, options = make(tmp_path / 'images', 6, splits=('.',)), dict(FAST, trials=2, seeds=1, keep=tmp_path / 'kept')
    found = compare(folder, tmp_path / 'out', ['auto'], **options)['networks']['auto']
    assert [of['smoothness'] for of in found['trials']] == [0.5, 1]
    config = json.loads((tmp_path / 'kept' / 'config.json').read_text())
    assert [config['model_args']['smoothness']] == [of['smoothness'] for of in found['chosen']]
    assert 'trained on 18 images' in (tmp_path / 'kept' / 'README.md').read_text()


def test_networks_are_added_to_a_comparison(pictures, tmp_path):
    first = compare(pictures, tmp_path, ['harm0', 'harm'], **FAST)
    both = compare(pictures, tmp_path, ['resnet18:layers=(1,1,1,1),channels=(8,16,32,64)'], **FAST)
    assert list(both['networks'])[:2] == ['harm0', 'harm']
    assert len(both['networks']) == 3
    assert both['networks']['harm'] == first['networks']['harm']
    # Another process has written meanwhile.
    stores = [Store(tmp_path / 'two.json', {}, [network(name)]) for name in ('harm0', 'harm')]
    for store, key in zip(stores, 'ab', strict=True):
        store.get(key, dict)
    held = json.loads((tmp_path / 'two.json').read_text())
    assert (held['results'], list(held['networks'])) == (dict(a={}, b={}), ['harm0', 'harm'])
    runs = json.loads((tmp_path / 'runs.json').read_text())
    runs['networks']['harm'][1]['smoothness'] = 2
    (tmp_path / 'runs.json').write_text(json.dumps(runs))
    with pytest.raises(InputError, match=r'other settings \(harm\): choose another'):
        compare(pictures, tmp_path, ['harm'], **FAST)


def test_advice():
    """Settings at the edge of the search; nothing otherwise."""

    def found(lr):
        chosen = [dict(lr=lr, weight_decay=0.05), dict(lr=0.005, weight_decay=0.05)]
        return dict(networks=dict(harm=dict(chosen=chosen)), search=dict(ranges=RANGES['adamw']))

    assert results.advice(found(0.005)) == []
    for lr in (0.0004, 0.025):  # the outermost of eight trials
        (line,) = results.advice(found(lr))
        where = f'in 1 of 2 choices: harm {lr:g} (searched: 0.0002 to 0.05)'
        assert line == f'The best lr is at the edge of the search {where}.'
