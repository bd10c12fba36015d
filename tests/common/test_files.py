"""Files and folders exist as a whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_harmonic.common import InputError
from timm_harmonic.common.files import check_new, new_folder, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(out, error=None):
    with new_folder(out) as folder:
        for name in 'abc':
            (folder / name).write_text(name)
        (folder / 'sub').mkdir()
        if error is not None:
            raise error


@pytest.mark.parametrize('how', ['new', 'parents', 'empty', 'link', 'here', 'mount point'])
def test_a_whole_folder(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = expected = tmp_path / 'out'
    if how in ('new', 'parents'):
        out = expected = Path('a/b/out' if how == 'parents' else 'out')
    else:
        out.mkdir()
    if how == 'link':
        out = tmp_path / 'link'
        out.symlink_to(expected)
    elif how == 'here':
        monkeypatch.chdir(out)
        out = Path('.')
    elif how == 'mount point':
        monkeypatch.setattr(Path, 'is_mount', lambda path: path == expected)
    check_new(out)
    fill(out)
    assert names(expected) == ['a', 'b', 'c', 'sub']
    assert names(expected.parent) == sorted({'out', 'link'} if how == 'link' else {'out'})
    assert out.is_symlink() == (how == 'link')
    for again in (check_new, fill):
        with pytest.raises(InputError, match='is not an empty folder, it contains a: choose another'):
            again(out)


@pytest.mark.parametrize('exists', [False, True])
@pytest.mark.parametrize('error', [RuntimeError('half'), KeyboardInterrupt('half')])
def test_an_error_leaves_nothing(exists, error, tmp_path):
    out = tmp_path / 'out'
    if exists:
        out.mkdir()
    with pytest.raises(type(error), match='half'):
        fill(out, error)
    assert [path for path in tmp_path.rglob('*') if path != out] == []


@pytest.mark.slow
def test_a_killed_process_leaves_no_folder(tmp_path):
    """Only a hidden one, and the next process is not in its way."""
    code = (
        'import sys, time, pathlib\n'
        'from timm_harmonic.common.files import new_folder\n'
        'with new_folder(pathlib.Path(sys.argv[1])) as folder:\n'
        '    (folder / "half").write_text("")\n'
        '    print("ready", flush=True)\n'
        '    time.sleep(60)'
    )
    out = tmp_path / 'out'
    with subprocess.Popen([sys.executable, '-c', code, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'ready\n'
        process.kill()
    assert all(name.startswith('.timm-harmonic-') for name in names(tmp_path))
    fill(out)
    assert names(out) == ['a', 'b', 'c', 'sub']


def test_what_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / 'file').write_text('')
    for out in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(InputError, match=r'file.* (cannot be written|is not an empty folder)'):
            fill(out)
        with pytest.raises(InputError, match='cannot be written'):
            write_whole(tmp_path / 'file' / 'below', lambda path: path.write_text(''))
    with pytest.raises(InputError, match=r'out.* cannot be written: .*No space'):
        fill(tmp_path / 'out', OSError(28, 'No space left on device'))
    assert names(tmp_path) == ['file']


def test_a_whole_file(tmp_path):
    path, link = tmp_path / 'results.json', tmp_path / 'link'
    link.symlink_to(path)
    for place in (path, link):
        write_whole(place, lambda partial: partial.write_text('whole'))
        assert path.read_text() == 'whole'
        path.write_text('before')

        def half(partial):
            partial.write_text('half')
            raise RuntimeError

        with pytest.raises(RuntimeError):
            write_whole(place, half)
        assert path.read_text() == 'before'
    assert link.is_symlink()
    assert names(tmp_path) == ['link', 'results.json']
    write_whole(Path(os.devnull), lambda device: device.write_text('nothing'))
