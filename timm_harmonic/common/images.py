"""Images as networks take them: one scale and one preparation for every command, as in timm's validation."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from . import InputError, TimmHarmonicError, explained
from .folders import classes_of, image_files, split_folder
from .readers import READABLE, read_image

_NOTE = 'scale: '  # how the note in a network's config begins that holds it
_MODES = {1: 'L', 3: 'RGB'}  # Pillow's modes by number of channels: what timm's transform takes
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in gray, as in Pillow
_FAR, _FLAT = 5.0, 0.02  # deviations of training: a larger mean or deviation, or a smaller deviation, is strange


class DepthError(TimmHarmonicError, ValueError):
    """Images of different depths, or of a depth without a known scale. No InputError: it is not of one file alone."""


def unreadable(bad: Sequence[str]) -> InputError:
    """The error for files that cannot be read, each given as 'path: reason'."""
    shown = '\n  '.join([*bad[:10], *[f'and {len(bad) - 10} more'] * (len(bad) > 10)])
    return InputError(f'{len(bad)} files cannot be read; pass --skip-bad to leave them out:\n  {shown}')


def scale_note(scale: float) -> str:
    """The note in a network's config that says which value of its images stands for 1."""
    return f'{_NOTE}{scale!r}'


def noted_scale(notes: str | Sequence[str] | None) -> float | None:
    """The scale in a config's notes, see `scale_note`; None without one. Raises InputError if it is not above 0."""
    found = [note for note in ([notes] if isinstance(notes, str) else notes or ()) if note.startswith(_NOTE)]
    if not found:
        return None
    with explained(f'the config has the note {found[0]!r}', ValueError):
        return check_scale(float(found[0].removeprefix(_NOTE)))


def check_scale(scale: float) -> float:
    """Returns a scale. Raises InputError unless it is a finite number above 0."""
    if not isinstance(scale, (int, float)) or not 0 < scale < np.inf:
        raise InputError(f'scale must be a number above 0, got {scale!r}.')
    return scale


def scale_of(dtype: np.dtype, scale: float | None = None) -> float:
    """The value of images that stands for 1: as stated, else the largest of 8 or 16 bits. Or raises DepthError."""
    if scale is not None:
        return check_scale(scale)
    if dtype.kind in 'iu' and dtype.itemsize <= 2:
        return float(np.iinfo(dtype).max)
    raise DepthError(f'holds {dtype}: state the value of full scale by --scale, as --scale 1 for values from 0 to 1.')


def data_config(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """timm's data config of a network, with a mean and deviation for each of its channels, and its `scale`.

    `given` has options by timm's names, for instance a training run's, and the scale. A mean for another number of
    channels is averaged. Raises InputError if the given values make no sense or do not fit the channels.
    """
    for key, bound in (('mean', -np.inf), ('std', 0)):
        if (values := given.get(key)) is None:
            continue
        if not all(isinstance(value, (int, float)) and bound < value < np.inf for value in values):
            raise InputError(f'{key} must be finite numbers{" above 0" * (key == "std")}, got {values!r}.')
        if len(values) not in (1, model.in_chans):
            found = f'{key} has {len(values)} values, the network takes {model.in_chans} channels'
            raise InputError(f'{found}: give one value, or one for each channel.')
    with explained("the network's config does not say how to prepare images", Exception):
        config = resolve_data_config(dict(given, in_chans=model.in_chans), model=model)
        config['input_size'] = (model.in_chans, *config['input_size'][1:])
        for key in ('mean', 'std'):
            if len(config[key]) != model.in_chans:
                config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
        scale = given.get('scale')
        config['scale'] = noted_scale(model.pretrained_cfg.get('notes')) if scale is None else check_scale(scale)
    return config


class Preparation:
    """Prepares images as a network's validation does: scale, resize, crop, normalise.

    8-bit gray and colour images for networks of one or three channels go through timm's transform. All others are
    scaled (`scale_of`), then every channel goes through timm's resizing and cropping, and is normalised. All have one
    depth. Instead of a network and options that replace those of its config, a `data_config` will do. With
    `warns`, the first image that is unlike training or deeper than 8 bits without a stated scale is a warning.
    """

    def __init__(
        self, network: nn.Module | dict[str, Any], given: dict[str, Any] | None = None, warns: bool = True
    ) -> None:
        config = network if isinstance(network, dict) else data_config(network, given or {})
        self.config, self.scale, self._warns = config, config['scale'], warns
        self.channels: int = config['input_size'][0]
        self._first: tuple[str, Path] | None = None  # the depth of all images, and one that has it
        with explained("the network's config does not say how to prepare images", Exception):
            ours = {key: value for key, value in config.items() if key != 'scale'}
            self._transform = create_transform(**ours, is_training=False)
            size = (1, *config['input_size'][1:])
            self._planes = [  # a border is filled with the channel's mean
                create_transform(**{**ours, 'input_size': size, 'mean': (mean,), 'std': (1.0,)}, normalize=False)
                for mean in config['mean']
            ]
            self.mean, self.std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
            for dtype in (np.uint8, np.int16):  # some mistakes only show when a transform is used
                self(np.zeros((8, 8, self.channels), dtype))

    def __call__(self, array: np.ndarray) -> Tensor:
        """Prepares pixels (H, W, C) as an image (C, H, W). Raises InputError if the channels do not fit."""
        given = array.shape[2]
        if array.dtype == np.uint8 and self.scale is None and {given, self.channels} <= _MODES.keys():
            picture = Image.fromarray(array[..., 0] if given == 1 else array)
            return self._transform(picture.convert(_MODES[self.channels]))
        # Planes of 0 to 255, in which timm fills borders.
        factor = 255 / scale_of(array.dtype, self.scale)
        if not float(np.abs(array, dtype=np.float64).max()) * factor < float(np.finfo(np.float32).max):
            raise InputError(f'holds values that are too large for a scale of {255 / factor:g}')
        values = (array * factor).astype(np.float32)
        if (given, self.channels) == (1, 3):
            values = values.repeat(3, 2)
        elif (given, self.channels) == (3, 1):
            values = values @ np.array(_LUMA, np.float32)[:, None]
        elif given != self.channels:
            raise InputError(f'the image has {given} channels, the network takes {self.channels}')
        image = torch.cat([plane(Image.fromarray(values[..., i])) for i, plane in enumerate(self._planes)])
        if self.scale is None:  # interpolation may leave the range of the type, which 8 bits cut off
            image = image.clamp(-255.0 if array.dtype.kind == 'i' else 0.0, 255.0)
        return (image / 255 - self.mean) / self.std

    def read(self, path: Path) -> Tensor:
        """Reads and prepares a file. Raises DepthError if its depth is not that of the files before, and InputError."""
        array = read_image(path)
        depth = 'floating point' if array.dtype.kind == 'f' else str(array.dtype)
        self._first = self._first or (depth, path)
        if depth != self._first[0]:
            both = f'{self._first[1]} holds {self._first[0]}, {path} holds {depth}'
            raise DepthError(f'{both}: images must have one depth. Store all of them alike.')
        try:
            image = self(array)
        except DepthError as error:
            raise DepthError(f'{path} {error}') from error
        if self._warns and self.scale is None and array.dtype != np.uint8:
            self._warns = False
            warnings.warn(
                f'{path} holds {array.dtype} and was divided by {scale_of(array.dtype):g}. The network does not state '
                "the scale of its images, and timm's scripts read 8 bits alone: state it by --scale.",
                stacklevel=2,
            )
        if self._warns:
            self._warns = not warned(path, image, self.config, scale_of(array.dtype, self.scale))
        return image


def warned(path: Path, image: Tensor, config: dict[str, Any], scale: float) -> bool:
    """Warns if a normalised image (C, H, W) has a mean or deviation that training images hardly have; returns if so."""
    means, deviations = image.mean((1, 2)), image.std((1, 2), correction=0)
    if max(means.abs().max(), deviations.max()) <= _FAR and deviations.max() >= _FLAT:
        return False
    worst = int(means.abs().argmax())
    mean, std = (f'{config[key][worst]:.4g}' for key in ('mean', 'std'))
    warnings.warn(
        f'{path} is not like the training images: divided by {scale:g}, less the mean {mean}, divided by the deviation '
        f'{std}, channel {worst} has a mean of {means[worst]:.2g} and a deviation of {deviations[worst]:.2g} instead '
        'of about 0 and 1. Are scale, mean and deviation those of training?',
        stacklevel=2,
    )
    return True


class ImageFolder(Dataset):
    """Prepared images of one split of a folder, with their class numbers: timm's files, classes and order."""

    def __init__(self, folder: Path, split: str, prepare: Preparation) -> None:
        root = split_folder(folder, split)
        self.prepare = prepare
        self.files = [path for path in image_files(root) if path.suffix.lower() in READABLE]
        if not self.files:
            raise InputError(f'no images in {str(root)!r}.')
        self.classes, self.labels = classes_of(self.files, root)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.prepare.read(self.files[index]), self.labels[index]
        except InputError as error:
            raise InputError(f'{self.files[index]}: {error}') from error


def batches_of(images: ImageFolder, size: int, drawn: slice | None = None) -> DataLoader:
    """Loads an image folder in batches: all in order, or a part of them in a random order that is always the same."""
    order = list(range(len(images)))
    if drawn is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[drawn].tolist()
    return DataLoader(Subset(images, order), size)
