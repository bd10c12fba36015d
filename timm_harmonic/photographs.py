"""A small data set that needs no network: patches of the photographs inside the wheels of two packages.

The task is to say which photograph a patch is from. Training patches come from the left half of every picture, test
patches from the right half.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = [
    'PATCH_SIZE',
    'PHOTOGRAPHS',
    'TEST_PER_CLASS',
    'QuickstartError',
    'draw_patches',
    'export_patches',
    'load_photographs',
]

# Package and path of each picture; the name of the file is the name of the class. Pictures of text, drawings,
# silhouettes and the second half of a stereo pair are left out.
PHOTOGRAPHS = (
    ('skimage', 'data/astronaut.png'),
    ('skimage', 'data/brick.png'),
    ('skimage', 'data/camera.png'),
    ('skimage', 'data/cell.png'),
    ('skimage', 'data/chelsea.png'),
    ('skimage', 'data/coffee.png'),
    ('skimage', 'data/coins.png'),
    ('skimage', 'data/grass.png'),
    ('skimage', 'data/gravel.png'),
    ('skimage', 'data/hubble_deep_field.jpg'),
    ('skimage', 'data/ihc.png'),
    ('skimage', 'data/moon.png'),
    ('skimage', 'data/motorcycle_left.png'),
    ('skimage', 'data/retina.jpg'),
    ('skimage', 'data/rocket.jpg'),
    ('sklearn', 'datasets/images/china.jpg'),
    ('sklearn', 'datasets/images/flower.jpg'),
)
PATCH_SIZE = 48  # pixels
TEST_PER_CLASS = 24  # as many as the half of the smallest picture holds
_SPLITS = ('train', 'validation')
_TEST_SEED = 0
_MIN_CONTRAST = 2  # standard deviation in gray levels of 255; the black border of the retina shows nothing


class QuickstartError(Exception):
    """Something that the user can put right; the message says how."""


def load_photographs() -> dict[str, np.ndarray]:
    """Reads the pictures from the installed packages, as gray levels.

    Gray, because several of the pictures are: colour alone would tell the others apart.

    Returns:
        Arrays (H, W) of uint8 by class name, in alphabetical order.

    Raises:
        QuickstartError: If a package or a picture is missing, naming it.
    """
    paths = {Path(path).stem: _package_folder(package) / path for package, path in PHOTOGRAPHS}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise QuickstartError(
            'pictures are missing from the installed versions of scikit-image or scikit-learn: '
            + ', '.join(missing)
            + '. Known to have them: scikit-image 0.26 and scikit-learn 1.9.'
        )
    return {name: _read_gray(paths[name]) for name in sorted(paths)}


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds it without the seconds that importing it may take
    if spec is None or spec.origin is None:
        raise QuickstartError(f'the package {package} is missing: pip install "timm-harmonic[quickstart]"')
    return Path(spec.origin).parent


def _read_gray(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert('L'))


def _grid(picture: np.ndarray, split: str) -> list[tuple[int, int]]:
    """Corners (top, left) of disjoint patches in this split's half of a picture, nearly uniform ones left out."""
    height, width = picture.shape
    start, stop = (0, width // 2) if split == 'train' else (width // 2, width)
    corners = [
        (top, left)
        for top in range(0, height - PATCH_SIZE + 1, PATCH_SIZE)
        for left in range(start, stop - PATCH_SIZE + 1, PATCH_SIZE)
    ]
    return [corner for corner in corners if cut(picture, corner).std() >= _MIN_CONTRAST]


def cut(picture: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """The patch (PATCH_SIZE, PATCH_SIZE) of a picture (H, W) at a corner (top, left)."""
    top, left = corner
    return picture[top : top + PATCH_SIZE, left : left + PATCH_SIZE]


def draw_patches(
    photographs: dict[str, np.ndarray],
    split: str,
    count: int,
    seed: int = 0,
) -> dict[str, list[tuple[int, int]]]:
    """Chooses patches at random, without any pixel in common.

    Args:
        photographs: Pictures by class name, see `load_photographs`.
        split: 'train' (left halves) or 'validation' (right halves).
        count: Patches from each picture.
        seed: Of the choice, which for a class does not depend on the other classes.

    Returns:
        Corners (top, left) by class name, in pixels.

    Raises:
        QuickstartError: If a picture has fewer patches than asked for.
    """
    chosen = {}
    for name, picture in photographs.items():
        corners = _grid(picture, split)
        if count > len(corners):
            raise QuickstartError(
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
    """Writes the patches as an image folder: train/<class>/*.png and validation/<class>/*.png.

    File names hold the corner, <top>_<left>.png. The test patches do not depend on the seed. The folder gets both
    splits or, after an interruption, neither.

    Args:
        folder: Where to write; it is made if needed and must be empty.
        photographs: Pictures by class name.
        train_per_class: Training patches of each picture.
        test_per_class: Test patches of each picture.
        seed: Of the choice of the training patches.

    Returns:
        Number of files in each split.

    Raises:
        QuickstartError: If the folder has files or cannot be written, or a picture has too few patches.
    """
    folder = Path(folder)
    patches = {
        'train': draw_patches(photographs, 'train', train_per_class, seed),
        'validation': draw_patches(photographs, 'validation', test_per_class, _TEST_SEED),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise QuickstartError(f'{folder} is not empty: name a new or an empty folder.')
        with tempfile.TemporaryDirectory(prefix='.partial-', dir=folder) as partial:
            for split in _SPLITS:
                _write_split(Path(partial, split), photographs, patches[split])
            for split in _SPLITS:
                shutil.move(Path(partial, split), folder / split)
    except OSError as error:
        raise QuickstartError(f'cannot write the patches: {error}') from error
    return {split: sum(map(len, corners.values())) for split, corners in patches.items()}


def _write_split(
    folder: Path,
    photographs: dict[str, np.ndarray],
    corners: dict[str, Sequence[tuple[int, int]]],
) -> None:
    for name, chosen in corners.items():
        (folder / name).mkdir(parents=True)
        for top, left in chosen:
            patch = cut(photographs[name], (top, left))
            Image.fromarray(patch).save(folder / name / f'{top:04d}_{left:04d}.png')
