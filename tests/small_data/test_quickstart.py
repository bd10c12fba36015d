"""`timm-harmonic quickstart`: the photographs and their patches, a tiny run by the command line, its files."""

import importlib.util
import itertools
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
from timm_harmonic.small_data import tasks
from timm_harmonic.small_data.tasks import PATCH_SIZE, draw_patches, export_patches, load_photographs

# timm's ImageDataset does not close images: the garbage collector does.
pytestmark = [
    pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning'),
    pytest.mark.filterwarnings('ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning'),
]


@pytest.fixture(scope='module')
def pictures():
    return load_photographs()


@pytest.fixture(scope='module')
def few(pictures):
    return {name: pictures[name] for name in ('brick', 'chelsea', 'gravel')}


@pytest.fixture
def run_cli(monkeypatch, few, tmp_path):
    """Runs the command on three photographs, and returns the results and the folder."""
    monkeypatch.setattr(tasks, 'load_photographs', lambda: few)
    monkeypatch.setenv('COLUMNS', '120')

    def run(*args, out='out'):
        folder = tmp_path / out
        options = ['--seeds', '1', '--epochs', '2', '--train-per-class', '4', '--out', str(folder)]
        assert cli.main(['quickstart', *options, *args]) == 0
        return json.loads((folder / 'results.json').read_text()), folder

    return run


def test_photographs_are_gray_and_named_once(pictures, monkeypatch):
    assert len(pictures) == len(tasks.PHOTOGRAPHS) == 17
    assert list(pictures) == sorted(pictures)
    assert all(picture.dtype == np.uint8 and picture.ndim == 2 for picture in pictures.values())
    with pytest.raises(InputError, match=r'chelsea has only 24 train patches.*--train-per-class'):
        draw_patches(pictures, 'train', 25)
    monkeypatch.setattr(tasks, 'PHOTOGRAPHS', (('skimage', 'data/nessie.png'),))
    with pytest.raises(InputError, match=r'nessie\.png'):
        load_photographs()


def test_no_pixel_is_in_two_patches(pictures):
    train, test = (draw_patches(pictures, split, 24, seed=3) for split in ('train', 'validation'))
    for name, picture in pictures.items():
        assert len(train[name]) == len(test[name]) == 24
        used = np.zeros(picture.shape, dtype=int)
        for top, left in itertools.chain(train[name], test[name]):
            patch = tasks.cut(used, (top, left))
            assert patch.shape == (PATCH_SIZE, PATCH_SIZE)
            patch += 1
        assert used.max() == 1, name
        assert max(left for _, left in train[name]) + PATCH_SIZE <= picture.shape[1] // 2
        assert min(left for _, left in test[name]) >= picture.shape[1] // 2


def test_choice_of_patches_follows_the_seed(few):
    """Of training patches and of test patches, where a photograph has more than are drawn."""
    assert draw_patches(few, 'train', 5, seed=1) == draw_patches(few, 'train', 5, seed=1)
    assert draw_patches(few, 'train', 5, seed=1) != draw_patches(few, 'train', 5, seed=2)
    first, again, other = (tasks.patches(few, 3, seed, 2) for seed in (0, 0, 1))
    for split in (0, 1):
        assert torch.equal(first[split].pixels, again[split].pixels)
        assert not torch.equal(first[split].pixels, other[split].pixels)


def test_export_is_what_timm_reads(few, tmp_path):
    counts = export_patches(tmp_path / 'new', few, train_per_class=3)
    assert counts == {'train': 9, 'validation': 72}
    assert sorted(os.listdir(tmp_path / 'new')) == ['train', 'validation']
    for split, each in (('train', 3), ('validation', 24)):
        dataset = create_dataset('', tmp_path / 'new', split=split, input_img_mode='L')
        assert [dataset[i][1] for i in range(len(dataset))] == [0] * each + [1] * each + [2] * each
        assert dataset[0][0].size == (PATCH_SIZE, PATCH_SIZE)
        assert list(dataset.reader.class_to_idx) == list(few)
        for i, filename in enumerate(dataset.filenames(basename=True)):
            name = list(few)[dataset[i][1]]
            corner = tuple(map(int, filename.removesuffix('.png').split('_')))
            np.testing.assert_array_equal(np.asarray(dataset[i][0]), tasks.cut(few[name], corner))


def test_run_writes_what_it_prints(run_cli, capfd):
    results, folder = run_cli('--models', 'harm0', 'harm1', 'harm', 'smooth')
    assert sorted(os.listdir(folder)) == ['quickstart.png', 'results.json']
    with Image.open(folder / 'quickstart.png') as image:
        assert image.size[0] > 1000
    printed, progress = capfd.readouterr()
    assert progress == ''  # in a pipe
    assert 'Measured here: 1 seed' in printed
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in printed.splitlines() if '│' in line]
    networks = results['networks']
    assert [row[0] for row in rows] == list(networks) == ['harm0', 'harm1', 'harm', 'smooth']
    for name, accuracy, as_trained, gain, parameters in rows:
        model = networks[name]
        assert float(accuracy) == pytest.approx(model['accuracy'][0], abs=0.051)
        assert float(as_trained) == pytest.approx(model['accuracy_as_trained'][0], abs=0.051)
        assert int(parameters.replace(',', '')) == model['parameters'] == networks['harm0']['parameters']
        assert model['accuracy'][0] == model['accuracy_mean']
        if name != 'harm0':
            difference = model['accuracy'][0] - networks['harm0']['accuracy'][0]
            assert float(gain) == pytest.approx(difference, abs=0.051)
    assert results['data']['train'] == 12
    assert results['environment']['torch'] == torch.__version__


def test_same_seed_same_result_and_global_state_is_left_alone(run_cli):
    def states():
        return [*torch.get_rng_state().tolist(), random.getstate(), *np.random.get_state()[1], torch.get_num_threads()]

    found = []
    for seed in (7, 8):
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(seed)
        before = states()
        results, _ = run_cli('--models', 'harm', '--seeds', '2', out=str(seed))
        assert states() == before
        found.append(results['networks']['harm'])
    assert found[0] == found[1]


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    missing = ('skimage', 'matplotlib')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name in missing else find(name))
    assert cli.main(['quickstart', '--out', str(tmp_path / 'out')]) == 1
    assert 'missing packages: pip install matplotlib scikit-image\n' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_auto_needs_a_search(capsys, tmp_path):
    assert cli.main(['quickstart', '--models', 'harm0', 'auto', '--out', str(tmp_path / 'out')]) == 1
    assert 'auto needs a search, which the quickstart does not make: use compare.' in capsys.readouterr().err


def test_export_from_the_command_line(capsys, tmp_path):
    assert cli.main(['quickstart', '--export', str(tmp_path / 'new'), '--train-per-class', '2']) == 0
    assert len(list(tmp_path.glob('new/train/*/*.png'))) == 34
    assert f'--data-dir "{tmp_path / "new"}"' in capsys.readouterr().out
