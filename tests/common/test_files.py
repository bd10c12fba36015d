"""Files and folders exist as a whole or not at all."""

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import timm_harmonic
import timm_harmonic_cli
from timm_harmonic.common import InputError
from timm_harmonic.common.files import check_new, new_folder, write_text, write_whole
from timm_harmonic.models.checkpoints import read_checkpoint


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


@pytest.mark.skipif(not os.path.exists('/dev/fd'), reason='needs /dev/fd')
@pytest.mark.parametrize('kind', ['/dev/fd', '/proc/self/fd', pytest.param('link', marks=pytest.mark.slow)])
def test_what_a_descriptor_appends_to_is_kept(kind, tmp_path):
    """As in `>> log`. Opened by its name, the file would be emptied; renamed onto, it would be another."""
    log = tmp_path / 'log'
    log.write_text('before\n')
    with log.open('a') as file:
        place = Path('/dev/fd' if kind == 'link' else kind, str(file.fileno()))
        if kind == 'link':
            (tmp_path / 'link').symlink_to('/dev/stdout')
            code = (
                'import sys, pathlib, timm_harmonic.common.files as files\n'
                'files.write_whole(pathlib.Path("link"), lambda path: path.write_text("whole"))'
            )
            subprocess.run([sys.executable, '-c', code], cwd=tmp_path, stdout=file, check=True)
        else:
            write_whole(place, lambda path: path.write_text('whole'))
    assert log.read_text() == 'before\nwhole'


def test_devices_and_pipes(tmp_path):
    reader, writer = os.pipe()
    write_whole(Path(f'/dev/fd/{writer}'), lambda path: path.write_text('whole'))
    os.write(writer, b' and open')
    os.close(writer)
    with open(reader) as file:
        assert file.read() == 'whole and open'
    for place in ('/dev/full', f'/dev/fd/{writer}', tmp_path):
        with pytest.raises(InputError, match='cannot be written'):
            write_whole(Path(place), lambda path: path.write_text('whole'))
    assert names(tmp_path) == []


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != 'posix', reason='modes are those of POSIX')
def test_others_may_read_what_the_umask_lets_them(umask, tmp_path):
    """safetensors alone would let nobody."""
    out, single = tmp_path / 'out', tmp_path / 'single'
    with new_folder(out) as folder:
        (folder / 'sub').mkdir()
        for place in (folder, folder / 'sub'):
            save_file({'a': torch.zeros(1)}, place / 'weights.safetensors')
    write_whole(single, lambda path: path.write_text(''))
    assert {mode(path) for path in (out, out / 'sub')} == {0o777 & ~umask}
    files = [out / 'weights.safetensors', out / 'sub' / 'weights.safetensors', single]
    assert {mode(path) for path in files} == {0o666 & ~umask}


@pytest.mark.skipif(os.name != 'posix', reason='modes are those of POSIX')
def test_what_is_replaced_keeps_its_mode(umask, tmp_path):
    out, single = tmp_path / 'out', tmp_path / 'single'
    out.mkdir()
    single.touch()
    for path, bits in ((out, 0o750), (single, 0o664)):
        path.chmod(bits)
    fill(out)
    write_whole(single, lambda path: path.write_text(''))
    assert (mode(out), mode(single)) == (0o750, 0o664)


def test_text_is_utf8_whatever_the_names(tmp_path):
    """Names of files may be anything but text, and in some locales those that are text look like the others."""
    undecodable, undecoded = b'\xe9'.decode('utf-8', 'surrogateescape'), b'\xc3\x9c'.decode('ascii', 'surrogateescape')
    write_text(tmp_path / 'text', f'± 猫\n{undecodable} {undecoded}\n')
    assert (tmp_path / 'text').read_bytes() == '± 猫\n\\xe9 Ü\n'.encode()


def test_weights_are_read_from_any_folder(tmp_path):
    """safetensors opens no path that is not UTF-8."""
    folder = tmp_path / os.fsdecode(b'\xe9')
    try:
        folder.mkdir()
    except OSError:
        pytest.skip('the file system has text names only')
    save_file({'a': torch.ones(2)}, folder / 'x.safetensors')
    assert read_checkpoint(folder / 'x.safetensors')['a'].tolist() == [1, 1]


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale():
    for package in (timm_harmonic, timm_harmonic_cli):
        for path in Path(package.__file__).parent.rglob('*.py'):
            for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
                if name == 'open' or name.endswith(('.read_text', '.write_text')):
                    binary = any(isinstance(of, ast.Constant) and 'b' in str(of.value) for of in node.args)
                    assert binary or any(of.arg == 'encoding' for of in node.keywords), (path, ast.unparse(node))
