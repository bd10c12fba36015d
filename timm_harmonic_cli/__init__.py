"""The `timm-harmonic` command: one module per command, and the arguments that commands share.

It stands beside the package, and no module here imports it (or torch) at the top: help and usage errors do not wait.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

# By name, as a module called `list` must not become a global of this one.
COMMANDS = ('quickstart', 'compare', 'predict', 'compress', 'convert', 'list')


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


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return above_zero(text, 1.0)


def add_models(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Adds --models: the networks to compare."""
    names = "harm0, harm1, harm, smooth, auto, or timm's, with options as in harm_resnet18:smoothness=1,levels=3"
    text = f'{names} (default: {" ".join(default)})'
    parser.add_argument('--models', nargs='+', metavar='NAME', default=[*default], help=text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and where its weights are."""
    parser.add_argument('model', metavar='MODEL', help='a folder, local-dir:FOLDER, hf-hub:ORG/NAME, or a name of timm')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights: .pth, .pth.tar or .safetensors')
    weights.add_argument('--pretrained', action='store_true', help="use timm's weights for this name")
    add_model_kwargs(parser)


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    """Adds --model-kwargs."""
    parser.add_argument(
        '--model-kwargs', nargs='+', default=[], metavar='NAME=VALUE', help='arguments for timm.create_model'
    )


def add_preparation(parser: argparse.ArgumentParser) -> None:
    """Adds --img-size, --mean, --std and --scale: how images are prepared, instead of as the network's config says."""
    add = parser.add_argument
    add('--img-size', type=positive, metavar='N', help="side of the images (default: the network's)")
    add('--mean', type=float, nargs='+', metavar='M', help='mean of the images, one value for all channels or for each')
    add('--std', type=float, nargs='+', metavar='S', help='standard deviation of the images, in the same way')
    add_scale(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Adds --scale."""
    scale = 'value of the images that stands for 1 (default: the largest of their type, for 8 and 16 bits)'
    parser.add_argument('--scale', type=above_zero, metavar='S', help=scale)


def preparation(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_preparation` that were given, by the names of `timm_harmonic.common.images.data_config`."""
    names = dict(img_size='img_size', mean='mean', std='std', scale='image_scale')
    return {name: value for key, name in names.items() if (value := getattr(args, key)) is not None}


def add_class_names(parser: argparse.ArgumentParser) -> None:
    """Adds --class-names."""
    names = 'names of the classes in order, one per line'
    parser.add_argument('--class-names', type=Path, metavar='FILE', help=names)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size."""
    parser.add_argument('--batch-size', type=positive, default=32, metavar='N', help='images per batch (default: 32)')


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Reads the files that arguments name, and splits NAME=VALUE. Raises InputError if that fails."""
    from timm_harmonic.common import explained, parse_option

    if 'model_kwargs' in args:
        args.model_kwargs = dict(map(parse_option, args.model_kwargs))
    if getattr(args, 'class_names', None) is not None:
        with explained(f'cannot read {args.class_names}', OSError, UnicodeDecodeError):
            args.class_names = args.class_names.read_text(encoding='utf-8').splitlines()
    return args


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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a terminal that cannot show ± gets a ? instead of an error
    try:
        args = build_parser().parse_args(argv)
        if args.quiet or not sys.stderr.isatty():
            os.environ.setdefault('TQDM_DISABLE', '1')  # progress bars are for people
        args.run(resolve(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from timm_harmonic.common import TimmHarmonicError  # imports torch, so only now

        if not isinstance(error, TimmHarmonicError):
            raise
        print(f'timm-harmonic: error: {error}', file=sys.stderr)
        return 1
    return 0
