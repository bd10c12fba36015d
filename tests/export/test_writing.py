"""Folders are there as a whole or not at all."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from timm_harmonic.common.files import new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('how', ['new', 'empty', 'link', 'here'])
def test_a_whole_folder(how, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    if how != 'new':
        out.mkdir()
    if how == 'link':
        (tmp_path / 'link').symlink_to(out)
        out = tmp_path / 'link'
    if how == 'here':
        monkeypatch.chdir(out)
        out = type(out)('.')
    with new_folder(out, last='a') as folder:
        for name in 'abc':
            (folder / name).write_text(name)
        (folder / 'sub').mkdir()
        assert not (out / 'a').exists()
    assert names(tmp_path / 'out') == ['a', 'b', 'c', 'sub']
    assert names(tmp_path) == sorted({'out', 'link'} if how == 'link' else {'out'})


def fill(out, error=None):
    with new_folder(out) as folder:
        for name in 'abc':
            (folder / name).write_text(name)
        if error is not None:
            raise error


@pytest.mark.parametrize('exists', [False, True])
def test_an_error_leaves_nothing(exists, tmp_path):
    out = tmp_path / 'out'
    if exists:
        out.mkdir()
    with pytest.raises(RuntimeError, match='half'):
        fill(out, RuntimeError('half'))
    assert [path for path in tmp_path.rglob('*') if path != out] == []


def test_an_interruption_between_two_moves(tmp_path, monkeypatch):
    """Into a folder that was there, files are moved one by one."""
    out = tmp_path / 'out'
    out.mkdir()
    rename, calls = type(out).rename, []

    def second_dies(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(out), 'rename', second_dies)
    with pytest.raises(KeyboardInterrupt):
        fill(out)
    assert names(out) == []


@pytest.mark.parametrize('exists', [False, True])
def test_remains_of_a_killed_process_are_cleared(exists, tmp_path):
    """Those of a running one stay."""
    out = tmp_path / 'out'
    if exists:
        out.mkdir()
    code = f"""
import time, pathlib
from timm_harmonic.common.files import new_folder
with new_folder(pathlib.Path({str(out)!r})) as folder:
    (folder / 'half').write_text('')
    print('ready', flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    place, prefix = (out, '.') if exists else (tmp_path, '.out')
    assert len([name for name in names(place) if name.startswith('.')]) == 1
    (place / f'{prefix}-{socket.gethostname()}-{os.getppid()}-running').mkdir()
    (place / f'{prefix}-other-host-1-kept').mkdir()
    with new_folder(out) as folder:
        (folder / 'whole').write_text('')
    left = {name.rpartition('-')[2] for name in names(place) if name.startswith('.')}
    assert left == {'running', 'kept'}
    assert (out / 'whole').is_file()
