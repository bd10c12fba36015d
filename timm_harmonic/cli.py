"""The `timm-harmonic` command: argument parsing only, the work is in the modules."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

__all__ = ['main']

_MODELS = ('harm0', 'harm1', 'harm', 'harm_ortho')
_DEFAULTS = dict(seeds=3, epochs=30, train_per_class=10, models=list(_MODELS[:3]), out=Path('quickstart'))


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return value


def _models(text: str) -> list[str]:
    names = [name.strip() for name in text.split(',')]
    for name in names:
        if name not in _MODELS:
            raise argparse.ArgumentTypeError(f'unknown model {name!r}, choose from {", ".join(_MODELS)}')
    return names


def _add_quickstart(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'quickstart',
        help='train the same small ResNet plain and harmonic on photographs, and compare',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            'Trains the same small ResNet as harm0 (nothing is harmonic), harm1 (only the root is) and harm (every\n'
            'k x k convolution is) to say which photograph a patch of 48 x 48 gray pixels is from. The photographs\n'
            'are those that scikit-image and scikit-learn ship: nothing is downloaded. Training patches are from the\n'
            'left half of each picture, test patches from the right half. Every seed draws new training patches, a\n'
            'new initialisation and a new order, the same for all models. Prints a table, and writes results.json\n'
            'and quickstart.png. One to two minutes on two CPU cores.'
        ),
        argument_default=argparse.SUPPRESS,  # what was not given stays absent, so that --export can refuse the rest
    )
    parser.add_argument('--seeds', type=_positive, metavar='N', help=f'runs per model (default: {_DEFAULTS["seeds"]})')
    parser.add_argument('--epochs', type=_positive, metavar='N', help=f'per run (default: {_DEFAULTS["epochs"]})')
    parser.add_argument(
        '--train-per-class',
        type=_positive,
        metavar='N',
        help=f'training patches of each photograph (default: {_DEFAULTS["train_per_class"]}, at most 24)',
    )
    parser.add_argument(
        '--models',
        type=_models,
        metavar='NAMES',
        help=f'separated by commas, from {", ".join(_MODELS)} (default: {",".join(_DEFAULTS["models"])}); '
        'harm_ortho is harm with an orthonormal basis',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help=f'folder for results.json and quickstart.png, which are overwritten (default: {_DEFAULTS["out"]})',
    )
    parser.add_argument(
        '--export',
        type=Path,
        metavar='DIR',
        help='write the patches of the first seed as an image folder into DIR, which must be new or empty, print a '
        "command of timm's train.py to try on it, and stop; only --train-per-class can be combined with it",
    )
    parser.set_defaults(run=_quickstart, parser=parser)


def _quickstart(args: argparse.Namespace) -> int:
    parser = args.parser
    given = {name: value for name, value in vars(args).items() if name in _DEFAULTS}
    options = {**_DEFAULTS, **given}
    if 'export' in args and (others := sorted(set(given) - {'train_per_class'})):
        parser.error(f'--export trains nothing, so it cannot be combined with --{others[0]}')

    from .photographs import QuickstartError

    try:
        if 'export' in args:
            from .quickstart import export

            export(args.export, options['train_per_class'])
        else:
            from .quickstart import quickstart

            quickstart(**options)
    except QuickstartError as error:
        parser.error(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-harmonic', description='Harmonic networks as timm models.')
    parser.add_argument('--version', action='version', version=f'timm-harmonic {version("timm-harmonic")}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    _add_quickstart(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0, or 130 after Ctrl-C. Errors in the arguments exit with 2.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print('\nstopped: no results written')
        return 130
