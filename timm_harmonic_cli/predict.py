"""Classify images with a trained network.

Prepares images as the network's validation does, and prints its likeliest classes with their
probabilities, as a table, CSV or JSON. Reads whatever Pillow opens, TIFF with any bands, and .npy
(H, W, C). Integers of 8 and 16 bits are divided by the largest value of their type unless the
network or --scale says otherwise. Example:

  timm-harmonic predict FOLDER images/ --format csv --out classes.csv
"""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from . import PREPARATION, add_shared, add_weights, positive, preparation, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    add = parser.add_argument
    add('images', nargs='+', type=Path, metavar='IMAGES', help='files, or folders of files')
    add('--topk', type=positive, default=5, metavar='K', help='classes shown for each image (default: 5)')
    add('--format', choices=('table', 'csv', 'json'), default='table', help='output format (default: table)')
    add('--out', type=Path, metavar='FILE', help='file to write (default: the terminal)')
    add('--device', metavar='DEVICE', help='device to run on (default: cuda if available)')
    add_shared(parser, '--class-names', *PREPARATION, '--batch-size', '--skip-bad')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes and returns a row for each image: its file and its likeliest classes with probabilities, or an `error`."""
    from timm_harmonic.common import InputError
    from timm_harmonic.common.device import usable_device
    from timm_harmonic.common.files import write_text, write_whole
    from timm_harmonic.common.folders import image_files
    from timm_harmonic.common.images import Preparation, unreadable
    from timm_harmonic.common.progress import progress
    from timm_harmonic.export.folder import load_network

    out = args.out
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise InputError(f'--out {out} must be a file in an existing folder.')
    source, network = load_network(args.model, args.checkpoint, args.pretrained, args.model_kwargs, args.use_ema)
    classes = getattr(network, 'num_classes', 0)
    if not classes:
        raise InputError(f'{args.model} has no classifier.')
    names = list(args.class_names or _label_names(network) or map(str, range(classes)))
    if len(names) != classes:
        raise InputError(f'got {len(names)} class names for {classes} classes.')
    for path in args.images:
        if not path.exists():
            raise InputError(f'{str(path)!r} does not exist.')
    files = [file for path in args.images for file in (image_files(path) if path.is_dir() else [path])]
    if not files:
        raise InputError(f'no files in {", ".join(map(str, args.images))}.')
    network.to(usable_device(args.device))
    prepare = Preparation(network, {**source.run, **preparation(args)})
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], Any]] = []
    for path in progress(files, unit='image', leave=False):
        rows.append(dict(file=str(path)))
        try:
            waiting.append((rows[-1], prepare.read(path)))
        except InputError as error:
            rows[-1]['error'] = str(error)
        if len(waiting) == args.batch_size or (waiting and path is files[-1]):
            _classify(network, waiting, names, args.topk)
            waiting = []
    bad = [f'{row["file"]}: {row["error"]}' for row in rows if 'error' in row]
    if bad and not args.skip_bad:
        raise unreadable(bad)
    if out is None:
        write_predictions(rows, args.format, sys.stdout)
    else:
        text = io.StringIO()
        write_predictions(rows, args.format, text)
        write_whole(out, lambda path: write_text(path, text.getvalue()))
    return rows


def _label_names(network: Any) -> list[str]:
    from timm_harmonic.common import InputError

    names = network.pretrained_cfg.get('label_names') or []
    texts = [name for name in names if isinstance(name, str) and name.encode(errors='ignore').decode() == name]
    if not isinstance(names, (list, tuple)) or texts != list(names):
        raise InputError("label_names in the network's config is not a list of names: pass --class-names FILE.")
    return list(names)


def _classify(network: Any, waiting: list[tuple[dict[str, Any], Any]], names: Sequence[str], topk: int) -> None:
    """Adds the likeliest classes to the rows."""
    import torch

    from timm_harmonic.common import explained

    images = torch.stack([image for _, image in waiting]).to(next(network.parameters()).device)
    with torch.inference_mode(), explained(f'the network cannot run on images of shape {(*images.shape,)}', Exception):
        found = network(images).float().softmax(-1).topk(min(topk, len(names)))
    for (row, _), values, indices in zip(waiting, found.values.tolist(), found.indices.tolist(), strict=True):
        if any(map(math.isnan, values)):
            row['error'] = 'the network outputs NaN'
            continue
        row['classes'] = [dict(name=names[i], probability=value) for value, i in zip(values, indices, strict=True)]


def write_predictions(rows: list[dict[str, Any]], form: str, file: TextIO) -> None:
    import csv
    import json

    from rich.table import Table

    if form == 'json':
        file.write(json.dumps(rows, indent=1) + '\n')
        return
    if form == 'csv':
        number = max((len(row.get('classes', ())) for row in rows), default=0)
        writer = csv.writer(file, lineterminator='\n')
        pairs = [f'{what}_{i + 1}' for i in range(number) for what in ('class', 'probability')]
        writer.writerow(['file', *pairs, 'error'])
        for row in rows:
            cells = [cell for of in row.get('classes', ()) for cell in (of['name'], f'{of["probability"]:.6f}')]
            writer.writerow([row['file'], *cells, *[''] * (2 * number - len(cells)), row.get('error', '')])
        return
    table = Table('file', 'classes')
    for row in rows:
        classes = ', '.join(f'{of["name"]} {of["probability"]:.1%}' for of in row.get('classes', ()))
        table.add_row(row['file'], classes or f'left out: {row["error"]}')
    show(table, file)
