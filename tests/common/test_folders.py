"""Folders of images: timm's order, splits by their names, and what is passed over."""

import os

import pytest
import timm

from timm_harmonic.common import InputError
from timm_harmonic.common.folders import classes_of, image_files, natural_order, split_folder, split_folders


def test_order_is_timms():
    names = ['b', 'B', 'a10', 'a9', 'A1', 'a', '10', '9', 'x1y2', 'x1y10']
    assert sorted(names, key=natural_order) == sorted(sorted(names), key=timm.utils.natural_key)
    assert sorted(['1²3', '1a'], key=natural_order)  # timm's fails


def test_links(tmp_path):
    """One to a folder above is passed over, a broken one is no silent gap, a missing folder is named."""
    (tmp_path / 'loop').symlink_to(tmp_path)
    (tmp_path / 'broken.png').symlink_to(tmp_path / 'nothing.png')
    assert image_files(tmp_path) == [tmp_path / 'broken.png']
    with pytest.raises(InputError, match='cannot list'):
        image_files(tmp_path / 'nowhere')


def test_what_timm_would_take_for_a_class_is_a_warning(tmp_path):
    for name in ('1', '01', '.ipynb_checkpoints', '.git'):
        (tmp_path / name).mkdir()
        (tmp_path / name / ('1.png' if name != '.git' else 'config')).touch()
    with pytest.warns(UserWarning, match=r'ipynb_checkpoints is passed over, but timm takes it') as caught:
        files = image_files(tmp_path)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="timm puts the classes '01' and '1' in any order"):
        assert classes_of(files, tmp_path) == (['01', '1'], [0, 1])


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    (tmp_path / 'class' / '.hidden').mkdir(parents=True)
    for name in ('Thumbs.db', 'desktop.ini', '.DS_Store', '._1.png', '.hidden/2', '1.png'):
        (tmp_path / 'class' / name).touch()
    os.mkfifo(tmp_path / 'class' / 'pipe.png')
    assert image_files(tmp_path) == [tmp_path / 'class' / '1.png']


@pytest.mark.parametrize('names', [('train', 'Train'), ('val', 'valid'), ('Validation', 'eval'), ('test', 'Testing')])
def test_two_folders_for_one_split_are_an_error(names, tmp_path):
    for name in {'train', 'test', *names}:
        (tmp_path / name / 'class').mkdir(parents=True)
    with pytest.raises(InputError, match=rf'has ({names[0]}/ and {names[1]}|{names[1]}/ and {names[0]})/, both could'):
        split_folders(tmp_path)
    with pytest.raises(InputError, match='both could be its'):
        split_folder(tmp_path, 'validation')
    with pytest.raises(InputError, match='both could be its'):
        split_folder(tmp_path, names[-1])


def test_splits_by_any_name(tmp_path):
    for name in ('TRAIN', 'Val', 'fold 2'):
        (tmp_path / name / 'class').mkdir(parents=True)
    assert split_folders(tmp_path) == {'train': tmp_path / 'TRAIN', 'validation': tmp_path / 'Val'}
    for split, name in {'training': 'TRAIN', 'validation': 'Val', 'fold 2': 'fold 2', 'test': '.'}.items():
        assert split_folder(tmp_path, split) == tmp_path / name
