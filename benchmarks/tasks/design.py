"""Design tasks, on which options are chosen: pictures and digits in the wheels of scikit-image and scikit-learn."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from timm_harmonic.small_data.tasks import PHOTOGRAPHS, Images, cut, draw_patches, load_photographs, path_of

from .base import Task, lit_patch, normalised

_TEST = 24  # patches of each photograph: half of the smallest holds no more
_BANDS, _NOISE = 13, 8.0  # gray levels of 255
_TEXTURES = ('brick', 'coins', 'grass', 'gravel', 'ihc', 'moon')
_SURFACE = 48  # pixels of a side of a texture
_SURFACES = 40  # test images of each texture
_DIGITS, _DIGITS_SIDE = 600, 32  # number of test digits, and the side they are enlarged to


@cache
def _gray() -> dict[str, np.ndarray]:
    return load_photographs()


@cache
def _coloured() -> dict[str, np.ndarray]:
    """The colour photographs, (H, W, 3)."""
    found = {}
    for package, path in PHOTOGRAPHS:
        with Image.open(path_of(package, path)) as image:
            picture = np.asarray(image.convert('RGB'))
        if (picture != picture[..., :1]).any():
            found[Path(path).stem] = picture
    return {name: found[name] for name in sorted(found)}


def _cuts(pictures: dict[str, np.ndarray], split: str, count: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    """Patches (C, H, W) and labels, at corners drawn on the gray pictures."""
    corners = draw_patches({name: _gray()[name] for name in pictures}, split, count, seed)
    places = [(label, name, corner) for label, (name, of) in enumerate(corners.items()) for corner in of]
    cuts = [np.atleast_3d(cut(pictures[name], corner)).transpose(2, 0, 1) for _, name, corner in places]
    return cuts, [label for label, _, _ in places]


def photographs(count: int, seed: int) -> tuple[Images, Images]:
    """Gray patches, for training from the left halves of the pictures, for testing from the right halves."""
    return normalised(_cuts(_gray(), 'train', count, seed), _cuts(_gray(), 'validation', _TEST, 0))


def colours(count: int, seed: int) -> tuple[Images, Images]:
    """Colour patches, from the same halves."""
    return normalised(_cuts(_coloured(), 'train', count, seed), _cuts(_coloured(), 'validation', _TEST, 0))


def bands(count: int, seed: int) -> tuple[Images, Images]:
    """Thirteen bands as a satellite has them: smooth mixtures of the three colours, with independent noise."""
    centres, peaks = np.linspace(0, 1, _BANDS)[:, None], np.array([0.8, 0.5, 0.2])
    shares = np.exp(-(((centres - peaks) / 0.25) ** 2))
    shares /= shares.sum(1, keepdims=True)
    splits = []
    for split, number, of_seed in (('train', count, seed), ('validation', _TEST, 0)):
        random = np.random.default_rng([of_seed, len(split)])
        cuts, labels = _cuts(_coloured(), split, number, of_seed)
        mixed = [np.einsum('bc,cxy->bxy', shares, patch) for patch in cuts]
        splits.append(([bands + _NOISE * random.standard_normal(bands.shape) for bands in mixed], labels))
    return normalised(*splits)


def digits(count: int, seed: int) -> tuple[Images, Images]:
    """The handwritten digits of scikit-learn, enlarged from 8 x 8; 600 fixed ones for testing."""
    data = load_digits()
    pixels = interpolate(torch.from_numpy(data.images).float().unsqueeze(1), (_DIGITS_SIDE,) * 2, mode='bilinear')
    order = np.random.default_rng(0).permutation(len(pixels))
    test, pool = order[:_DIGITS], order[_DIGITS:]
    random = np.random.default_rng([seed, 1])
    train = np.concatenate([random.permutation(pool[data.target[pool] == digit])[:count] for digit in range(10)])
    return normalised(*((list(pixels[of].numpy()), data.target[of].tolist()) for of in (train, test)))


def textures(count: int, seed: int) -> tuple[Images, Images]:
    """Surfaces, randomly rotated and unevenly lit: left halves for training, right halves for testing."""
    splits = []
    for side, number, of_seed in (('left', count, seed), ('right', _SURFACES, 0)):
        images: list[np.ndarray] = []
        for label, name in enumerate(_TEXTURES):
            random = np.random.default_rng([of_seed, label, len(side)])
            picture = _gray()[name].astype(np.float32)
            middle = picture.shape[1] // 2
            half = picture[:, :middle] if side == 'left' else picture[:, middle:]
            images += [lit_patch(half, _SURFACE, random)[None] for _ in range(number)]
        splits.append((images, [label for label in range(len(_TEXTURES)) for _ in range(number)]))
    return normalised(*splits)


_GRAY_CLASSES, _COLOUR_CLASSES = tuple(_gray()), tuple(_coloured())
DESIGN = {
    'photographs_shift': Task('photographs, shifts', photographs, _GRAY_CLASSES, 'shift', (10, 20)),
    'photographs_zoom': Task('photographs, zooming crops', photographs, _GRAY_CLASSES, 'zoom', (10, 20)),
    'digits': Task('digits', digits, tuple('0123456789'), 'shift', (10, 20, 50), flip=False),
    'textures': Task('textures, rotation and light', textures, _TEXTURES, 'shift', (10, 20, 50)),
    'photographs_blurred': Task(
        'photographs, zooming crops, bilinear', photographs, _GRAY_CLASSES, 'zoom', (10,), interpolation='bilinear'
    ),
    'colours_shift': Task('photographs in colour, shifts', colours, _COLOUR_CLASSES, 'shift', (10, 20)),
    'colours_zoom': Task('photographs in colour, zooming crops', colours, _COLOUR_CLASSES, 'zoom', (10, 20)),
    'bands': Task('thirteen bands', bands, _COLOUR_CLASSES, 'shift', (10, 20)),
}
