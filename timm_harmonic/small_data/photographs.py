"""A small data set without a download: patches of the photographs in the wheels of scikit-image and scikit-learn.

The task is to say which photograph a patch is from. Training patches are from the left half of each picture, test
patches from the right half.
"""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from ..hub.writing import clear_remains, new_folder

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


class QuickstartError(Exception):
    """Something that the user can mend; the message says how."""


def load_photographs() -> dict[str, np.ndarray]:
    """Pictures of the installed packages by class name, in alphabetical order: gray levels (H, W), uint8.

    Gray, because several pictures are: otherwise colour alone would tell the others apart. Raises QuickstartError if a
    package or a picture is missing, naming it.
    """
    paths = {Path(path).stem: path_of(package, path) for package, path in PHOTOGRAPHS}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise QuickstartError(
            f'pictures are missing from the installed scikit-image or scikit-learn: {", ".join(missing)}. '
            'Known to have them: scikit-image 0.26 and scikit-learn 1.9.'
        )
    pictures = {}
    for name in sorted(paths):
        with Image.open(paths[name]) as image:
            pictures[name] = np.asarray(image.convert('L'))
    return pictures


def path_of(package: str, path: str) -> Path:
    """Path of a file of an installed package. Raises QuickstartError without the package."""
    spec = importlib.util.find_spec(package)  # finds it without the seconds that an import may take
    if spec is None or spec.origin is None:
        raise QuickstartError(f'the package {package} is missing: pip install scikit-image scikit-learn')
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
    other classes. Raises QuickstartError if a picture has fewer patches than that.
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
    """Writes an image folder: train/<class>/*.png and validation/<class>/*.png. Returns how many files each split has.

    File names hold the corner, <top>_<left>.png. The seed chooses the training patches only. After an interruption the
    folder has neither split. Raises QuickstartError if the folder has files or cannot be written, or a picture has too
    few patches.
    """
    folder = Path(folder)
    patches = {
        'train': draw_patches(photographs, 'train', train_per_class, seed),
        'validation': draw_patches(photographs, 'validation', test_per_class, _TEST_SEED),
    }
    try:
        clear_remains(folder)
        if folder.exists() and any(folder.iterdir()):
            raise QuickstartError(f'{folder} is not empty: name a new or an empty folder.')
        with new_folder(folder, last='train') as partial:
            for split, of_class in patches.items():
                for name, corners in of_class.items():
                    Path(partial, split, name).mkdir(parents=True)
                    for top, left in corners:
                        patch = Image.fromarray(cut(photographs[name], (top, left)))
                        patch.save(Path(partial, split, name, f'{top:04d}_{left:04d}.png'))
    except OSError as error:
        raise QuickstartError(f'cannot write the patches: {error}') from error
    return {split: sum(map(len, corners.values())) for split, corners in patches.items()}
