"""Images: one reader, one preparation and one order of folders for every command."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional

from . import InputError, explained

# Names that folders of a split may have: timm's, and those of test images.
SPLITS = {
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}
_MODES = {1: 'L', 3: 'RGB'}  # Pillow's modes by number of channels: what timm's transform takes
_TIFF = ('.tif', '.tiff')
_SCALE = 'scale: '  # how a note in a network's config begins


def read_image(path: Path) -> np.ndarray:
    """Reads an image as (H, W, C), with the file's own values and type.

    Gray images have one channel, an alpha channel is dropped, and TIFF files keep all bands and pages as channels.
    Raises InputError if the file is not an image, or holds values that are not finite in float32.
    """
    try:
        if path.suffix.lower() == '.npy':
            array = np.load(path, allow_pickle=False)
        elif path.suffix.lower() in _TIFF:
            array = _read_tiff(path)
        else:
            array = _read_picture(path)
    except InputError:
        raise
    except Exception as error:  # readers raise anything for a damaged file
        raise InputError(str(error) or type(error).__name__) from error
    if not isinstance(array, np.ndarray):
        raise InputError('holds several arrays: save each to its own file')
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in 'buif':
        raise InputError(f'expected numbers of shape (H, W) or (H, W, C), got {array.dtype} of shape {array.shape}')
    with np.errstate(over='ignore'):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise InputError('holds values that are not finite in float32')
    return array


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode in ('1', 'LA', 'La'):
            return np.asarray(image.convert('L'))
        if image.mode.startswith(('I', 'F', 'L')):  # gray, 8 to 32 bits
            return np.asarray(image)
        return np.asarray(image.convert('RGB'))


def _read_tiff(path: Path) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise InputError('TIFF files need a package: pip install tifffile') from error
    try:
        with tifffile.TiffFile(path) as file:
            if file.pages.first.photometric == tifffile.PHOTOMETRIC.PALETTE:
                return _read_picture(path)  # tifffile gives indices into the palette
            series = file.series[0]
            array, axes = series.asarray(), series.axes
    except ValueError as error:
        if 'imagecodecs' in str(error):  # a compression that Pillow may know
            return _read_picture(path)
        raise
    array = np.moveaxis(array, (axes.index('Y'), axes.index('X')), (0, 1))
    return array.reshape(*array.shape[:2], -1)  # samples, pages and planes become channels


def unreadable(bad: Sequence[str]) -> InputError:
    """The error for files that cannot be read, each given as 'path: reason'."""
    shown = '\n  '.join([*bad[:10], *[f'and {len(bad) - 10} more'] * (len(bad) > 10)])
    return InputError(f'{len(bad)} files cannot be read; pass --skip-bad to leave them out:\n  {shown}')


def scaled(array: np.ndarray) -> Tensor:
    """Pixels (H, W, C) as a float32 image (C, H, W).

    Only this function decides the scale: integers of up to 16 bits are divided by the maximum of their type, everything
    else keeps its values.
    """
    short = array.dtype.kind in 'iu' and array.dtype.itemsize <= 2
    scale = np.iinfo(array.dtype).max if short else 1
    return torch.from_numpy(array.astype(np.float32) / scale).permute(2, 0, 1)


def resized(image: Tensor, side: int, crop: Sequence[int] | None = None) -> Tensor:
    """Resizes the shorter side of an image (C, H, W), then cuts its centre to (H, W) = `crop`."""
    image = functional.resize(image, [side], antialias=True)
    return image if crop is None else functional.center_crop(image, list(crop))


def data_config(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """timm's data config of a network, with one mean and deviation for each channel that the network takes.

    `given` has options by timm's names (img_size, mean, std, ...), for instance a training run's. If the network's
    config has a mean and deviation for another number of channels, every channel gets their average. Raises InputError
    if the given ones do not fit the channels.
    """
    for key in ('mean', 'std'):
        if given.get(key) is not None and len(given[key]) not in (1, model.in_chans):
            raise InputError(
                f'{key} has {len(given[key])} values, the network takes {model.in_chans} channels: give one value, or '
                'one for each channel.'
            )
    config = resolve_data_config(dict(given, in_chans=model.in_chans), model=model)
    config['input_size'] = (model.in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
    return config


class Preparation:
    """Prepares images as a network's validation does: scale, resize, crop, normalise.

    8-bit gray and colour images for networks of one or three channels go through timm's transform. All others are
    scaled, resized (bilinear), cut in the centre and normalised channel by channel. `given` are options by timm's names
    that replace those of the network's config, see `data_config`. Raises InputError if they do not fit the network, or
    its config makes no sense.
    """

    def __init__(self, model: nn.Module, given: dict[str, Any] | None = None) -> None:
        with explained("the network's config does not say how to prepare images", Exception):
            self.config = data_config(model, given or {})
            self.channels: int = self.config['input_size'][0]
            self._transform = create_transform(**self.config, is_training=False)
            self(np.zeros((8, 8, self.channels), np.uint8))  # some mistakes only show when a transform is used

    def __call__(self, array: np.ndarray) -> Tensor:
        """Prepares pixels (H, W, C) as an image (C, H, W). Raises InputError if the channels do not fit."""
        if array.dtype == np.uint8 and {array.shape[2], self.channels} <= _MODES.keys():
            picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
            return self._transform(picture.convert(_MODES[self.channels]))
        if array.shape[2] != self.channels:
            raise InputError(f'the image has {array.shape[2]} channels, the network takes {self.channels}')
        height, width = self.config['input_size'][1:]
        image = resized(scaled(array), int(min(height, width) / self.config['crop_pct']), (height, width))
        mean, std = (torch.tensor(self.config[key])[:, None, None] for key in ('mean', 'std'))
        return (image - mean) / std


def scale_note(scale: float) -> str:
    """The note in a network's config that says which value of its images stands for 1."""
    return f'{_SCALE}{scale!r}'


def noted_scale(notes: str | Sequence[str] | None) -> float | None:
    """The scale in a config's notes, see `scale_note`; None without one. Raises InputError if it is not above 0."""
    found = [note for note in ([notes] if isinstance(notes, str) else notes or ()) if note.startswith(_SCALE)]
    if not found:
        return None
    with explained(f'the config has the note {found[0]!r}', ValueError):
        return check_scale(float(found[0].removeprefix(_SCALE)))


def check_scale(scale: float) -> float:
    """Returns a scale. Raises InputError unless it is a finite number above 0."""
    if not 0 < scale < np.inf:
        raise InputError(f'scale must be a number above 0, got {scale!r}.')
    return scale


def natural_order(name: str | Path) -> tuple[list[int | str], str]:
    """Sort key with timm's order of files and classes: numbers by value, letters in any case."""
    parts = re.split(r'(\d+)', str(name).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


def image_files(folder: Path) -> list[Path]:
    """Files in a folder at any depth, in timm's order. Follows links, and leaves hidden files and folders out."""
    found: list[Path] = []

    def wanted(place: str, name: str) -> bool:  # a link to a folder above would never end
        return not name.startswith('.') and not Path(place).resolve().is_relative_to(Path(place, name).resolve())

    def fail(error: OSError) -> None:
        raise error

    with explained(f'cannot list {str(folder)!r}', OSError):
        for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
            folders[:] = [name for name in folders if wanted(place, name)]
            found += [Path(place, name) for name in files if not name.startswith('.')]
    return sorted(found, key=natural_order)


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, by any of its names as timm finds it, or the folder itself if there is none."""
    names = next((names for names in SPLITS.values() if split in names), ())
    return next((path for name in (split, *names) if (path := folder / name).is_dir()), folder)


class ImageFolder(Dataset):
    """Prepared images of one split of a folder, with their class numbers: timm's files, classes and order.

    An image's class is the name of the folder that holds it; `classes` are the names in order.
    """

    def __init__(self, folder: Path, split: str, prepare: Preparation) -> None:
        root = split_folder(folder, split)
        known = {'.npy', *Image.registered_extensions()}
        self.prepare = prepare
        self.files = [path for path in image_files(root) if path.suffix.lower() in known]
        if not self.files:
            raise InputError(f'no images in {str(root)!r}.')
        names = ['' if path.parent == root else path.parent.name for path in self.files]
        self.classes = sorted(set(names), key=natural_order)
        self.labels = [self.classes.index(name) for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.prepare(read_image(self.files[index])), self.labels[index]
        except InputError as error:
            raise InputError(f'{self.files[index]}: {error}') from error


def batches_of(images: ImageFolder, size: int, count: int | None = None) -> DataLoader:
    """Loads an image folder in batches: in order, or `count` batches drawn at random, always the same ones."""
    order = list(range(len(images)))
    if count is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: count * size].tolist()
    return DataLoader(Subset(images, order), size)
