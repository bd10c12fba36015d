"""The `timm-harmonic` command: one module per command, and the arguments that commands share.

It stands beside the package, and no module here imports it (or torch) at the top: help and usage errors do not wait.
"""

import argparse
import codecs
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

# By name, as a module called `list` must not become a global of this one.
COMMANDS = ('quickstart', 'compare', 'predict', 'compress', 'convert', 'list')
# Errors of the disk, the names and the rights, not of this program.
_OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.ENAMETOOLONG, errno.EROFS}


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return int(text)


def above_zero(text: str, most: float = sys.float_info.max) -> float:
    """A number above 0."""
    with suppress(ValueError):
        if 0 < float(text) <= most:
            return float(text)
    limit = f' and at most {most:g}' if most < sys.float_info.max else ''
    raise argparse.ArgumentTypeError(f'must be above 0{limit}, got {text!r}')


share = partial(above_zero, most=1.0)


# Options that several commands have.
SHARED: dict[str, dict[str, Any]] = {
    '--use-ema': dict(action='store_true', help='use the averaged weights of the checkpoint'),
    '--model-kwargs': dict(nargs='+', default=[], metavar='NAME=VALUE', help='arguments for timm.create_model'),
    '--img-size': dict(type=positive, metavar='N', help="side of the images (default: the network's)"),
    '--mean': dict(type=float, nargs='+', metavar='M', help='mean of the images, one for all channels or for each'),
    '--std': dict(type=float, nargs='+', metavar='S', help='standard deviation of the images, in the same way'),
    '--crop-pct': dict(type=share, metavar='C', help='share of the resized side that the crop keeps'),
    '--scale': dict(
        type=above_zero,
        metavar='S',
        help='value of the images that stands for 1 (default: the largest of their type, for 8 and 16 bits)',
    ),
    '--class-names': dict(type=Path, metavar='FILE', help="class names, one per line, in timm's order (a, B, c2, c10)"),
    '--batch-size': dict(type=positive, default=32, metavar='N', help='images per batch (default: 32)'),
    '--skip-bad': dict(action='store_true', help='leave out unreadable files'),
    '--repo': dict(default='', metavar='ORG/NAME', help='repository to upload to, for the card (default: the folder)'),
}
PREPARATION = ('--img-size', '--mean', '--std', '--crop-pct', '--scale')  # instead of what the network's config says


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds options that several commands have."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def add_models(parser: argparse.ArgumentParser, *default: str) -> None:
    """Adds --models: the networks to compare."""
    names = "harm0, harm1, harm, smooth, auto, or timm's, with options as in harm_resnet18:smoothness=0.5,levels=3"
    text = f'{names} (default: {" ".join(default)})'
    parser.add_argument('--models', nargs='+', metavar='NAME', default=[*default], help=text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and where its weights are."""
    parser.add_argument('model', metavar='MODEL', help='a folder, local-dir:FOLDER, hf-hub:ORG/NAME, or a name of timm')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights: .pth, .pth.tar or .safetensors')
    weights.add_argument('--pretrained', action='store_true', help="use timm's weights for this name")
    add_shared(parser, '--use-ema', '--model-kwargs')


def preparation(args: argparse.Namespace) -> dict[str, Any]:
    """Those of PREPARATION that were given, by the names of `timm_harmonic.common.images.data_config`."""
    names = [option[2:].replace('-', '_') for option in PREPARATION]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Reads the files that arguments name, and splits NAME=VALUE. Raises InputError if that fails."""
    from timm_harmonic.common import parse_option

    if 'model_kwargs' in args:
        args.model_kwargs = dict(map(parse_option, args.model_kwargs))
    if getattr(args, 'class_names', None) is not None:
        args.class_names = read_class_names(args.class_names)
    return args


def read_class_names(path: Path) -> list[str]:
    """Reads one name per line from a text in UTF-8, or in UTF-16 with a byte order mark. Raises InputError."""
    from timm_harmonic.common import InputError, explained

    with explained(f'cannot read {path}', OSError):
        data = path.read_bytes()
    encoding = 'utf-16' if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else 'utf-8-sig'
    text = data.decode(encoding, 'replace').rstrip()
    names = [line.strip() for line in re.split('\r\n?|\n', text)]
    for number, name in enumerate(names, start=1):
        if '\0' in name or '\ufffd' in name:  # the latter replaces what cannot be decoded
            raise InputError(f'{path}, line {number} is not text in UTF-8: save the file as UTF-8.')
        if not name:
            raise InputError(f'{path}, line {number} has no name: write one name per line.')
    return names


def show(table: Any, file: TextIO | None = None) -> None:
    """Prints a table of rich. Nothing is cut: on a narrow terminal words go over several lines."""
    from rich.console import Console

    for column in table.columns:
        column.overflow = 'fold'
    Console(file=file, highlight=False, markup=False, emoji=False).print(table)


def build_parser() -> argparse.ArgumentParser:
    """The parser. A command's help is the docstring of its module."""
    parser = argparse.ArgumentParser(prog='timm-harmonic', description='Harmonic networks as timm models.')
    parser.add_argument('--version', action='version', version=f'timm-harmonic {version("timm-harmonic")}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    style = argparse.RawDescriptionHelpFormatter
    for name in COMMANDS:
        module = import_module(f'{__name__}.{name}')
        line, _, description = (module.__doc__ or '').strip().partition('\n\n')
        line = line[0].lower() + line[1:].rstrip('.')
        command = commands.add_parser(name, help=line, description=f'{line}\n\n{description}', formatter_class=style)
        module.add_arguments(command)
        command.add_argument('--quiet', action='store_true', help='show no progress')
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0, 1 after an error, or 130 after Ctrl-C. Bad arguments exit with 2."""
    if sys.stdout is None:
        return _fail('the standard output is closed: redirect it, to /dev/null if you do not need it')
    sys.stderr = sys.stderr or open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115
    streams, say_once = (sys.stdout, sys.stderr), cache(_say)
    for stream, errors in zip(streams, ('surrogateescape', 'backslashreplace'), strict=True):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show ± gets a ?, and files are UTF-8
            how: Any = dict(errors='replace') if stream.isatty() else dict(encoding='utf-8', errors=errors)
            stream.reconfigure(**how)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: say_once(f'timm-harmonic: warning: {message}')
        try:
            return _run(argv)
        finally:
            for stream in streams:
                try:
                    stream.flush()
                except OSError:  # the interpreter would try again, and complain
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv: Sequence[str] | None) -> int:
    try:
        try:
            args = build_parser().parse_args(argv)
            if args.quiet:
                os.environ.setdefault('TQDM_DISABLE', '1')
            elif not sys.stderr.isatty():
                os.environ.setdefault('TQDM_MININTERVAL', '30')  # bars of others, such as downloads
            args.run(resolve(args))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _say('\nstopped')
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUTSIDE:
            return _fail(f'cannot read or write: {error}')
        from timm_harmonic.common import TimmHarmonicError  # imports torch, so only now

        if not isinstance(error, TimmHarmonicError):
            raise
        return _fail(str(error))
    return 0


def _say(text: str) -> None:
    from tqdm import tqdm  # prints above bars

    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)


def _fail(problem: str) -> int:
    _say(f'timm-harmonic: error: {problem}')
    return 1
