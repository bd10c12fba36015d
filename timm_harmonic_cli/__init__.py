"""The `timm-harmonic` command: argument parsing only, the work is in the modules.

It stands beside the package, and imports it where a command needs it: help and errors do not wait for PyTorch.
"""

import argparse
import inspect
import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_OWN = ('run', 'parser', 'quiet')  # arguments that are the command's own
_MODELS = ('harm0', 'harm1', 'harm', 'smooth')


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0 and at most 1, got {text!r}')
    return share


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return int(text)


def _natural(text: str) -> int:
    return 0 if text == '0' else _positive(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float('inf'):
        raise argparse.ArgumentTypeError(f'must be a number above 0, got {text!r}')
    return minutes


def _models(text: str) -> list[str]:
    names = [name.strip() for name in text.split(',')]
    for name in names:
        if name not in _MODELS:
            raise argparse.ArgumentTypeError(f'unknown model {name!r}, choose from {", ".join(_MODELS)}')
    return names


def _option(text: str) -> tuple[str, Any]:
    from timm_harmonic.small_data.training import option

    try:
        return option(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _lines(path: Path | None) -> list[str] | None:
    return path.read_text(encoding='utf-8').splitlines() if path else None


def _fitting(table: str, file: Path) -> str:
    """A table with a last line of text. On a narrower terminal that line alone, and which file has the table."""
    lines = table.splitlines()
    if not sys.stdout.isatty() or max(map(len, lines[:-1]), default=0) <= shutil.get_terminal_size().columns:
        return table
    return f'{lines[-1]}\nLayer by layer: {file}'


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS  # options that were not given stay absent: --export refuses the others
    add = parser.add_argument
    add('--seeds', type=_positive, metavar='N', help='runs per model (default: 3)')
    add('--epochs', type=_positive, metavar='N', help='epochs per run (default: 30)')
    per_class = 'training patches of each photograph (default: 10, at most 24)'
    add('--train-per-class', type=_positive, metavar='N', help=per_class)
    names = f'comma-separated, from {", ".join(_MODELS)} (default: all)'
    add('--models', type=_models, metavar='NAMES', help=names)
    out = 'folder for results.json and quickstart.png, which are overwritten (default: quickstart)'
    add('--out', type=Path, metavar='DIR', help=out)
    export = (
        'write the patches of the first seed as an image folder into DIR, new or empty, print a command of '
        "timm's train.py for it, and stop. Goes with --train-per-class only"
    )
    add('--export', type=Path, metavar='DIR', help=export)


def _quickstart(args: argparse.Namespace) -> None:
    """train a small network plain and harmonic on photographs, and compare

    Trains the same small ResNet as harm0 (nothing is harmonic), harm1 (only the stem is), harm (every
    k x k convolution is) and smooth (harm with smoothness 1) to say which photograph a patch of 48 x 48
    gray pixels is from. The photographs are in the packages scikit-image and scikit-learn: nothing is
    downloaded. Training patches are from the left half of each picture, test patches from the right half.
    Every seed draws new training patches, a new initialisation and a new order, the same for all models.
    Prints a table, and writes results.json and quickstart.png. Two minutes on two CPU cores. For example:

      timm-harmonic quickstart
      timm-harmonic quickstart --export patches
    """
    defaults = dict(seeds=3, epochs=30, train_per_class=10, models=list(_MODELS), out=Path('quickstart'))
    given = {name: value for name, value in vars(args).items() if name in defaults}
    if 'export' in args and (others := sorted(set(given) - {'train_per_class'})):
        args.parser.error(f'--export trains nothing, so it cannot be combined with --{others[0]}')

    from timm_harmonic.common import TimmHarmonicError
    from timm_harmonic_cli.quickstart import export, quickstart

    options = {**defaults, **given}
    try:
        if 'export' in args:
            export(args.export, options['train_per_class'])
        else:
            quickstart(**options)
    except TimmHarmonicError as error:
        args.parser.error(str(error))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        'folder', type=Path, metavar='DIR', help='image folder: train/ and validation/ or test/, or class folders alone'
    )
    models = "of harm0, harm1, harm, smooth, or of timm, with options as 'harm_resnet18:smoothness=1'"
    add(
        '--models',
        nargs='+',
        metavar='NAME',
        default=['harm0', 'harm', 'smooth'],
        help=f'{models} (default: harm0 harm smooth)',
    )
    add('--out', type=Path, default=Path('compare'), metavar='DIR', help='folder of the results (default: compare)')
    add('--trials', type=_positive, default=8, metavar='N', help='settings tried for each network (default: 8)')
    add('--seeds', type=_positive, default=5, metavar='N', help='runs of each network by its best setting (default: 5)')
    add('--epochs', type=_positive, default=60, metavar='N', help='epochs per run (default: 60)')
    add('--batch-size', type=_positive, default=32, metavar='N', help='images in a batch (default: 32)')
    augment = 'shift by an eighth, zoom (crops of 40 %% of the area and more) or none (default: shift)'
    add('--augment', choices=('shift', 'zoom', 'none'), default='shift', help=augment)
    add('--no-flip', dest='flip', action='store_false', help='do not mirror images, as for digits')
    add('--opt', choices=('adamw', 'momentum'), default='adamw', help="optimizer, by timm's name (default: adamw)")
    add('--img-size', type=_positive, metavar='N', help="side of the images (default: the images' own, 64 at most)")
    add('--time-limit', type=_minutes, metavar='MINUTES', help='try and train less, to be done in this time')
    add('--device', default='cpu', help='where to train (default: cpu)')
    add('--skip-bad', action='store_true', help='leave out files that cannot be read')


def _compare(args: argparse.Namespace) -> None:
    """train networks plain and harmonic on your own images, and compare

    Every network gets the same images, the same number of epochs and the same search: learning rate and
    weight decay are tried on splits of the training images, log-uniform at random (adamw: 0.0005 to 0.02
    and 0.001 to 1; momentum: 0.003 to 0.3 and 0.00001 to 0.01), the same for all. Then each is trained
    --seeds times on all training images with its best setting. Test images choose nothing: those of test/,
    else of validation/, else a quarter of each class. Where there are both, validation/ judges the
    settings. Reads whatever Pillow opens, TIFF with any bands or pages, and .npy (H, W, C). Prints a table,
    and writes results.json and compare.png. After an interruption the same command goes on where it was.
    For example:

      timm-harmonic compare images/ --augment zoom --time-limit 30
      timm-harmonic compare images/ --models resnet18 harm_resnet18:smoothness=1 --img-size 96
    """
    from timm_harmonic_cli.compare import compare

    options = {key: value for key, value in vars(args).items() if key not in _OWN}
    compare(**options)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help='a folder, local-dir:, hf-hub:, or a name of timm with --checkpoint')
    add('images', nargs='+', type=Path, metavar='IMAGES', help='files, or folders of them')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', type=Path, metavar='FILE', help="weights, as of timm's train.py")
    weights.add_argument('--pretrained', action='store_true', help='take the weights that timm has for it')
    add('--model-kwargs', nargs='+', type=_option, default=[], metavar='NAME=VALUE', help='options of the network')
    add('--class-names', type=Path, metavar='FILE', help='names of the classes in order, one per line')
    add('--topk', type=_positive, default=5, metavar='K', help='classes shown of each image (default: 5)')
    add('--format', choices=('table', 'csv', 'json'), default='table', help='of what is printed (default: table)')
    add('--out', type=Path, metavar='FILE', help='write it there rather than to the terminal')
    add('--batch-size', type=_positive, default=32, metavar='N', help='images in a batch (default: 32)')
    add('--device', metavar='DEVICE', help='where to run (default: cuda if there is one)')
    add('--skip-bad', action='store_true', help='leave out files that cannot be taken')


def _predict(args: argparse.Namespace) -> None:
    """say which classes images have, by a trained network

    Prepares images as in the validation of the network, and prints its likeliest classes with their
    probabilities, as a table, CSV or JSON. Reads whatever Pillow opens, TIFF with any bands, and .npy
    (H, W, C): integers of 8 and 16 bits are scaled to 0..1. For example:

      timm-harmonic predict FOLDER images/ --format csv --out classes.csv
    """
    from timm_harmonic.common.files import write_whole
    from timm_harmonic_cli.predict import predict, write_predictions

    given = ('checkpoint', 'pretrained', 'topk', 'batch_size', 'device', 'skip_bad')
    options = {key: getattr(args, key) for key in given}
    names = _lines(args.class_names)
    if args.out is not None and (args.out.is_dir() or not args.out.resolve().parent.is_dir()):
        raise ValueError(f'--out {args.out} must be a file in a folder that is there.')
    rows = predict(args.model, args.images, model_kwargs=dict(args.model_kwargs), class_names=names, **options)
    if args.out is None:
        write_predictions(rows, args.format)
        return

    def write(path: Path) -> None:
        with open(path, 'w', encoding='utf-8', errors='surrogateescape') as file:  # as names of files may be
            write_predictions(rows, args.format, file)

    write_whole(args.out, write)


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print JSON')


def _list(args: argparse.Namespace) -> None:
    """show the models and where their weights are

    For example:

      timm-harmonic list --json
    """
    from timm_harmonic_cli.list import print_inventory

    print_inventory(as_json=args.json)


def _add_compress(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help='any name that timm takes, hf-hub: and local-dir: included')
    add('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', type=Path, metavar='FILE', help='its weights: .pth, .pth.tar or .safetensors')
    weights.add_argument('--pretrained', action='store_true', help='take the weights that timm has for it')
    amount = parser.add_mutually_exclusive_group(required=True).add_argument
    amount('--level', type=_positive, metavar='L', help='keep the frequencies with i + j < L in every layer')
    amount('--energy', type=_share, metavar='E', help='keep this share of the energy of each layer')
    amount('--ratio', type=_share, metavar='R', help='keep this share of the cost: of all parameters, or see --cost')
    amount('--max-params', type=int, metavar='N', help='keep at most this many parameters')
    costs = 'what --ratio is of: parameters, multiply-adds, or the time of one image here (default: parameters)'
    add('--cost', choices=('parameters', 'macs', 'time'), default='parameters', help=costs)
    refit = 'fit what is kept to the outputs of the complete network on --data; it needs no labels'
    add('--refit', action='store_true', help=refit)
    deploy = 'write the plain network as deployed.onnx as well, checked, each layer in the form that is faster here'
    add('--deploy', action='store_true', help=deploy)
    add('--channels-last', action='store_true', help='run, time and deploy in this memory format')
    add('--device', metavar='DEVICE', help='where to run; times and forms are for it (default: cuda if there is one)')
    add('--workers', type=_natural, default=0, metavar='N', help='processes that read images (default: 0)')
    add(
        '--include', nargs='+', metavar='PATTERN', help="only these convolutions, as 'layer3.*' (default: all that can)"
    )
    add('--exclude', nargs='+', metavar='PATTERN', help='leave these convolutions plain')
    add('--normalization', default='l1', metavar='N', help="of the DCT functions: 'l1' or 'ortho' (default: l1)")
    smoothness = 'how much fine-tuning will favour smooth filters, from 0 to 10 (default: not)'
    add('--smoothness', type=float, metavar='S', help=smoothness)
    add('--model-kwargs', nargs='+', type=_option, default=[], metavar='NAME=VALUE', help='options of the network')
    add('--data', type=Path, metavar='DIR', help='image folder: weigh frequencies by what they change on its images')
    add('--batches', type=_positive, metavar='N', help='batches of --data (default: 8)')
    add('--batch-size', type=_positive, default=32, metavar='N', help='images in a batch (default: 32)')
    add('--evaluate', type=Path, metavar='DIR', help='image folder: measure accuracy before and after')
    add('--split', default='validation', help='split of --evaluate (default: validation)')
    add('--repo', default='', metavar='ORG/NAME', help='where you will publish it, for the card')
    add('--license', default='', metavar='ID', help="of the weights (default: the network's)")
    add('--img-size', type=_positive, metavar='N', help="side of the images (default: the network's)")
    add('--mean', type=float, nargs='+', metavar='M', help='of the images, one per channel')
    add('--std', type=float, nargs='+', metavar='S', help='of the images, one per channel')


def _compress(args: argparse.Namespace) -> None:
    """make any convolutional network of timm harmonic, and drop its high frequencies

    Makes the k x k convolutions of a network harmonic with the filters that they have, drops their high
    frequencies, and writes the folder of a Hub repository, which timm loads by local-dir:DIR. It holds a
    report (compression.md, compression.json) and a picture (compression.png) too. timm's --reparam gives
    the plain network from it, each layer in the form that the folder says. For example:

      timm-harmonic compress resnet18 --pretrained --ratio 0.6 --cost time --channels-last --data DIR --refit --out x
    """
    from timm_harmonic_cli.compress import accuracy_table, compress, deployed_table

    if args.level is not None and args.data and not args.refit:
        raise ValueError('--data is for --refit, --energy, --ratio and --max-params: with --level nothing is chosen.')
    own = (*_OWN, 'model', 'out', 'repo')
    options = {key: value for key, value in vars(args).items() if key not in own}
    images = {key: value for key in ('img_size', 'mean', 'std') if (value := options.pop(key)) is not None}
    options['model_kwargs'] = dict(args.model_kwargs)
    report = compress(args.model, args.out, repo_id=args.repo, data_config=images, **options)
    print(_fitting(str(report), args.out / 'compression.md'))
    record = json.loads((args.out / 'compression.json').read_text(encoding='utf-8'))
    for given, table in ((args.evaluate, accuracy_table), (args.deploy, deployed_table)):
        if given:
            print(f'\n{table(record)}')
    print(f'\nWrote {args.out}: timm.create_model("local-dir:{args.out}", pretrained=True)')


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', type=Path, metavar='CHECKPOINT', help='the file: .pth, .pth.tar or .safetensors')
    add('--model', required=True, metavar='NAME', help='architecture, see `timm-harmonic list`')
    add('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    add('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    repo = 'where you will publish it, for the card (default: the folder itself)'
    add('--repo', default='', metavar='ORG/NAME', help=repo)
    kwargs = 'options of the architecture, if no args.yaml has them'
    add('--model-kwargs', nargs='+', type=_option, default=[], metavar='NAME=VALUE', help=kwargs)
    add('--class-names', type=Path, metavar='FILE', help='names of the classes in order, one per line')
    add('--dataset', default='', metavar='ID', help='the training data on the Hub, for the card')
    add('--license', default='', metavar='ID', help="of the weights (default: the authors' for theirs, else none)")


def _convert(args: argparse.Namespace) -> None:
    """write the folder of a Hub repository from a checkpoint

    Writes model.safetensors, config.json and a model card from an authors' file or from a checkpoint of
    timm's train.py. args.yaml and summary.csv beside the checkpoint say how it was trained and go along.
    The folder is loaded again, and must give the outputs of the checkpoint on random images. For example:

      timm-harmonic convert output/train/RUN/model_best.pth.tar --model harm_resnet50 --out folder
    """
    from timm_harmonic.export.folder import convert

    names = _lines(args.class_names)
    about = dict(repo_id=args.repo, class_names=names, license=args.license, dataset=args.dataset)
    kwargs = dict(args.model_kwargs)
    files = convert(args.checkpoint, args.model, args.out, use_ema=args.use_ema, model_kwargs=kwargs, **about)
    print(f'{args.out} gives the outputs of {args.checkpoint}:')
    for path in files:
        print(f'  {path.name:<19} {path.stat().st_size:>13,} bytes')
    if any(path.name == 'train_hparams.yaml' for path in files):
        print("train_hparams.yaml holds the run's options and its paths: read it before you publish it.")


def _add_publish(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('folder', type=Path, metavar='DIR', help='the folder')
    add('--repo', required=True, metavar='ORG/NAME', help='repository, made if there is none')
    add('--private', action='store_true', help='make a new repository private')
    add('--revision', metavar='R', help='branch, made if there is none (default: main)')
    add('--dry-run', action='store_true', help='check everything, upload nothing')
    add('--create-pr', action='store_true', help='open a pull request')
    add('--force', action='store_true', help='replace other files of the same name')


def _publish(args: argparse.Namespace) -> None:
    """upload such a folder to the Hugging Face Hub

    Checks a folder that `convert` or `compress` wrote, and uploads it in one commit. Log in by `hf auth login`.
    For example:

      timm-harmonic publish folder --repo ORG/NAME --private
    """
    from timm_harmonic.export.publish import publish
    from timm_harmonic.models.download import WEIGHTS_NAME, sha256_of

    options = {key: getattr(args, key) for key in ('private', 'revision', 'create_pr', 'dry_run', 'force')}
    url = publish(args.folder, args.repo, **options)
    print(f'{url} (dry run: nothing was uploaded)' if args.dry_run else url)
    print(f'to pin it, a note in the config of the model: sha256:{sha256_of(args.folder / WEIGHTS_NAME)}')


_COMMANDS = {
    'quickstart': (_quickstart, _add_quickstart),
    'compare': (_compare, _add_compare),
    'predict': (_predict, _add_predict),
    'list': (_list, _add_list),
    'compress': (_compress, _add_compress),
    'convert': (_convert, _add_convert),
    'publish': (_publish, _add_publish),
}


def _parser() -> argparse.ArgumentParser:
    """The parser. A command's help is the docstring of the function that runs it."""
    parser = argparse.ArgumentParser(prog='timm-harmonic', description='Harmonic networks as timm models.')
    parser.add_argument('--version', action='version', version=f'timm-harmonic {version("timm-harmonic")}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    style = argparse.RawDescriptionHelpFormatter
    for name, (run, add_options) in _COMMANDS.items():
        line, _, description = (inspect.getdoc(run) or '').partition('\n\n')
        command = commands.add_parser(name, help=line, description=description, formatter_class=style)
        add_options(command)
        command.add_argument('--quiet', action='store_true', default=False, help='show no progress')
        command.set_defaults(run=run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0, 1 after an error, or 130 after Ctrl-C. Bad arguments exit with 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # where the terminal has no ±, a ? is better than an error
    try:
        args = _parser().parse_args(argv)
        if args.quiet or not sys.stderr.isatty():
            os.environ.setdefault('TQDM_DISABLE', '1')  # progress is for people: tqdm reads this when it is imported
        args.run(args)
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        return 130
    except Exception as error:
        from timm_harmonic.common import TimmHarmonicError  # not above: help and usage errors do not wait for torch

        if not isinstance(error, TimmHarmonicError):
            raise
        print(f'timm-harmonic: error: {error}', file=sys.stderr)
        return 1
    return 0
