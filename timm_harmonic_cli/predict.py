"""Classes of new images by a trained network: `timm-harmonic predict`."""

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from timm_harmonic.common import InputError, first_line
from timm_harmonic.common.device import usable_device
from timm_harmonic.common.images import MODES, data_config
from timm_harmonic.common.progress import progress
from timm_harmonic.export.folder import build_loaded, create_trained, read_source
from timm_harmonic.small_data.tasks import files_in, read_image, unreadable


def predict(
    model_name: str,
    paths: Sequence[Path],
    *,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    topk: int = 5,
    batch_size: int = 32,
    device: str | None = None,
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """The likeliest classes of images, a row for each: its file, and classes with their probabilities.

    Options are those of `timm-harmonic predict`. Raises InputError if files are no images, or have other channels than
    the network, unless they are to be skipped: then their row has an `error`. ValueError if the names of the classes
    are not as many as the network has.
    """
    model = _load(model_name, checkpoint, pretrained, model_kwargs or {})
    if not getattr(model, 'num_classes', 0):
        raise InputError(f'{model_name} has no classes to predict: it gives features.')
    names = list(class_names or _label_names(model) or map(str, range(model.num_classes)))
    if len(names) != model.num_classes:
        raise InputError(f'there are {len(names)} names of classes, the network has {model.num_classes} classes.')
    files = list(_files(paths))
    if not files:
        raise InputError(f'no files in {", ".join(map(str, paths))}.')
    model.to(usable_device(device))
    prepare = Preparation(model)
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], Tensor]] = []
    for path in progress(files, unit='image', leave=False):
        row: dict[str, Any] = dict(file=str(path))
        rows.append(row)
        try:
            waiting.append((row, prepare(path)))
        except InputError as error:
            row['error'] = str(error)
        if len(waiting) == batch_size or (waiting and path is files[-1]):
            _classify(model, waiting, names, topk)
            waiting = []
    bad = [f'{row["file"]}: {row["error"]}' for row in rows if 'error' in row]
    if bad and not skip_bad:
        raise unreadable(bad)
    return rows


def _load(model_name: str, checkpoint: Path | None, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """The network, in evaluation. A folder may be named without local-dir:."""
    if Path(model_name).is_dir():
        model_name = f'local-dir:{model_name}'
    if checkpoint is None:
        if ':' not in model_name and not pretrained:
            raise InputError(f'{model_name} needs weights: pass --checkpoint FILE or --pretrained.')
        return create_trained(model_name, **kwargs)
    source, state = read_source(checkpoint, model_name)
    model = build_loaded(model_name, state, source, kwargs)
    model.pretrained_cfg.update(data_config(model, source.run))  # as the run prepared its images
    return model


def _label_names(model: nn.Module) -> list[str]:
    names = model.pretrained_cfg.get('label_names') or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError('label_names in the config of the network are no list of names: pass --class-names FILE.')
    return list(names)


class Preparation:
    """What is done to a file before a network sees it, as in its validation.

    Pictures go through timm's transform. Arrays of .npy and TIFF, and images of other channels, are scaled to 0..1 if
    they hold integers of 8 or 16 bits, resized and cut alike, and normalised by the network's mean and deviation.
    Raises InputError if the network's config says nothing that can be done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.channels: int = model.in_chans
        try:
            self.config = data_config(model, {})
            self.transform = create_transform(**self.config, is_training=False) if self.channels in MODES else None
            self.prepared(np.zeros((8, 8, self.channels), np.uint8))
        except Exception as error:  # a stranger's config may hold anything
            raise InputError(
                'images cannot be prepared as the config of the network says: '
                f'{type(error).__name__}: {first_line(error)}'
            ) from error

    def __call__(self, path: Path) -> Tensor:
        """An image (C, H, W). Raises InputError if the file is none, or has other channels."""
        return self.prepared(read_image(path))

    def prepared(self, array: np.ndarray) -> Tensor:
        """The same of pixels (H, W, C)."""
        if self.transform is not None and array.dtype == np.uint8 and array.shape[2] in MODES:
            picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
            return self.transform(picture.convert(MODES[self.channels]))
        if array.shape[2] != self.channels:
            raise InputError(f'it has {array.shape[2]} channels, the network takes {self.channels}')
        short = array.dtype.kind in 'iu' and array.dtype.itemsize <= 2
        scale = np.iinfo(array.dtype).max if short else 1
        image = torch.from_numpy(array.astype(np.float32) / scale).permute(2, 0, 1)
        height, width = self.config['input_size'][1:]
        shorter = int(min(height, width) / self.config['crop_pct'])
        image = functional.center_crop(functional.resize(image, [shorter], antialias=True), [height, width])
        mean, std = (torch.tensor(self.config[key])[:, None, None] for key in ('mean', 'std'))
        return (image - mean) / std


@torch.inference_mode()
def _classify(model: nn.Module, waiting: list[tuple[dict[str, Any], Tensor]], names: Sequence[str], topk: int) -> None:
    """Adds the likeliest classes to the rows."""
    images = torch.stack([image for _, image in waiting]).to(next(model.parameters()).device)
    found = model(images).float().softmax(-1).topk(min(topk, len(names)))
    for (row, _), values, indices in zip(waiting, found.values.tolist(), found.indices.tolist(), strict=True):
        if any(map(math.isnan, values)):
            row['error'] = 'the network gives NaN for it'
            continue
        row['classes'] = [dict(name=names[i], probability=value) for value, i in zip(values, indices, strict=True)]


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """Files, and those in folders at any depth; hidden ones are left out there. Raises InputError if one is missing."""
    for path in paths:
        if path.is_dir():
            yield from files_in(path)
        elif path.exists():
            yield path
        else:
            raise InputError(f'{str(path)!r} does not exist.')


def write_predictions(rows: list[dict[str, Any]], form: str, file: TextIO | None = None) -> None:
    """Writes rows as a table, CSV or JSON, to a file or to standard output."""
    out = file or sys.stdout
    if form == 'json':
        out.write(json.dumps(rows, indent=1) + '\n')
        return
    number = max((len(row.get('classes', ())) for row in rows), default=0)
    if form == 'csv':
        writer = csv.writer(out, lineterminator='\n')
        pairs = [f'{what}_{i + 1}' for i in range(number) for what in ('class', 'probability')]
        writer.writerow(['file', *pairs, 'error'])
        for row in rows:
            cells = [cell for of in row.get('classes', ()) for cell in (of['name'], f'{of["probability"]:.6f}')]
            writer.writerow([row['file'], *cells, *[''] * (2 * number - len(cells)), row.get('error', '')])
        return
    table = Table()
    table.add_column('file', overflow='fold')
    table.add_column('classes', overflow='fold')
    for row in rows:
        classes = ', '.join(f'{of["name"]} {of["probability"]:.1%}' for of in row.get('classes', ()))
        table.add_row(row['file'], classes or f'left out: {row["error"]}')
    Console(file=out, highlight=False, markup=False, emoji=False).print(table)
