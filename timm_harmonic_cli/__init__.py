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
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        limit = f' and at most {most:g}' if most < sys.float_info.max else ''
        raise argparse.ArgumentTypeError(f'must be above 0{limit}, got {text!r}')
    return number


share = partial(above_zero, most=1.0)


def add_models(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
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
    add_use_ema(parser)
    add_model_kwargs(parser)


def add_use_ema(parser: argparse.ArgumentParser) -> None:
    """Adds --use-ema."""
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    """Adds --model-kwargs."""
    kwargs = 'arguments for timm.create_model'
    parser.add_argument('--model-kwargs', nargs='+', default=[], metavar='NAME=VALUE', help=kwargs)


def add_preparation(parser: argparse.ArgumentParser) -> None:
    """Adds --img-size, --mean and more: how images are prepared, instead of as the network's config says."""
    add = parser.add_argument
    add('--img-size', type=positive, metavar='N', help="side of the images (default: the network's)")
    add('--mean', type=float, nargs='+', metavar='M', help='mean of the images, one value for all channels or for each')
    add('--std', type=float, nargs='+', metavar='S', help='standard deviation of the images, in the same way')
    add('--crop-pct', type=share, metavar='C', help='share of the resized side that the crop keeps')
    add_scale(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Adds --scale."""
    scale = 'value of the images that stands for 1 (default: the largest of their type, for 8 and 16 bits)'
    parser.add_argument('--scale', type=above_zero, metavar='S', help=scale)


def preparation(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_preparation` that were given, by the names of `timm_harmonic.common.images.data_config`."""
    names = ('img_size', 'mean', 'std', 'crop_pct', 'scale')
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def add_class_names(parser: argparse.ArgumentParser) -> None:
    """Adds --class-names."""
    names = "names of the classes, one per line, in timm's order: natural (2 before 10), upper and lower case alike"
    parser.add_argument('--class-names', type=Path, metavar='FILE', help=names)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size."""
    parser.add_argument('--batch-size', type=positive, default=32, metavar='N', help='images per batch (default: 32)')


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
    try:
        text, problem = data.decode(encoding).rstrip(), ''
    except UnicodeDecodeError as error:
        text, problem = error.object[: error.start].decode(encoding, 'ignore') + '\0', f' ({error.reason})'
    names = [line.strip() for line in re.split('\r\n?|\n', text)]
    for number, name in enumerate(names, start=1):
        if '\0' in name:
            raise InputError(f'{path}, line {number} is not text in UTF-8{problem}: save the file as UTF-8.')
        if not name:
            raise InputError(f'{path}, line {number} has no name: write one name per line.')
    return names


def show(table: Any, file: TextIO | None = None) -> None:
    """Prints a table of rich, or its rows one cell a line on a terminal that is too narrow for it. Nothing is cut."""
    from rich.console import Console

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if console.width >= 72:
        for column in table.columns:
            column.overflow = 'fold'
        console.print(table)
        return
    rows = zip(*(column.cells for column in table.columns), strict=True)
    named = ([f'{of.header}: {cell}' for of, cell in zip(table.columns, row, strict=True) if cell] for row in rows)
    for text in filter(None, (table.title, *map('\n  '.join, named), table.caption)):
        console.print(text, soft_wrap=True)


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
