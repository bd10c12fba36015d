"""The `timm-harmonic` command: argument parsing only, the work is in the modules."""

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not key.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f'must be NAME=VALUE, got {text!r}')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'convert',
        help='write the folder of a Hub repository from a checkpoint',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Writes model.safetensors, config.json and a model card from the authors' file or from a checkpoint of\n"
            "timm's train.py. args.yaml and summary.csv beside the checkpoint say how it was trained and are taken\n"
            'along. The folder is loaded again, and its outputs on random images must be those of the checkpoint.'
        ),
    )
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='the file: .pth, .pth.tar or .safetensors')
    parser.add_argument('--model', required=True, metavar='NAME', help='architecture, see `timm-harmonic list`')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    parser.add_argument(
        '--repo',
        default='',
        metavar='ORG/NAME',
        help='where it is going to be published, for the card (default: our organisation and the name of the folder)',
    )
    parser.add_argument(
        '--model-kwargs',
        nargs='+',
        type=_option,
        default=[],
        metavar='NAME=VALUE',
        help='options of the architecture, if no args.yaml says them',
    )
    parser.add_argument('--class-names', type=Path, metavar='FILE', help='names of the classes in order, one a line')
    parser.add_argument('--dataset', default='', metavar='ID', help='the training data on the Hub, for the card')
    parser.add_argument('--license', metavar='ID', help='of the weights (default: bsd-3-clause)')
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from .hub_folder import LICENSE, convert

    names = args.class_names.read_text(encoding='utf-8').splitlines() if args.class_names else None
    files = convert(
        args.checkpoint,
        args.model,
        args.out,
        repo_id=args.repo,
        use_ema=args.use_ema,
        model_kwargs=dict(args.model_kwargs),
        class_names=names,
        license=args.license or LICENSE,
        dataset=args.dataset,
    )
    print(f'{args.out} gives the outputs of {args.checkpoint}:')
    for path in files:
        print(f'  {path.name:<19} {path.stat().st_size:>13,} bytes')
    if any(path.name == 'train_hparams.yaml' for path in files):
        print("train_hparams.yaml holds the run's options with its paths: look at it before it is published.")
    return 0


def _add_compress(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'compress',
        help='make any convolutional network of timm harmonic, and drop its high frequencies',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            'Exchanges the k x k convolutions of a network for harmonic ones with the same filters, drops their high\n'
            'frequencies, and writes the folder of a Hub repository, which timm loads by local-dir:DIR. With it come\n'
            'a report (compression.md, compression.json) and a picture (compression.png). Multiply-adds stay.'
        ),
    )
    parser.add_argument('model', metavar='MODEL', help='any name that timm takes, hf-hub: and local-dir: included')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', type=Path, metavar='FILE', help='its weights: .pth, .pth.tar or .safetensors')
    weights.add_argument('--pretrained', action='store_true', help='take the weights that timm has for it')
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument('--level', type=int, metavar='L', help='keep the frequencies with i + j < L in every layer')
    amount.add_argument('--energy', type=float, metavar='E', help='keep this share of the energy of each layer')
    amount.add_argument('--ratio', type=float, metavar='R', help='keep this share of all parameters')
    amount.add_argument('--max-params', type=int, metavar='N', help='keep at most so many parameters')
    parser.add_argument(
        '--include', nargs='+', metavar='PATTERN', help="only these convolutions, as 'layer3.*' (default: all that can)"
    )
    parser.add_argument('--exclude', nargs='+', metavar='PATTERN', help='not these')
    parser.add_argument('--normalization', default='l1', metavar='N', help="of the DCT functions: 'l1' or 'ortho'")
    parser.add_argument(
        '--model-kwargs', nargs='+', type=_option, default=[], metavar='NAME=VALUE', help='options of the network'
    )
    parser.add_argument(
        '--data',
        type=Path,
        metavar='DIR',
        help='image folder: weigh frequencies by what they cause there',
    )
    parser.add_argument('--batches', type=_positive, default=8, metavar='N', help='so many of --data (default: 8)')
    parser.add_argument('--batch-size', type=_positive, default=32, metavar='N', help='of images (default: 32)')
    parser.add_argument('--evaluate', type=Path, metavar='DIR', help='image folder: measure accuracy before and after')
    parser.add_argument('--split', default='validation', help='of --evaluate (default: validation)')
    parser.add_argument(
        '--repo', default='', metavar='ORG/NAME', help='where it is going to be published, for the card'
    )
    parser.add_argument('--license', default='', metavar='ID', help="of the weights (default: the network's)")
    parser.add_argument('--img-size', type=_positive, metavar='N', help="side of the images (default: the network's)")
    parser.add_argument('--mean', type=float, nargs='+', metavar='M', help='of the images, one a channel')
    parser.add_argument('--std', type=float, nargs='+', metavar='S', help='of the images, one a channel')
    parser.set_defaults(run=_compress)


def _compress(args: argparse.Namespace) -> int:
    from .compression import compress

    if args.energy is None and args.ratio is None and args.max_params is None and args.data:
        raise ValueError(
            '--data weighs frequencies for --energy, --ratio and --max-params: it means nothing for --level.'
        )
    report = compress(
        args.model,
        args.out,
        checkpoint=args.checkpoint,
        pretrained=args.pretrained,
        model_kwargs=dict(args.model_kwargs),
        level=args.level,
        energy=args.energy,
        ratio=args.ratio,
        max_params=args.max_params,
        include=args.include,
        exclude=args.exclude,
        normalization=args.normalization,
        data=args.data,
        batches=args.batches,
        batch_size=args.batch_size,
        evaluate=args.evaluate,
        split=args.split,
        data_config={key: value for key in ('img_size', 'mean', 'std') if (value := getattr(args, key)) is not None},
        repo_id=args.repo,
        license=args.license,
    )
    print(report)
    print(f'\nWrote {args.out}: timm.create_model("local-dir:{args.out}", pretrained=True)')
    return 0


def _add_publish(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'publish',
        help='upload such a folder to the Hugging Face Hub',
        description='Checks a folder that `convert` wrote, and uploads it in one commit. Log in by `hf auth login`.',
    )
    parser.add_argument('folder', type=Path, metavar='DIR', help='the folder')
    parser.add_argument('--repo', required=True, metavar='ORG/NAME', help='repository, made if there is none')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', metavar='R', help='branch, made if there is none (default: main)')
    parser.add_argument('--dry-run', action='store_true', help='check everything, upload nothing')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    parser.add_argument('--force', action='store_true', help='replace other files of the same name')
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    from .hub import publish
    from .pretrained import WEIGHTS_NAME, sha256_of

    url = publish(
        args.folder,
        args.repo,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        dry_run=args.dry_run,
        force=args.force,
    )
    print(f'{url} (dry run: nothing was uploaded)' if args.dry_run else url)
    print(f"to pin it in the model's config: sha256='{sha256_of(args.folder / WEIGHTS_NAME)}'")
    return 0


def _add_list(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('list', help='show the models and where their weights are')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    from .inventory import print_inventory

    print_inventory(as_json=args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-harmonic', description='Harmonic networks as timm models.')
    parser.add_argument('--version', action='version', version=f'timm-harmonic {version("timm-harmonic")}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for add in (_add_quickstart, _add_list, _add_compress, _add_convert, _add_publish):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C. Errors in the arguments exit with 2.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        return 130
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f'timm-harmonic: error: {error}', file=sys.stderr)
        return 1
