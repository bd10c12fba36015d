"""Tasks with few images: which photograph of scikit-image or scikit-learn a patch is from, and a user's folder."""

import dataclasses
import importlib.util
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common import InputError
from ..common.files import new_folder
from ..common.folders import classes_of, image_files, natural_order, split_folders
from ..common.images import Preparation, scale_of, unreadable, warned
from ..common.progress import progress
from ..common.readers import READABLE, read_image

# Package and path of each photograph; the file name is the class name. Left out: pictures of text, drawings,
# silhouettes, and the second half of a stereo pair.
_SKIMAGE = (
    'astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png '
    'hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg'
)
PHOTOGRAPHS = (
    *(('skimage', f'data/{file}') for file in _SKIMAGE.split()),
    *(('sklearn', f'datasets/images/{file}') for file in ('china.jpg', 'flower.jpg')),
)
PATCH_SIZE = 48  # pixels
TEST_PER_CLASS = 24  # as many as the half of the smallest picture holds
_MIN_CONTRAST = 2  # standard deviation in gray levels of 255: leaves out the black border of the retina
_LARGEST = 64  # pixels of a side, unless the user asks for another size
_TEST_SHARE = 0.25  # of each class, in a folder without splits


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in memory: pixels (N, C, H, W) and labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> 'Images':
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str) -> 'Images':
        """The images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


def normalised(splits: dict[str, Images]) -> tuple[dict[str, Images], Tensor, Tensor]:
    """Splits normalised by the training images, whose mean and deviation (C,) follow. No channel may be constant."""
    wide = splits['train'].pixels.double()  # large values overflow float32 when summed
    mean, std = wide.mean((0, 2, 3)).float(), wide.std((0, 2, 3)).float()
    if (std == 0).any():
        raise InputError(f'channel {int((std == 0).nonzero()[0])} is constant in all training images: leave it out.')
    shift, scale = mean[:, None, None], std[:, None, None]
    return {split: Images((of.pixels - shift) / scale, of.labels) for split, of in splits.items()}, mean, std


def load_photographs() -> dict[str, np.ndarray]:
    """Reads the photographs as gray levels (H, W), uint8, by class name in alphabetical order.

    In colour some would be too easy to tell apart. Raises InputError naming a package or a picture that is missing.
    """
    paths = {Path(path).stem: path_of(package, path) for package, path in PHOTOGRAPHS}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise InputError(f'missing pictures, which scikit-image 0.26 and scikit-learn 1.9 have: {", ".join(missing)}')
    return {name: np.asarray(Image.open(paths[name]).convert('L')) for name in sorted(paths)}


def path_of(package: str, path: str) -> Path:
    """Path of a file in an installed package. Raises InputError if the package is missing."""
    spec = importlib.util.find_spec(package)  # an import may take seconds
    if spec is None or spec.origin is None:
        raise InputError(f'the package {package} is missing: pip install scikit-image scikit-learn')
    return Path(spec.origin).parent / path


def cut(picture: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """The patch (PATCH_SIZE, PATCH_SIZE) of a picture (H, W) at a corner (top, left)."""
    top, left = corner
    return picture[top : top + PATCH_SIZE, left : left + PATCH_SIZE]


def draw_patches(
    photographs: dict[str, np.ndarray], split: str, count: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Draws `count` disjoint patches of each picture at random; returns their corners (top, left) in pixels.

    The split is 'train' (left halves) or 'validation' (right halves). Nearly uniform patches are left out. Raises
    InputError if a picture has too few others.
    """
    chosen = {}
    for name, picture in photographs.items():
        height, width = picture.shape
        start, stop = (0, width // 2) if split == 'train' else (width // 2, width)
        tops, lefts = range(0, height - PATCH_SIZE + 1, PATCH_SIZE), range(start, stop - PATCH_SIZE + 1, PATCH_SIZE)
        corners = [place for place in itertools.product(tops, lefts) if cut(picture, place).std() >= _MIN_CONTRAST]
        if count > len(corners):
            raise InputError(f'{name} has only {len(corners)} {split} patches, not {count}: lower --train-per-class.')
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(corners))
        chosen[name] = [corners[i] for i in order[:count]]
    return chosen


def export_patches(folder: Path, photographs: dict[str, np.ndarray], train_per_class: int) -> dict[str, int]:
    """Writes the patches of seed 0 as SPLIT/CLASS/TOP_LEFT.png in a new folder. Returns their numbers by split."""
    counts = dict(train=train_per_class, validation=TEST_PER_CLASS)
    with new_folder(folder) as partial:
        for split, count in counts.items():
            for name, corners in draw_patches(photographs, split, count).items():
                Path(partial, split, name).mkdir(parents=True)
                for top, left in corners:
                    patch = Image.fromarray(cut(photographs[name], (top, left)))
                    patch.save(Path(partial, split, name, f'{top:04d}_{left:04d}.png'))
    return {split: count * len(photographs) for split, count in counts.items()}


def patches(
    photographs: dict[str, np.ndarray], train_per_class: int, seed: int, test_per_class: int = TEST_PER_CLASS
) -> tuple[Images, Images]:
    """The training and test patches of a seed, normalised by the statistics of the training patches."""
    splits = {}
    for split, count in (('train', train_per_class), ('validation', test_per_class)):
        corners = draw_patches(photographs, split, count, seed)
        cuts = [cut(photographs[name], corner) for name, of in corners.items() for corner in of]
        labels = [label for label, of in enumerate(corners.values()) for _ in of]
        splits[split] = Images(torch.from_numpy(np.stack(cuts)).float().unsqueeze(1), torch.tensor(labels))
    ready, _, _ = normalised(splits)
    return ready['train'], ready['validation']


@dataclasses.dataclass(frozen=True)
class Task:
    """What networks are compared on: images of each split, normalised by the training images."""

    classes: list[str]
    train: Images
    test: Images | None  # without them, each seed holds out its own
    validation: Images | None
    config: dict[str, Any]  # how the images were prepared, see `common.images.data_config`
    skipped: list[str]  # unreadable files, and why
    notes: list[str]  # what was done to images that a reader of the results should know

    def draw(self, seed: int) -> tuple[Images, Images]:
        """Training and test images of a seed, which without a test split holds out its own quarter of each class."""
        if self.test is not None:
            return self.train, self.test
        kept, out = stratified(self.train.labels, _TEST_SHARE, seed, self.classes)
        ready, _, _ = normalised({'train': self.train[kept], 'test': self.train[out]})
        return ready['train'], ready['test']


def read_folder(
    folder: Path, size: int | None = None, skip_bad: bool = False, but: Path | None = None, scale: float | None = None
) -> Task:
    """Reads an image folder: train/ and validation/ or test/ with a folder for each class, or class folders alone.

    Images are prepared as in a network's validation: the shorter side is resized to `size` pixels, by default the
    median shorter side, at most 64, and the centre is cut. `scale` is the value that stands for 1. Gray and colour
    images together are read as what most of them are. Test images are those of test/, or else of validation/, or else
    none, see `Task.draw`. The folder `but` is left out, and unreadable files are with `skip_bad`. Raises InputError if
    the folder has another structure, or its images cannot be used.
    """
    files = {split: _labelled(path, but) for split, path in _splits(folder).items()}
    classes = sorted({name for of_split in files.values() for name in of_split.values()}, key=natural_order)
    if len(classes) < 2:
        raise InputError(f'{str(folder)!r} has {len(classes) or "no"} class with images: two are needed.')
    for split, of_split in files.items():
        if lacking := [name for name in classes if name not in of_split.values()]:
            raise InputError(f'{split} of {str(folder)!r} has no images of {", ".join(lacking)}.')
    shapes: dict[Path, tuple[int, ...]] = {}
    dtype = np.dtype(np.uint8)
    bad: list[str] = []
    for path in progress([path for of_split in files.values() for path in of_split], desc='look', leave=False):
        try:
            array = read_image(path)
            shapes[path], dtype = array.shape, array.dtype
        except InputError as error:
            bad.append(f'{path.relative_to(folder)}: {error}')
    if bad and not skip_bad:
        raise unreadable(bad)
    notes: list[str] = []
    channels = _common_channels(shapes, folder, notes)
    shorter = int(np.median([min(shape[:2]) for shape in shapes.values()] or [1]))
    side = size or min(_LARGEST, shorter)
    if size is None and side < shorter:
        notes.append(f'Images were shrunk from {shorter} to {side} pixels (median shorter side): see --img-size.')
    how: dict[str, Any] = dict(input_size=(channels, side, side), interpolation='bilinear', crop_pct=1.0)
    how |= dict(crop_mode='center', mean=(0.0,) * channels, std=(1.0,) * channels, scale=scale)
    prepare = Preparation(how, warns=False)
    if dtype != np.uint8 or channels not in (1, 3):
        notes.append("timm's train.py cannot read these images: use --keep, or a training loop of your own.")
    splits: dict[str, Images] = {}
    paths: dict[str, list[Path]] = {}
    for split, of_split in files.items():
        paths[split] = [path for path in of_split if path in shapes]
        labels = [classes.index(of_split[path]) for path in paths[split]]
        if lost := [name for label, name in enumerate(classes) if label not in labels]:
            raise InputError(f'{split} has no readable images of {", ".join(lost)}.')
        pixels = [prepare.read(path) for path in progress(paths[split], desc=f'read {split}', leave=False)]
        splits[split] = Images(torch.stack(pixels), torch.tensor(labels))
    if 'test' not in splits and 'validation' in splits:
        splits['test'], paths['test'] = splits.pop('validation'), paths.pop('validation')
    ready, mean, std = normalised(splits)
    how |= dict(mean=mean.tolist(), std=std.tolist())
    if dtype != np.uint8:
        how['scale'] = scale_of(dtype, scale)  # networks that do not state one have seen 8 bits
    for split, of_part in ready.items():  # at most one warning for each
        any(warned(*of, how, scale_of(dtype, scale)) for of in zip(paths[split], of_part.pixels, strict=True))
    task = Task(classes, ready['train'], ready.get('test'), ready.get('validation'), how, bad, notes)
    if task.validation is None:
        stratified(task.draw(0)[0].labels, _TEST_SHARE, 0, classes)  # the search will split them: fail early
    return task


def _common_channels(shapes: dict[Path, tuple[int, ...]], folder: Path, notes: list[str]) -> int:
    """The number of channels that all images are read with: what most have, of gray and colour."""
    counts = Counter(shape[2] for shape in shapes.values())
    if len(counts) < 2:
        return next(iter(counts), 1)
    if counts.keys() != {1, 3}:
        examples = {shape[2]: path.relative_to(folder) for path, shape in shapes.items()}
        found = ', '.join(f'{path} has {count}' for count, path in sorted(examples.items()))
        raise InputError(f'images must have the same number of channels: {found}.')
    few, most, channels = ('colour', 'gray', 1) if counts[1] > counts[3] else ('gray', 'colour', 3)
    notes.append(f'{min(counts.values())} of {counts.total()} images are {few} and were read as {most}.')
    return channels


def _splits(folder: Path) -> dict[str, Path]:
    """Folders of the splits, each with a folder for each class. Without train/ the folder itself is 'train'."""
    if not folder.is_dir():
        raise InputError(f'{str(folder)!r} is not a folder.')
    found = split_folders(folder)
    if not found:
        return {'train': folder}
    given = ' and '.join(f'{path.name}/' for path in found.values())
    if 'train' not in found:
        raise InputError(f'{str(folder)!r} has {given}, but no train/.')
    if len(found) == 1:
        raise InputError(f'{str(folder)!r} has {given}, but neither validation/ nor test/.')
    return found


def _labelled(root: Path, but: Path | None) -> dict[Path, str]:
    """Files below a folder with the names of their classes, as in timm; those in the folder `but` are left out."""
    files = [path for path in image_files(root) if but is None or not path.resolve().is_relative_to(but.resolve())]
    classes, labels = classes_of(files, root)
    found = {path: classes[label] for path, label in zip(files, labels, strict=True)}
    for path, name in found.items():
        if not name and path.suffix.lower() in READABLE:
            raise InputError(f'{path} lies beside the class folders: move it into one, or remove it.')
    return {path: name for path, name in found.items() if name}


def stratified(labels: Tensor, share: float, seed: int, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Splits each class at random: indices of most images, and of about `share` of them, at least one.

    Raises InputError if a class has a single image.
    """
    random = np.random.default_rng(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(classes):
        own = np.flatnonzero(labels.numpy() == label)
        if len(own) < 2:
            raise InputError(f'class {name} has {len(own)} image to learn from: at least two are needed.')
        held_out[random.permutation(own)[: max(1, round(share * len(own)))]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
