"""A small data set without a download: patches of the photographs in the wheels of scikit-image and scikit-learn.

The task is to say which photograph a patch is from. Training patches are from the left half of each picture, test
patches from the right half.
"""

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import get_img_extensions
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..common import InputError
from ..common.files import new_folder
from ..common.progress import progress

# Package and path of each picture. The name of the file is the name of the class. Left out: pictures of text, drawings,
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
_TEST_SEED = 0
_MIN_CONTRAST = 2  # standard deviation in gray levels of 255; the black border of the retina is empty


def load_photographs() -> dict[str, np.ndarray]:
    """Pictures of the installed packages by class name, in alphabetical order: gray levels (H, W), uint8.

    Gray, because several pictures are: otherwise colour alone would tell the others apart. Raises InputError if a
    package or a picture is missing, naming it.
    """
    paths = {Path(path).stem: path_of(package, path) for package, path in PHOTOGRAPHS}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise InputError(
            f'pictures are missing from the installed scikit-image or scikit-learn: {", ".join(missing)}. '
            'Known to have them: scikit-image 0.26 and scikit-learn 1.9.'
        )
    pictures = {}
    for name in sorted(paths):
        with Image.open(paths[name]) as image:
            pictures[name] = np.asarray(image.convert('L'))
    return pictures


def path_of(package: str, path: str) -> Path:
    """Path of a file of an installed package. Raises InputError without the package."""
    spec = importlib.util.find_spec(package)  # finds it without the seconds that an import may take
    if spec is None or spec.origin is None:
        raise InputError(f'the package {package} is missing: pip install scikit-image scikit-learn')
    return Path(spec.origin).parent / path


def _grid(picture: np.ndarray, split: str) -> list[tuple[int, int]]:
    """Corners (top, left) of disjoint patches in this split's half of a picture, nearly uniform ones left out."""
    height, width = picture.shape
    start, stop = (0, width // 2) if split == 'train' else (width // 2, width)
    tops, lefts = range(0, height - PATCH_SIZE + 1, PATCH_SIZE), range(start, stop - PATCH_SIZE + 1, PATCH_SIZE)
    return [(top, left) for top in tops for left in lefts if cut(picture, (top, left)).std() >= _MIN_CONTRAST]


def cut(picture: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """The patch (PATCH_SIZE, PATCH_SIZE) of a picture (H, W) at a corner (top, left)."""
    top, left = corner
    return picture[top : top + PATCH_SIZE, left : left + PATCH_SIZE]


def draw_patches(
    photographs: dict[str, np.ndarray], split: str, count: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Chooses `count` patches of each picture at random, without any pixel in common: corners (top, left) in pixels.

    The split is 'train' (left halves) or 'validation' (right halves). The choice for a class does not depend on the
    other classes. Raises InputError if a picture has fewer patches than that.
    """
    chosen = {}
    for name, picture in photographs.items():
        corners = _grid(picture, split)
        if count > len(corners):
            raise InputError(
                f'{name} has only {len(corners)} {split} patches of {PATCH_SIZE} x {PATCH_SIZE} pixels, '
                f'{count} were asked for: lower --train-per-class.'
            )
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(corners))
        chosen[name] = [corners[i] for i in order[:count]]
    return chosen


def export_patches(
    folder: Path | str,
    photographs: dict[str, np.ndarray],
    train_per_class: int,
    test_per_class: int = TEST_PER_CLASS,
    seed: int = 0,
) -> dict[str, int]:
    """Writes an image folder: train/<class>/*.png and validation/<class>/*.png. Returns how many files each split has.

    File names hold the corner, <top>_<left>.png. The seed chooses the training patches only. After an interruption the
    folder has neither split. Raises InputError if the folder has files or cannot be written, or a picture has too
    few patches.
    """
    folder = Path(folder)
    patches = {
        'train': draw_patches(photographs, 'train', train_per_class, seed),
        'validation': draw_patches(photographs, 'validation', test_per_class, _TEST_SEED),
    }
    try:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f'{folder} is not empty: name a new or an empty folder.')
        with new_folder(folder) as partial:
            for split, of_class in patches.items():
                for name, corners in of_class.items():
                    Path(partial, split, name).mkdir(parents=True)
                    for top, left in corners:
                        patch = Image.fromarray(cut(photographs[name], (top, left)))
                        patch.save(Path(partial, split, name, f'{top:04d}_{left:04d}.png'))
    except OSError as error:
        raise InputError(f'cannot write the patches: {error}') from error
    return {split: sum(map(len, corners.values())) for split, corners in patches.items()}


_TRAIN, _VALIDATION, _TEST = ('train', 'training'), ('validation', 'val', 'valid'), ('test', 'testing')
_TIFF = ('.tif', '.tiff')
_LARGEST = 64  # pixels of a side, if the user names no size


@dataclasses.dataclass(frozen=True)
class Folder:
    """Images of a folder: pixels (N, C, H, W), not normalised, and labels (N,) by 'train', 'validation', 'test'.

    A folder without splits has all its images in 'train'.
    """

    classes: list[str]
    splits: dict[str, tuple[Tensor, Tensor]]
    skipped: list[str]  # files that could not be read, and why
    plain_files: bool  # whether timm's own loader can read them: pictures of one or three channels and 8 bits
    names: dict[str, str]  # of the folders of the splits, if there are any

    @property
    def channels(self) -> int:
        """Channels of all images."""
        return next(iter(self.splits.values()))[0].shape[1]

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return next(iter(self.splits.values()))[0].shape[-1]


def read_image(path: Path) -> np.ndarray:
    """An image as (H, W, C), in the values and the type that the file has.

    Gray ones have one channel, and an alpha channel is left out; of a TIFF all channels are kept. Raises InputError if
    the file is no image, or has values that are not finite in float32.
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
    except Exception as error:  # what a damaged file makes of its reader
        raise InputError(str(error) or type(error).__name__) from error
    if not isinstance(array, np.ndarray):
        raise InputError('it holds several arrays: save each alone')
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in 'buif':
        raise InputError(f'shape {array.shape} of {array.dtype} is not (H, W) or (H, W, C) of numbers')
    with np.errstate(over='ignore'):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise InputError('it has values that are not finite in float32')
    return array


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode in ('1', 'LA', 'La'):
            return np.asarray(image.convert('L'))
        if image.mode.startswith(('I', 'F', 'L')):  # gray of 8, 16 or 32 bits
            return np.asarray(image)
        return np.asarray(image.convert('RGB'))


def _read_tiff(path: Path) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise InputError('TIFF needs a package: pip install tifffile') from error
    try:
        with tifffile.TiffFile(path) as file:
            if file.pages.first.photometric == tifffile.PHOTOMETRIC.PALETTE:
                return _read_picture(path)  # the array has places in the palette
            series = file.series[0]
            array, axes = series.asarray(), series.axes
    except ValueError as error:
        if 'imagecodecs' in str(error):  # a compression that Pillow may know
            return _read_picture(path)
        raise
    height, width = axes.index('Y'), axes.index('X')
    array = np.moveaxis(array, (height, width), (0, 1))
    return array.reshape(*array.shape[:2], -1)  # samples, pages and planes are channels


def read_folder(folder: Path, size: int | None = None, skip_bad: bool = False, but: Path | None = None) -> Folder:
    """Reads an image folder: train/ and validation/ or test/ with a folder for each class, or class folders alone.

    Every image is resized, so that its shorter side has `size` pixels, and its centre is cut. Without a size it is the
    median shorter side, 64 at most. The folder `but` is left out. Raises InputError if the folder is not such a folder,
    a file cannot be read (unless `skip_bad`), or the images do not fit together.
    """
    places = _splits(folder)
    files = {split: _by_class(path, but) for split, path in places.items()}
    classes = sorted({name for of_class in files.values() for name in of_class})
    if len(classes) < 2:
        raise InputError(
            f'{str(folder)!r} has {len(classes)} class{"" if classes else "es"} with images: two are needed.'
        )
    for split, of_class in files.items():
        if lacking := [name for name in classes if not of_class.get(name)]:
            raise InputError(f'{split} of {str(folder)!r} has no images of {", ".join(lacking)}.')
    bad: list[str] = []
    images: dict[str, list[tuple[Tensor, int]]] = {split: [] for split in files}
    channels: dict[int, Path] = {}
    suffixes: set[str] = set()
    deep, sides = False, []
    total = sum(len(paths) for of in files.values() for paths in of.values())
    with progress(total=total, desc='read', leave=False) as bar:
        for split, of_class in files.items():
            for name, paths in of_class.items():
                for path in paths:
                    bar.update()
                    try:
                        array = read_image(path).astype(np.float32)
                    except InputError as error:
                        bad.append(f'{path.relative_to(folder)}: {error}')
                        continue
                    channels.setdefault(array.shape[2], path.relative_to(folder))
                    suffixes.add(path.suffix.lower())
                    sides.append(min(array.shape[:2]))
                    deep = deep or bool(array.max() > 255)
                    image = _shrunk(torch.from_numpy(array).permute(2, 0, 1), size or _LARGEST)
                    images[split].append((image, classes.index(name)))
    if bad and not skip_bad:
        raise unreadable(bad)
    if len(channels) > 1:
        found = ', '.join(f'{path} has {count}' for count, path in sorted(channels.items()))
        raise InputError(f'images must have the same number of channels: {found}.')
    side = size or min(_LARGEST, int(np.median(sides or [1])))
    splits = {}
    for split, of_split in images.items():
        present = Counter(label for _, label in of_split)
        if lost := [classes[label] for label in range(len(classes)) if label not in present]:
            raise InputError(f'{split} has no readable images of {", ".join(lost)}.')
        pixels = torch.stack([_square(image, side) for image, _ in of_split])
        splits[split] = pixels, torch.tensor([label for _, label in of_split])
    plain = suffixes <= set(get_img_extensions()) and set(channels) <= {1, 3} and not deep
    names = {split: path.name for split, path in places.items() if path != folder}
    return Folder(classes, splits, bad, plain, names)


def unreadable(bad: Sequence[str]) -> InputError:
    """The error for files that cannot be taken, given with the reason of each."""
    shown = '\n  '.join([*bad[:10], *[f'and {len(bad) - 10} more'] * (len(bad) > 10)])
    return InputError(f'{len(bad)} files cannot be read; pass --skip-bad to leave them out:\n  {shown}')


def _shrunk(image: Tensor, side: int) -> Tensor:
    """An image (C, H, W) whose shorter side is at most `side`: large ones are not kept in memory."""
    return functional.resize(image, [side], antialias=True) if min(image.shape[1:]) > side else image.clone()


def _square(image: Tensor, side: int) -> Tensor:
    if min(image.shape[1:]) != side:
        image = functional.resize(image, [side], antialias=True)
    return functional.center_crop(image, [side, side])


def _splits(folder: Path) -> dict[str, Path]:
    """Where the splits are: folders with a folder for each class. Without train/ all is 'train'."""
    if not folder.is_dir():
        raise InputError(f'{str(folder)!r} is no folder.')
    here = {path.name.lower(): path for path in _folders(folder)}
    named = {
        split: here[name]
        for split, names in (('train', _TRAIN), ('validation', _VALIDATION), ('test', _TEST))
        for name in names
        if name in here
    }
    # Beside other folders, one that has no folders for classes is a class of this name, as trains are of vehicles.
    found = named if len(named) == len(here) else {split: path for split, path in named.items() if _folders(path)}
    if len(named) - len(found) > 1:
        raise InputError(f'{str(folder)!r} has {", ".join(f"{path.name}/" for path in named.values())} beside classes.')
    if not found:
        return {'train': folder}
    given = ' and '.join(f'{path.name}/' for path in found.values())
    if 'train' not in found:
        raise InputError(f'{str(folder)!r} has {given}, but no train/.')
    if len(found) == 1:
        raise InputError(f'{str(folder)!r} has {given}, but neither validation/ nor test/.')
    return found


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder, but for hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))


def files_in(folder: Path) -> list[Path]:
    """Files in a folder at any depth, but for hidden ones and those in hidden folders."""
    found = sorted(path for path in folder.rglob('*') if path.is_file())
    return [path for path in found if not any(part.startswith('.') for part in path.relative_to(folder).parts)]


def _by_class(folder: Path, but: Path | None) -> dict[str, list[Path]]:
    others = [path for path in _folders(folder) if but is None or path.resolve() != but.resolve()]
    return {path.name: files for path in others if (files := files_in(path))}


def stratified(labels: Tensor, share: float, seed: int, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Indices of a split of each class by a seed: the larger part, and about `share` of its images, at least one.

    Raises InputError if a class has a single image.
    """
    random = np.random.default_rng(seed)
    parts: Any = ([], [])
    for label, name in enumerate(classes):
        own = np.flatnonzero(labels.numpy() == label)
        if len(own) < 2:
            raise InputError(f'class {name} has {len(own)} image to learn from: at least two are needed.')
        order, held_out = random.permutation(own), max(1, round(share * len(own)))
        parts[0].append(order[held_out:])
        parts[1].append(order[:held_out])
    kept, out = (torch.from_numpy(np.sort(np.concatenate(part))) for part in parts)
    return kept, out
