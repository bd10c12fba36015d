"""The command line: help, version, and errors that name the option."""

import inspect
import io
import os
import shlex
import subprocess
import sys

import pytest

import timm_harmonic
import timm_harmonic_cli as cli
from timm_harmonic.common.progress import progress
from timm_harmonic.small_data import quickstart


def fail(capsys, *args):
    with pytest.raises(SystemExit) as error:
        cli.main(list(args))
    assert error.value.code == 2
    return capsys.readouterr().err


def test_module_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'timm_harmonic', '--version'], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip() == f'timm-harmonic {timm_harmonic.__version__}'


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(['--help'])
    assert done.value.code == 0
    assert 'quickstart' in capsys.readouterr().out


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(['quickstart', '--help'])
    printed = capsys.readouterr().out
    for option in ('--seeds', '--epochs', '--train-per-class', '--out', '--models', '--export'):
        assert option in printed


def test_model_names_are_those_of_the_quickstart():
    assert tuple(quickstart.MODELS) == cli._MODELS


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        ((), 'required'),
        (('nonsense',), 'invalid choice'),
        (('quickstart', '--seeds', '0'), 'at least 1'),
        (('quickstart', '--epochs', 'ten'), 'at least 1'),
        (('quickstart', '--train-per-class', '-3'), 'at least 1'),
        (('quickstart', '--train-per-class', '1000'), '--train-per-class'),
        (('quickstart', '--models', 'harm0,vgg'), "unknown model 'vgg'"),
        (('quickstart', '--models', ''), 'unknown model'),
        (('quickstart', '--export', 'x', '--seeds', '2'), '--seeds'),
        (('compare', 'x', '--time-limit', 'inf'), 'must be a number above 0'),
        (('compare', 'x', '--time-limit', '-1'), 'must be a number above 0'),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    assert words in fail(capsys, *args)
    assert not any(tmp_path.glob('**/*.png'))


def test_out_must_be_a_folder(capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot write' in fail(capsys, 'quickstart', '--out', str(tmp_path / 'file'))


def test_export_refuses_a_folder_with_files(capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'not empty' in fail(capsys, 'quickstart', '--export', str(tmp_path))


def test_export_writes_the_patches_and_says_how_to_train(capsys, tmp_path):
    assert cli.main(['quickstart', '--export', str(tmp_path / 'new'), '--train-per-class', '2']) == 0
    assert len(list(tmp_path.glob('new/train/*/*.png'))) == 34
    printed = capsys.readouterr().out
    assert 'train.py' in printed
    assert f'--data-dir "{tmp_path / "new"}"' in printed


def test_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, 'quickstart', interrupt)
    assert cli.main(['quickstart']) == 130
    assert 'stopped' in capsys.readouterr().err


def test_help_does_not_wait_for_pytorch():
    code = (
        'import sys, timm_harmonic_cli as cli\n'
        'try: cli.main(sys.argv[1:])\n'
        'except SystemExit: print("torch" in sys.modules, file=sys.stderr)'
    )
    for arguments in (['--help'], ['compress', '--help'], ['compress', 'x', '--ratio', '2', '--out', 'y']):
        done = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.endswith('False\n')


@pytest.mark.parametrize('columns', [60, 100])
def test_help_fits_the_terminal(columns, capsys, monkeypatch):
    """But for the examples and names, which are not broken."""
    monkeypatch.setenv('COLUMNS', str(columns))
    for command in ('', *cli._COMMANDS):
        with pytest.raises(SystemExit):
            cli.main([*filter(None, [command]), '--help'])
        printed = capsys.readouterr().out
        assert printed
        options = printed.partition('options:')[2]
        assert max(map(len, options.splitlines())) <= columns


def test_a_table_fits_the_terminal(monkeypatch, tmp_path):
    """On a narrower one stands its summary, and where it is. A pipe gets the table."""
    table = f'{"layer":<80}\n{"conv1":<80}\nresnet18: 1 of 2'
    monkeypatch.setenv('COLUMNS', '60')
    assert cli._fitting(table, tmp_path / 'a.md') == table
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    assert cli._fitting(table, tmp_path / 'a.md') == f'resnet18: 1 of 2\nLayer by layer: {tmp_path / "a.md"}'
    monkeypatch.setenv('COLUMNS', '80')
    assert cli._fitting(table, tmp_path / 'a.md') == table


@pytest.mark.parametrize('command', list(cli._COMMANDS))
def test_help_has_examples(command):
    """They are commands that can be given."""
    lines = inspect.getdoc(cli._COMMANDS[command][0]).splitlines()
    examples = [line.strip() for line in lines if line.startswith('  timm-harmonic ')]
    assert examples
    for example in examples:
        assert cli._parser().parse_args(shlex.split(example)[1:]).run is cli._COMMANDS[command][0]


def test_a_terminal_without_unicode(tmp_path):
    """What it cannot show is replaced, and the command goes on. In a pipe there is no progress."""
    command = [sys.executable, '-m', 'timm_harmonic', 'list']
    env = dict(os.environ, PYTHONIOENCODING='ascii')
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert 'harm_resnet50' in done.stdout
    code = (
        'import timm_harmonic_cli as cli, sys; cli._COMMANDS["list"] = (lambda args: print("\u00b1"), lambda p: None)'
    )
    done = subprocess.run(
        [sys.executable, '-c', f'{code}; sys.exit(cli.main(["list"]))'], capture_output=True, env=env, check=True
    )
    assert done.stdout == b'?\n'


def test_progress_follows_the_terminal_and_the_command(monkeypatch):
    """Whenever tqdm was imported."""
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    pipe, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert [bool(progress(file=file).disable) for file in (pipe, terminal)] == [True, False]
    monkeypatch.setenv('TQDM_DISABLE', '1')
    assert progress(file=terminal).disable


def test_no_progress_in_a_pipe(tmp_path):
    command = [
        sys.executable,
        '-m',
        'timm_harmonic',
        'quickstart',
        '--seeds',
        '1',
        '--epochs',
        '1',
        '--models',
        'harm0',
    ]
    done = subprocess.run([*command, '--out', str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ''
    assert 'harm0' in done.stdout
