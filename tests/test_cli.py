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
from rich.table import Table

import timm_harmonic
import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
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
        (['predict', 'resnet18', 'image.png', '--out', 'x' * 300], 'File name too long'),
        (['predict', 'resnet18', 'image.png', '--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
        (['predict', 'resnet18', 'image.png', '--model-kwargs', 'in_chans'], 'must be NAME=VALUE'),
        (['predict', 'resnet18', 'image.png', '--class-names', 'nowhere'], 'cannot read nowhere: FileNotFoundError'),
        (
            ['predict', 'resnet18', 'image.png', '--class-names', 'latin1.txt'],
            'latin1.txt, line 1 is not text',
        ),
        (['compress', *NETWORK, 'nope=1', '--level', '2', '--out', 'x'], 'nope'),
        (['compress', *NETWORK, 'num_classes=many', '--level', '2', '--out', 'x'], 'cannot be created'),
        (['compress', *NETWORK, '--level', '2', '--smoothness', 'nan', '--out', 'x'], 'smoothness'),
        (['compress', *NETWORK, '--level', '99', '--out', 'x'], 'level'),
        (['compress', *NETWORK, '--level', '2', '--out', '.'], 'not an empty folder'),
        (['compress', *NETWORK, '--level', '2', '--out', 'x' * 300], 'File name too long'),
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


# Runs `list` with another body, in a fresh interpreter: what it writes on standard output, and a warning.
BODY = """
import sys, timm_harmonic_cli as cli, timm_harmonic_cli.list as module, warnings
def body(args):
    for _ in range(2):
        warnings.warn('careful')
    warnings.warn('careful')
    print({text}, flush={flush})
    with open('file', 'w') as file:
        file.write('kept')
module.run, cli.resolve = body, lambda args: args  # imports no package
sys.exit(cli.main({arguments}))
"""
CAREFUL = b'timm-harmonic: warning: careful\n'
FULL = b'timm-harmonic: error: cannot read or write: [Errno 28] No space left on device\n'
CLOSED = b'timm-harmonic: error: the standard output is closed: redirect it, to /dev/null if you do not need it\n'


def run_body(tmp_path, redirect='', text='"x"', flush=False, arguments=('list',), **env):
    """By a shell, as a redirection may close a stream."""
    code = BODY.format(text=text, flush=flush, arguments=list(arguments))
    command = ['sh', '-c', f'"$0" -c "$1" {redirect}', sys.executable, code]
    env = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'LC_'))} | env
    return subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, check=False)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.parametrize(
    ('redirect', 'code', 'errors'),
    [
        ('', 0, CAREFUL),
        ('2>&-', 0, b''),
        ('<&- 2>&-', 0, b''),
        ('2>/dev/full', 0, b''),
        ('>&-', 1, CLOSED),
        ('>&- 2>&-', 1, b''),
        ('>/dev/full', 1, CAREFUL + FULL),
        ('>/dev/full 2>/dev/full', 1, b''),
    ],
)
@pytest.mark.parametrize('flush', [False, True])
def test_streams_that_are_closed_or_full(redirect, code, errors, flush, tmp_path):
    """There is no traceback, and no message gets into a file of the command."""
    done = run_body(tmp_path, redirect, flush=flush)
    assert (done.returncode, done.stderr) == (code, errors)
    if errors != CLOSED and redirect != '>&- 2>&-' and not (flush and code):
        assert (tmp_path / 'file').read_text() == 'kept'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_help_that_cannot_be_written_is_an_error(tmp_path):
    done = run_body(tmp_path, '>/dev/full', arguments=['--help'])
    assert (done.returncode, done.stderr) == (1, FULL)


@pytest.mark.parametrize(
    'locale', [dict(PYTHONIOENCODING='ascii'), dict(PYTHONIOENCODING='latin-1'), dict(LC_ALL='C', PYTHONUTF8='0')]
)
def test_a_pipe_gets_utf8(locale, tmp_path):
    """Also of file names, which Python cannot decode in some locales."""
    done = run_body(tmp_path, text=r'"\u00b1 \u732b", b"\xc3\x9c".decode("ascii", "surrogateescape")', **locale)
    assert (done.stdout.decode(), done.stderr) == ('± 猫 Ü\n', CAREFUL)


def test_a_terminal_gets_what_it_can_show(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='latin-1')
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr('timm_harmonic_cli.list.run', lambda args: print('± 猫'))
    assert cli.main(['list']) == 0
    assert terminal.buffer.getvalue() == '± ?\n'.encode('latin-1')


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code = BODY.format(text='"x" * 100_000', flush=False, arguments=['list'])
    done = subprocess.run([sys.executable, '-c', code], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, CAREFUL)


@pytest.mark.parametrize('outer', [dict(leave=False), dict(unit='step', leave=False, miniters=1, mininterval=0)])
def test_progress_follows_the_terminal_and_the_command(outer, monkeypatch):
    """A terminal gets a bar, a pipe its state every 30 seconds, --quiet nothing: whenever tqdm was imported."""
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    terminal, pipe, seconds = io.StringIO(), io.StringIO(), [0.0]
    terminal.isatty = lambda: True
    assert not progress(file=terminal).disable
    monkeypatch.setattr('tqdm.std.time', lambda: seconds[0])
    for _ in progress(range(10), file=pipe, desc='outer', **outer):
        for _ in progress(range(4), file=pipe, desc='inner', leave=False):
            seconds[0] += 2.5
    states = [state.strip()[:11] for state in pipe.getvalue().split('\r') if state.strip()]
    assert states == ['outer:  30%', 'outer:  60%', 'outer:  90%']
    pipe.seek(0)
    pipe.truncate()
    for _ in progress(range(4), file=pipe, desc='alone'):
        seconds[0] += 20
    states = [state.strip()[:10] for state in pipe.getvalue().split('\r') if state.strip()]
    assert list(dict.fromkeys(states)) == ['alone:  50', 'alone: 100']
    pipe.write = None  # has no reader: a call would fail
    monkeypatch.setenv('TQDM_DISABLE', '1')
    for file in (terminal, pipe, None):
        assert progress(file=file).disable
    monkeypatch.setattr(sys, 'stderr', None)
    assert progress().disable


def test_class_names_are_read_from_any_editor(tmp_path):
    path, names = tmp_path / 'names.txt', ['Käfer', 'big cat', '猫']
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'):
        for end in ('\n', '\r\n', '\r'):
            for last in ('', end, f' {end}\t{end}'):
                mark = '\ufeff' if encoding.endswith('e') else ''
                path.write_bytes((mark + end.join(['Käfer ', 'big cat\t', '猫']) + last).encode(encoding))
                assert cli.read_class_names(path) == names


@pytest.mark.parametrize(
    ('data', 'words'),
    [
        (b'', r', line 1 has no name: write one name per line'),
        (b'\xef\xbb\xbf\r\n \r\n', r', line 1 has no name'),
        (b'a\r\n\r\nb', r', line 2 has no name'),
        (b'a\n \t\nb\n', r', line 2 has no name'),
        (b'a\rb\rcaf\xe9', r', line 3 is not text in UTF-8: save the file as UTF-8'),
        (b'\xef\xbb\xbfa\ncaf\xe9', r', line 2 is not text in UTF-8'),
        (b'a\nb\0\n', r', line 2 is not text in UTF-8: save'),
        ('a\nb'.encode('utf-16-le'), r', line 1 is not text in UTF-8: save'),
        ('a\nb'.encode('utf-16') + b'x', r', line 2 is not text in UTF-8: save'),
        ('a\nb'.encode('utf-32'), r', line 1 is not text in UTF-8: save'),
    ],
)
def test_class_names_that_are_refused(data, words, tmp_path):
    path = tmp_path / 'names.txt'
    path.write_bytes(data)
    with pytest.raises(InputError, match=f'names.txt{words}'):
        cli.read_class_names(path)


@pytest.mark.parametrize('columns', ['20', '40', '71', '72', '80'])
def test_no_table_is_cut(columns, capsys, monkeypatch):
    """Not on the narrowest terminal: long words go over several lines."""
    monkeypatch.setenv('COLUMNS', columns)
    cells = ['harm_resnet18:smoothness=1,levels=3', '53.0 ± 2.1', '+1.0 (-2.0 to +3.0)', '320,497', '[7.5]']
    table = Table('network', 'accuracy', 'minus harm0', 'parameters', 'seconds', title='a title', caption='a caption')
    table.add_row(*cells)
    table.add_row(*cells[:1])
    cli.show(table)
    shown = capsys.readouterr().out
    assert '…' not in shown
    assert max(map(len, shown.splitlines())) <= int(columns)
    parts = [''.join(line.split('│')[1:2]).strip() for line in shown.splitlines()]
    assert ''.join(parts) == 2 * cells[0]
