"""Make a network harmonic and drop its high frequencies.

Makes the k x k convolutions of any convolutional network of timm harmonic, with the filters they have,
drops their high frequencies, and writes a folder that timm loads by local-dir:DIR. The folder also has a
report (compression.md, compression.json) and, with matplotlib, a picture (compression.png). timm's --reparam
makes the plain network from it, each layer in the form that the folder records. Example:

  timm-harmonic compress resnet18 --pretrained --ratio 0.6 --cost time --channels-last --data DIR --refit --out x
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

from . import add_batch_size, add_preparation, add_weights, positive, preparation, share

_ONNX, _PICTURE = 'deployed.onnx', 'compression.png'
_DEPLOYED = dict(
    bytes=('ONNX file, bytes', ',d'),
    parameters=('parameters', ',d'),
    macs=('multiply-adds', ',d'),
    torch_ms=('torch, ms', '.3g'),
    onnx_ms=('ONNX Runtime on the CPU, ms', '.3g'),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    add = parser.add_argument
    add('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    amount = parser.add_mutually_exclusive_group(required=True).add_argument
    amount('--level', type=positive, metavar='L', help='keep the frequencies with i + j < L in every layer')
    amount('--energy', type=share, metavar='E', help='keep this share of the energy of each layer')
    amount('--ratio', type=share, metavar='R', help='keep this share of the parameters, or of what --cost names')
    costs = 'what --ratio counts: parameters, multiply-adds, or the time of one image here (default: parameters)'
    add('--cost', choices=('parameters', 'macs', 'time'), default='parameters', help=costs)
    data = 'image folder (labels are ignored): weigh frequencies by how much they change the outputs on its images'
    add('--data', type=Path, metavar='DIR', help=data)
    add('--batches', type=positive, default=8, metavar='N', help='batches drawn from --data (default: 8)')
    refit = 'fit the remaining coefficients to the outputs of the complete network on --data'
    add('--refit', action='store_true', help=refit)
    add('--evaluate', type=Path, metavar='DIR', help='image folder: measure accuracy before and after')
    add('--split', default='validation', help='split of --evaluate (default: validation)')
    deploy = 'also write the plain network as deployed.onnx, checked, each layer in the form that is faster here'
    add('--deploy', action='store_true', help=deploy)
    runtime = 'where times and forms are measured, onnxruntime on the CPU in float32 (default: torch)'
    add('--runtime', choices=('torch', 'onnxruntime'), default='torch', help=runtime)
    add('--channels-last', action='store_true', help='run, time and deploy in this memory format')
    device = 'device to run on; times and forms are chosen for it (default: cuda if available)'
    add('--device', metavar='DEVICE', help=device)
    add_batch_size(parser)
    include = "only these convolutions, as in 'layer3.*' (default: all that can be harmonic)"
    add('--include', nargs='+', metavar='PATTERN', help=include)
    add('--exclude', nargs='+', metavar='PATTERN', help='leave these convolutions plain')
    add('--normalization', default='l1', metavar='N', help="of the DCT functions: 'l1' or 'ortho' (default: l1)")
    smoothness = 'how much fine-tuning will favour smooth filters, from 0 to 10 (default: off)'
    add('--smoothness', type=float, metavar='S', help=smoothness)
    add('--repo', default='', metavar='ORG/NAME', help='repository you will upload to, for the card')
    add('--license', default='', metavar='ID', help="of the weights (default: the network's)")
    add_preparation(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes a network harmonic, truncates it, writes a folder, and returns what compression.json holds.

    Multiply-adds and times are those of one random image.
    """
    import importlib.util
    import json
    import tempfile
    from importlib.metadata import version

    import timm
    import torch
    from timm.models import reparameterize_model

    from timm_harmonic import deploy, harmonic_report, harmonize, truncate
    from timm_harmonic.common import InputError, explained, require
    from timm_harmonic.common.device import usable_device
    from timm_harmonic.common.files import check_new, write_text
    from timm_harmonic.common.images import ImageFolder, Preparation, batches_of
    from timm_harmonic.common.progress import progress
    from timm_harmonic.conversion.costs import forms_by_time, set_forms
    from timm_harmonic.conversion.harmonize import record_options
    from timm_harmonic.conversion.report import draw_truncation
    from timm_harmonic.conversion.timing import check_runtime
    from timm_harmonic.export.folder import STEPS, load_network, next_step, write_folder
    from timm_harmonic.export.onnx import export_checked, measured

    _check_options(args)
    check_new(args.out)
    place = usable_device(args.device)
    check_runtime(args.runtime)
    if args.deploy:
        require(onnx='onnx', onnxruntime='onnxruntime', onnxscript='onnxscript')

    def draw(folder: Path, small: Any) -> None:
        if importlib.util.find_spec('matplotlib') is not None:
            with explained(f'matplotlib cannot draw {_PICTURE}', Exception):
                draw_truncation(folder / _PICTURE, whole, small, args.refit)

    with progress(total=9, desc='build', **STEPS) as steps, tempfile.TemporaryDirectory() as temporary:
        weights = (args.model, args.checkpoint, args.pretrained, args.model_kwargs)
        source, plain = load_network(*weights, use_ema=args.use_ema, random_weights=True)
        next_step(steps, 'harmonize')
        basis = dict(normalization=args.normalization, smoothness=args.smoothness)
        whole = harmonize(plain, include=args.include, exclude=args.exclude, **basis)
        prepare = Preparation(whole, {**source.run, **preparation(args)})
        example = torch.randn(1, *prepare.config['input_size'])
        license = args.license or plain.pretrained_cfg.get('license') or ''
        about: dict[str, Any] = dict(repo_id=args.repo, license=license, data_config=prepare.config)
        # What cannot be written should fail now, not after minutes of work.
        write_folder(whole, args.out, source, steps, add=lambda folder: draw(folder, whole), keep=False, **about)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        whole.to(place).to(memory_format=layout)
        example = example.to(place, memory_format=layout)
        networks = {}
        if args.deploy:
            networks['plain'] = (deploy(whole, form='dense'), Path(temporary, _ONNX))
            export_checked(networks['plain'][0], example, networks['plain'][1])
        accuracy = {}
        if args.evaluate is not None:
            judging = ImageFolder(args.evaluate, args.split, prepare)
            if len(judging.classes) != whole.num_classes:
                raise InputError(f'{args.evaluate} has {len(judging.classes)} classes, not {whole.num_classes}.')
            loader = batches_of(judging, args.batch_size)
            accuracy['before'] = _evaluate(whole, loader, place)
        next_step(steps, 'truncate')
        images = None
        if args.data is not None:
            drawn = batches_of(ImageFolder(args.data, 'train', prepare), args.batch_size, args.batches)
            images = progress(drawn, desc='weigh', unit='batch', leave=False)
        counted = None if args.cost == 'parameters' else example
        extra = dict(parameters=[], macs=['cost'], time=['cost', 'runtime'])[args.cost]
        chosen = ('level', 'energy', 'ratio', *extra)
        amount: dict[str, Any] = {key: value for key in chosen if (value := getattr(args, key)) is not None}
        small = truncate(whole, **amount, images=counted, data=images, refit=args.refit)
        if args.deploy and args.cost != 'time':  # by time, truncate has chosen the forms
            set_forms(small, forms_by_time(small, example, args.runtime))
            record_options(small)
        next_step(steps, 'evaluate')
        if args.evaluate is not None:
            accuracy['after'] = _evaluate(small, loader, place)
        report = harmonic_report(small, example)
        drawn_images = f'outputs on {args.batches} batches of {args.batch_size} images'
        where = f'torch, {place.type}, {str(layout)[6:]}' if args.runtime == 'torch' else 'ONNX Runtime on the CPU'
        record: dict[str, Any] = dict(
            timm_harmonic=version('timm-harmonic'),
            torch=torch.__version__,
            timm=timm.__version__,
            source=source.file or source.base,
            options=amount | (dict(refit=True) if args.refit else {}),
            weighed_by='filters' if args.data is None else drawn_images,
            timed=f'one image in {where}, {torch.get_num_threads()} threads',
            accuracy=accuracy,
            report=report.to_dict(),
        )
        fast = reparameterize_model(small.eval()) if args.deploy else None
        failures: list[Exception] = []

        def add_report(folder: Path) -> None:
            if fast is not None:
                try:
                    export_checked(fast, example, folder / _ONNX)
                    record['deployed'] = measured(networks | {'compressed': (fast, folder / _ONNX)}, example)
                except Exception as error:  # the rest took minutes and is worth keeping
                    (folder / _ONNX).unlink(missing_ok=True)
                    failures.append(error)
            write_text(folder / 'compression.json', json.dumps(record, indent=1) + '\n')
            write_text(folder / 'compression.md', _page(record, report))
            draw(folder, small)

        write_folder(small.cpu(), args.out, source, steps, add=add_report, **about)
    print('\n\n'.join([report.summary(), *_tables(record)]))
    print(f'\nWrote {args.out}, layer by layer in {args.out / "compression.md"}. To load it:')
    print(f'timm.create_model("local-dir:{args.out}", pretrained=True)')
    if args.cost == 'macs' and 'deployed' in record:
        plain_macs, reached = (record['deployed'][name]['macs'] for name in ('plain', 'compressed'))
        if reached > 1.02 * args.ratio * plain_macs:
            warnings.warn(
                f'{_ONNX} has {reached / plain_macs:.2f} of the multiply-adds, not {args.ratio:g}, as some dense forms '
                'are faster here. To compress for this device, use --cost time.',
                stacklevel=2,
            )
    if failures:
        raise InputError(f'{failures[0]} The folder {args.out} is complete but for that.')
    return record


def _check_options(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other, or a folder of images does not exist."""
    from timm_harmonic.common import InputError

    if args.refit and args.data is None:
        raise InputError('--refit needs --data, an image folder. Labels are ignored.')
    if args.level is not None and args.data is not None and not args.refit:
        raise InputError('--data is for --refit, --energy and --ratio: with --level nothing is chosen.')
    if args.cost != 'parameters' and args.ratio is None:
        raise InputError('--cost needs --ratio, the share of the cost to keep.')
    if (args.model_kwargs or {}).get('features_only'):
        raise InputError('compress writes complete networks: pass features_only to timm.create_model later.')
    for folder in (args.data, args.evaluate):
        if folder is not None and not folder.is_dir():
            raise InputError(f'{str(folder)!r} is not an image folder.')


def _evaluate(network: Any, batches: Any, device: Any) -> dict[str, float]:
    """Accuracies in percent."""
    import torch
    from timm.utils import AverageMeter, accuracy

    from timm_harmonic.common.progress import progress

    network.eval()
    meters = {k: AverageMeter() for k in (1, 5) if k <= network.num_classes}
    with torch.inference_mode():
        for images, labels in progress(batches, desc='evaluate', unit='batch', leave=False):
            found = accuracy(network(images.to(device)), labels.to(device), topk=tuple(meters))
            for meter, value in zip(meters.values(), found, strict=True):
                meter.update(value.item(), len(labels))
    return {f'top{k}': meter.avg for k, meter in meters.items()}


def _tables(record: dict[str, Any]) -> list[str]:
    """What was measured, in Markdown: accuracies, and the deployed network."""
    found = []
    if record['accuracy']:
        before, after = (record['accuracy'][when] for when in ('before', 'after'))
        rows = [f'| {k} | {v:.2f} | {after[k]:.2f} |' for k, v in before.items()]
        found.append('\n'.join(['| accuracy, %, measured | before | after |', '|---|---|---|', *rows]))
    if 'deployed' in record:
        plain, small = (record['deployed'][name] for name in ('plain', 'compressed'))
        rows = [
            f'| {title} | {plain[key]:{form}} | {small[key]:{form}} | {small[key] / plain[key]:.2f} |'
            for key, (title, form) in _DEPLOYED.items()
        ]
        head = ['| deployed, measured here | plain | compressed | ratio |', '|---|---|---|---|']
        found.append('\n'.join([*head, *rows]))
    return found


def _page(record: dict[str, Any], report: Any) -> str:
    """compression.md: what was done, what was measured, and the report."""
    options = ', '.join(f'{key}={value}' for key, value in record['options'].items())
    before = ' Energy kept: before refitting.' * ('refit' in record['options'])
    about = (
        f'Weights: {record["source"]}. {options}; frequencies weighed by {record["weighed_by"]}. Multiply-adds are for '
        f'one image; milliseconds were measured here, for {record["timed"]}. No fine-tuning.{before}'
    )
    return '\n\n'.join([f'# Compression of {report.model}', about, *_tables(record), report.to_markdown()])
