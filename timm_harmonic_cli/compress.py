"""Make a network harmonic and drop its high frequencies.

Makes the k x k convolutions of any convolutional network of timm harmonic, with the filters they have,
drops their high frequencies, and writes a folder that timm loads by local-dir:DIR. The folder also has a
report (compression.md, compression.json) and, with matplotlib, a picture (compression.png). timm's --reparam
makes the plain network from it, each layer in the form that the folder records. Example:

  timm-harmonic compress resnet18 --pretrained --ratio 0.6 --cost time --channels-last --data DIR --refit --out x
"""

import argparse
from pathlib import Path
from typing import Any

from . import PREPARATION, add_shared, add_weights, positive, preparation, share

_ONNX, _INT8, _PICTURE = 'deployed.onnx', 'deployed-int8.onnx', 'compression.png'
_COLUMNS = dict(  # of the table of ONNX files: title, factor and format
    bytes=('file, MB', 1e-6, '.1f'),
    top1=('top1, %', 1, '.2f'),
    onnx_ms=('ONNX Runtime, ms', 1, '.3g'),
    of_plain=('of plain', 1, '.2f'),
    agreement=('class as plain, %', 100, '.1f'),
    error=('error', 1, '.3f'),
    torch_ms=('torch, ms', 1, '.3g'),
    macs=('multiply-adds', 1, ',d'),
)
_CALIBRATING = 64  # images at most for the ranges of 8 bits, a quarter of them held out
_POINTS, _SAME = 1.0, 0.95  # what a file may lose to be recommended: accuracy, or equal classes if labels are unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    add = parser.add_argument
    add('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    amount = parser.add_mutually_exclusive_group(required=True).add_argument
    amount('--level', type=positive, metavar='L', help='keep the frequencies with i + j < L in every layer')
    amount('--energy', type=share, metavar='E', help='keep this share of the energy of each layer')
    amount('--ratio', type=share, metavar='R', help='keep this share of the parameters, or of what --cost names')
    per = 'what has functions of its own; channel and mixture (of channels) need --data and --refit (default: layer)'
    add('--per', choices=('layer', 'channel', 'mixture'), default='layer', help=per)
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
    int8 = 'also write it in 8 bits, as deployed-int8.onnx, calibrated on --data; --ratio 1 does nothing else'
    add('--int8', action='store_true', help=int8)
    runtime = 'where times and forms are measured, onnxruntime on the CPU in float32 (default with --int8; else torch)'
    add('--runtime', choices=('torch', 'onnxruntime'), help=runtime)
    add('--channels-last', action='store_true', help='run, time and deploy in this memory format')
    device = 'device to run on; times and forms are chosen for it (default: cuda if available)'
    add('--device', metavar='DEVICE', help=device)
    include = "only these convolutions, as in 'layer3.*' (default: all that can be harmonic)"
    add('--include', nargs='+', metavar='PATTERN', help=include)
    add('--exclude', nargs='+', metavar='PATTERN', help='leave these convolutions plain')
    add('--normalization', default='l1', metavar='N', help="of the DCT functions: 'l1' or 'ortho' (default: l1)")
    smoothness = 'how much fine-tuning will favour smooth filters, from 0 to 10 (default: off)'
    add('--smoothness', type=float, metavar='S', help=smoothness)
    add('--license', default='', metavar='ID', help="of the weights (default: the network's)")
    add_shared(parser, '--batch-size', *PREPARATION, '--repo')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes a network harmonic, truncates it, writes a folder, and returns what compression.json holds.

    Multiply-adds and times are those of one random image.
    """
    import importlib.util
    import json
    import shutil
    import tempfile
    from importlib.metadata import version

    import timm
    import torch
    from timm.models import reparameterize_model

    from timm_harmonic import deploy, harmonic_report, harmonize, truncate
    from timm_harmonic.common import InputError, explained
    from timm_harmonic.common.device import dot_products, usable_device
    from timm_harmonic.common.files import check_new, write_text
    from timm_harmonic.common.images import ImageFolder, Preparation, batches_of
    from timm_harmonic.common.onnx import onnx_session
    from timm_harmonic.common.progress import progress
    from timm_harmonic.conversion.costs import forms_by_time, set_forms
    from timm_harmonic.conversion.harmonize import record_options
    from timm_harmonic.conversion.report import draw_truncation
    from timm_harmonic.conversion.timing import check_runtime
    from timm_harmonic.export.folder import STEPS, load_network, next_step, write_folder
    from timm_harmonic.export.onnx import export_onnx, measured

    _check_options(args)
    check_new(args.out)
    place = usable_device(args.device)
    args.runtime = args.runtime or ('onnxruntime' if args.int8 else 'torch')
    check_runtime('onnxruntime' if args.deploy else args.runtime)

    def draw(folder: Path, network: Any) -> None:
        if importlib.util.find_spec('matplotlib') is not None:
            with explained(f'matplotlib cannot draw {_PICTURE}', Exception):
                draw_truncation(folder / _PICTURE, network)

    with progress(total=9, desc='build', **STEPS) as steps, tempfile.TemporaryDirectory() as temporary:
        weights = (args.model, args.checkpoint, args.pretrained, args.model_kwargs, args.use_ema)
        source, plain = load_network(*weights, random_weights=True)
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
        data = held_out = None
        if args.data is not None:
            folder = ImageFolder(args.data, 'train', prepare)
            count = min(args.batches * args.batch_size, len(folder) * (3 if args.int8 else 4) // 4)
            data = batches_of(folder, args.batch_size, slice(count))
        if args.int8:
            calibrating = list(batches_of(folder, args.batch_size, slice(min(count, _CALIBRATING))))
            unseen = slice(count, count + -(-count // 3))
            held_out = torch.cat([images for images, _ in batches_of(folder, args.batch_size, unseen)])
        files: dict[str, Path] = {}
        networks: dict[str, Any] = {}

        def export(name: str, network: Any) -> None:
            folder, networks[name] = Path(temporary, name), network
            folder.mkdir(exist_ok=True)
            kinds = {name: (_ONNX, None)} | ({f'{name}, int8': (_INT8, calibrating)} if args.int8 else {})
            for row, (file, batches) in kinds.items():
                files[row] = folder / file
                export_onnx(network, example, files[row], int8=batches)

        if args.deploy:
            export('plain', deploy(whole, form='dense'))
        accuracy = {}
        if args.evaluate is not None:
            judging = ImageFolder(args.evaluate, args.split, prepare)
            if len(judging.classes) != whole.num_classes:
                raise InputError(f'{args.evaluate} has {len(judging.classes)} classes, not {whole.num_classes}.')
            loader = batches_of(judging, args.batch_size)
            accuracy['before'] = _evaluate(whole.eval(), whole.num_classes, loader, place)
        next_step(steps, 'truncate')
        weighs = data is not None and args.ratio != 1 and (args.refit or args.level is None)
        images = progress(data, desc='weigh', unit='batch', leave=False) if weighs else None
        counted = None if args.cost == 'parameters' else example
        extra = dict(parameters=[], macs=['cost'], time=['cost', 'runtime'])[args.cost]
        chosen = ('level', 'energy', 'ratio', *(['per'] if args.per != 'layer' else []), *extra)
        amount: dict[str, Any] = {key: value for key in chosen if (value := getattr(args, key)) is not None}
        small = truncate(whole, **amount, images=counted, data=images, refit=args.refit and weighs)
        if args.deploy and args.cost != 'time':  # by time, truncate has chosen the forms
            set_forms(small, forms_by_time(small, example, args.runtime))
            record_options(small)
        next_step(steps, 'evaluate')
        if args.evaluate is not None:
            accuracy['after'] = _evaluate(small.eval(), small.num_classes, loader, place)
        report = harmonic_report(small, example)
        where = f'torch, {place.type}, {str(layout)[6:]}' if args.runtime == 'torch' else 'ONNX Runtime on the CPU'
        record: dict[str, Any] = dict(
            timm_harmonic=version('timm-harmonic'),
            torch=torch.__version__,
            timm=timm.__version__,
            source=source.file or source.base,
            options=amount | (dict(refit=True) if args.refit else {}),
            weighed_by=f'outputs on {args.batches} batches of {args.batch_size} images' if weighs else 'filters',
            timed=f'one image in {where}, {torch.get_num_threads()} threads',
            dot_products=dot_products(),
            accuracy=accuracy,
            report=report.to_dict(),
        )
        failure: Exception | None = None
        name = 'plain' if args.ratio == 1 else 'compressed'
        if args.deploy:
            try:
                export(name, reparameterize_model(small.eval()))
                rows = measured(files, networks, example, held_out)
                if accuracy:
                    rows['plain']['top1'], rows[name]['top1'] = (accuracy[k]['top1'] for k in ('before', 'after'))
                    for row in files.keys() - {'plain', name}:
                        with onnx_session(files[row]) as session:
                            rows[row]['top1'] = _evaluate(session, whole.num_classes, loader, 'cpu')['top1']
                record['deployed'] = rows
            except Exception as error:  # the rest took minutes and is worth keeping
                failure = error

        def add_report(folder: Path) -> None:
            if 'deployed' in record:
                shutil.copytree(Path(temporary, name), folder, dirs_exist_ok=True)
            write_text(folder / 'compression.json', json.dumps(record, indent=1) + '\n')
            write_text(folder / 'compression.md', _page(record, report))
            draw(folder, small)

        write_folder(small.cpu(), args.out, source, steps, add=add_report, **about)
    print('\n\n'.join([report.summary(), *_tables(record)]))
    print(f'\nWrote {args.out}, layer by layer in {args.out / "compression.md"}. To load it:')
    print(f'timm.create_model("local-dir:{args.out}", pretrained=True)')
    if failure is not None:
        raise InputError(f'{failure} The folder {args.out} is complete but for that.')
    return record


def _check_options(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other, or a folder of images does not exist."""
    from timm_harmonic.common import InputError

    if args.refit and args.data is None:
        raise InputError('--refit needs --data, an image folder. Labels are ignored.')
    if args.int8 and not (args.deploy and args.data):
        raise InputError('--int8 needs --deploy, and --data, an image folder, for the ranges. Labels are ignored.')
    if args.level is not None and args.data is not None and not (args.refit or args.int8):
        raise InputError('--data is for --refit, --int8, --energy and --ratio: with --level nothing is chosen.')
    if (args.cost != 'parameters' or args.per == 'mixture') and args.ratio is None:
        raise InputError('--cost and --per mixture need --ratio, the share of the cost to keep.')
    if args.per != 'layer' and (args.level is not None or not args.refit):
        raise InputError(f'--per {args.per} needs --ratio or --energy, and --data with --refit: else it loses much.')
    if (args.model_kwargs or {}).get('features_only'):
        raise InputError('compress writes complete networks: pass features_only to timm.create_model later.')
    for folder in (args.data, args.evaluate):
        if folder is not None and not folder.is_dir():
            raise InputError(f'{str(folder)!r} is not an image folder.')


def _evaluate(run: Any, classes: int, batches: Any, device: Any) -> dict[str, float]:
    """Accuracies of a function in percent."""
    import torch
    from timm.utils import AverageMeter, accuracy

    from timm_harmonic.common.progress import progress

    meters = {k: AverageMeter() for k in (1, 5) if k <= classes}
    with torch.inference_mode():
        for images, labels in progress(batches, desc='evaluate', unit='batch', leave=False):
            found = accuracy(run(images.to(device)), labels.to(device), topk=tuple(meters))
            for meter, value in zip(meters.values(), found, strict=True):
                meter.update(value.item(), len(labels))
    return {f'top{k}': meter.avg for k, meter in meters.items()}


def _tables(record: dict[str, Any]) -> list[str]:
    """What was measured, in Markdown: accuracies, and the ONNX files with the one to take."""
    found = []
    if record['accuracy']:
        before, after = (record['accuracy'][when] for when in ('before', 'after'))
        both = (f'{k} {v:.2f} % before, {after[k]:.2f} % after' for k, v in before.items())
        found.append(f'Accuracy, measured: {"; ".join(both)}.')
    if files := record.get('deployed'):
        columns = {key: column for key, column in _COLUMNS.items() if key in files['plain']}
        lines = [
            ['deployed, measured here', *(title for title, _, _ in columns.values())],
            ['---'] * (1 + len(columns)),
        ]
        for name, of in files.items():
            cells = [f'{factor * of[key]:{form}}' if key in of else '' for key, (_, factor, form) in columns.items()]
            lines.append([name, *cells])
        found.append('\n'.join(f'| {" | ".join(line)} |' for line in lines))
        if 'plain, int8' in files:
            found.append(_advice(files, record['dot_products']))
    return found


def _advice(files: dict[str, dict[str, Any]], dot_products: bool | None) -> str:
    """Says which ONNX file to take: the fastest of those that lose little."""
    plain = files['plain']
    key, least, words = 'agreement', _SAME, f'agrees with plain on {_SAME:.0%} of images'
    if 'top1' in plain:
        key, least, words = 'top1', plain['top1'] - _POINTS, f'loses at most {_POINTS:g} point of accuracy'
    name = min((name for name in files if files[name][key] >= least), key=lambda name: files[name]['onnx_ms'])
    best, file = files[name], _INT8 if name.endswith('int8') else _ONNX
    missing = ', which `--ratio 1 --int8` writes' * ('compressed' in files and name.startswith('plain'))
    hint = ' This processor has no 8-bit dot products; on one that has, 8 bits are faster.' * (dot_products is False)
    size = best['bytes'] / plain['bytes']
    return (
        f'Take {name} (`{file}`{missing}): {best["of_plain"]:.2f} of the time and {size:.2f} of the size of plain, the '
        f'fastest file that {words}.{hint}'
    )


def _page(record: dict[str, Any], report: Any) -> str:
    """compression.md: what was done, what was measured, and the report."""
    options = ', '.join(f'{key}={value}' for key, value in record['options'].items())
    before = ' Energy kept: before refitting.' * ('refit' in record['options'])
    about = (
        f'Weights: {record["source"]}. {options}; frequencies weighed by {record["weighed_by"]}. Multiply-adds are for '
        f'one image; milliseconds were measured here, for {record["timed"]}. No fine-tuning.{before}'
    )
    return '\n\n'.join([f'# Compression of {report.model}', about, *_tables(record), report.to_markdown()])
