"""The command line: help, version, usage errors, and errors that the user can mend."""

import importlib
import io
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import timm_harmonic
import timm_harmonic_cli as cli
from timm_harmonic.common.progress import progress

NETWORK = ['harm_resnet18', '--model-kwargs', 'layers=(1,1,1,1)', 'channels=(8,16,32,64)']


@pytest.mark.slow
def test_module_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'timm_harmonic', '--version'], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip() == f'timm-harmonic {timm_harmonic.__version__}'


def test_help_and_usage_errors_do_not_wait_for_pytorch():
    code = (
        'import sys, timm_harmonic_cli as cli\n'
        'for arguments in (["--help"], ["compress", "--help"], ["compress", "x", "--ratio", "2", "--out", "y"]):\n'
        '    try: cli.main(arguments)\n'
        '    except SystemExit: pass\n'
        'slow = {"timm_harmonic", "torch", "numpy", "timm", "PIL", "rich"} & sys.modules.keys()\n'
        'print(sorted(slow), file=sys.stderr)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stderr.endswith('[]\n')


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        ((), 'required'),
        (('nonsense',), 'invalid choice'),
        (('quickstart', '--seeds', '0'), 'at least 1'),
        (('quickstart', '--epochs', 'ten'), 'at least 1'),
        (('quickstart', '--models'), 'expected at least one argument'),
        (('compress', 'x', '--out', 'y'), 'one of the arguments --level --energy --ratio is required'),
        (('compress', 'x', '--out', 'y', '--ratio', '1.5'), 'must be above 0 and at most 1'),
        (('compress', 'x', '--out', 'y', '--level', '1', '--batches', '-1'), 'must be an integer of at least 1'),
    ],
)
def test_usage_errors(capsys, args, words):
    with pytest.raises(SystemExit) as error:
        cli.main(list(args))
    assert error.value.code == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with what users confuse: a file, a text that is not UTF-8, an image, an image folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('text')
    (tmp_path / 'latin1.txt').write_bytes(b'caf\xe9\n')
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save('image.png')
    for name in ('a', 'b'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i}.png')
    return tmp_path


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        (['quickstart', '--out', 'file'], 'cannot write results to file'),
        (['quickstart', '--train-per-class', '1000'], '--train-per-class'),
        (['quickstart', '--models', 'harm0,harm'], "'harm0,harm' is neither one of harm0"),
        (['quickstart', '--models', 'harm:nope=1'], 'harm:nope=1 cannot be used on images of 48 x 48 pixels'),
        (['quickstart', '--export', '.'], 'is not an empty folder'),
        (['compare', 'file'], 'is not a folder'),
        (['compare', 'images', '--out', 'file', '--epochs', '1'], 'cannot write results to file'),
        (['compare', 'images', '--device', 'nowhere'], "device 'nowhere' cannot be used here"),
        (['predict', 'no_such_model', 'image.png', '--pretrained'], 'no_such_model'),
        (['predict', 'hf-hub:nobody/nothing', 'image.png'], 'nobody/nothing'),
        (['predict', 'local-dir:images', 'image.png'], 'images'),
        (['predict', 'resnet18', 'image.png', '--out', 'nowhere/x.csv'], 'must be a file in an existing folder'),
        (['predict', 'resnet18', 'image.png', '--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
        (['predict', 'resnet18', 'image.png', '--model-kwargs', 'in_chans'], 'must be NAME=VALUE'),
        (['predict', 'resnet18', 'image.png', '--class-names', 'nowhere'], 'cannot read nowhere: FileNotFoundError'),
        (['predict', 'resnet18', 'image.png', '--class-names', 'latin1.txt'], 'cannot read latin1.txt: UnicodeDecode'),
        (['compress', *NETWORK, 'nope=1', '--level', '2', '--out', 'x'], 'nope'),
        (['compress', *NETWORK, 'num_classes=many', '--level', '2', '--out', 'x'], 'cannot be created'),
        (['compress', *NETWORK, '--level', '2', '--smoothness', 'nan', '--out', 'x'], 'smoothness'),
        (['compress', *NETWORK, '--level', '99', '--out', 'x'], 'level'),
        (['compress', *NETWORK, '--level', '2', '--out', '.'], 'not an empty folder'),
        (['convert', 'file', '--model', 'no_such_model', '--out', 'x'], 'is not a harmonic model'),
        (['convert', 'file', '--model', 'harm_resnet18', '--out', 'x'], 'file'),
    ],
)
def test_errors_of_the_user_are_one_line(args, words, place, capsys, hub):
    """They have no traceback, and leave nothing behind."""
    before = sorted(place.rglob('*'))
    assert cli.main(args) == 1
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.startswith('timm-harmonic: error: ')
    assert sorted(path for path in place.rglob('*') if 'hub-cache' not in str(path)) == before


def test_a_bug_shows_its_traceback_and_an_interrupt_ends_quietly(capsys, monkeypatch):
    def fail(error):
        raise error

    monkeypatch.setattr('timm.list_models', lambda *args, **options: fail(KeyError('bug')))
    with pytest.raises(KeyError):
        cli.main(['list'])
    monkeypatch.setattr('timm.list_models', lambda *args, **options: fail(KeyboardInterrupt))
    assert cli.main(['list']) == 130
    assert 'stopped' in capsys.readouterr().err


def test_help_fits_the_terminal_and_its_examples_parse(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as done:
            cli.main([command, '--help'])
        assert done.value.code == 0
        assert max(map(len, capsys.readouterr().out.partition('options:')[2].splitlines())) <= 60
        module = importlib.import_module(f'timm_harmonic_cli.{command}')
        examples = [line for line in module.__doc__.splitlines() if line.startswith('  timm-harmonic ')]
        assert examples
        for example in examples:
            assert cli.build_parser().parse_args(shlex.split(example)[1:]).run is module.run


@pytest.mark.slow
@pytest.mark.slow
def test_terminals_and_pipes():
    """What a terminal cannot show becomes a ?, a closed pipe ends the command, and a pipe gets no progress."""
    code = (
        'import sys, timm_harmonic_cli as cli, timm_harmonic_cli.list as module\n'
        'module.run = lambda args: print("\\u00b1" * 100_000)\n'
        'sys.exit(cli.main(["list"]))'
    )
    env = dict(os.environ, PYTHONIOENCODING='ascii')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env=env, check=True)
    assert done.stdout.strip(b'?\n') == done.stderr == b''
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, '-c', code], stdout=writer, stderr=subprocess.PIPE, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b'')


def test_progress_follows_the_terminal_and_the_command(monkeypatch):
    """Whenever tqdm was imported."""
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    pipe, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert [bool(progress(file=file).disable) for file in (pipe, terminal)] == [True, False]
    monkeypatch.setenv('TQDM_DISABLE', '1')
    assert progress(file=terminal).disable
