"""Pictures with text: words drawn over photographs, whose boxes are known, and a photographed text without boxes.

For a detector whole pages and scenes, for a recognizer one word each.

Calibration and test pictures share no photograph, font, word or text. All of them come with scikit-image, scikit-learn
and matplotlib.
"""

import dataclasses
import importlib.util
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from timm_harmonic.small_data.tasks import path_of

from .craft import MEAN, STD

__all__ = ['Lines', 'Pages', 'lines', 'pages']

WIDTH, HEIGHT = 256, 192  # pixels
LINE = 64  # pixels, of a picture with one word
_SCANS = 16  # one picture in so many is a photographed text
_TRIES = 20  # places for a word of a scene


@dataclasses.dataclass(frozen=True)
class Source:
    """What the pictures of a split are made of."""

    photographs: str
    fonts: str
    scan: str
    seed: int  # also tells which half of the words


SPLITS = {
    'calibration': Source(
        'astronaut.png brick.png camera.png chelsea.png coffee.png gravel.png ihc.png china.jpg',
        'DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold '
        'DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic',
        'page.png',
        0,
    ),
    'test': Source(
        'grass.png hubble_deep_field.jpg moon.png motorcycle_left.png retina.jpg rocket.jpg flower.jpg',
        'STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmb10 cmr10 cmss10 cmti10 cmtt10',
        'text.png',
        1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Pages:
    """Pictures (N, 3, HEIGHT, WIDTH) as the detector takes them, and the boxes (n, 4) of the words of those drawn."""

    pixels: Tensor
    boxes: list[np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Lines:
    """Gray pictures (N, 1, LINE, WIDTH) as the recognizer takes them, and the word in each."""

    pixels: Tensor
    words: list[str]


def _picture(name: str) -> Image.Image:
    """A picture of scikit-image, or else of scikit-learn, in colour."""
    path = path_of('skimage', f'data/{name}')
    with Image.open(path if path.exists() else path_of('sklearn', f'datasets/images/{name}')) as image:
        return image.convert('RGB')


def _fonts(names: str) -> list[Path]:
    spec = importlib.util.find_spec('matplotlib')
    assert spec is not None
    assert spec.origin is not None
    return [Path(spec.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / f'{name}.ttf' for name in names.split()]


@cache
def _words(half: int) -> list[str]:
    """One half of the words in scikit-learn's descriptions of data sets."""
    texts = sorted(path_of('sklearn', 'datasets/descr').glob('*.rst'))
    found = re.findall(r'[a-z]{3,12}', ' '.join(text.read_text(encoding='utf-8').lower() for text in texts))
    return sorted(set(found))[half::2]


def _crop(picture: Image.Image, random: np.random.Generator, most: float) -> Image.Image:
    """A part of a picture, as large as it can be or up to so many times smaller."""
    scale = min(picture.width / WIDTH, picture.height / HEIGHT) / random.uniform(1, most)
    width, height = int(scale * WIDTH), int(scale * HEIGHT)
    left, top = int(random.integers(picture.width - width + 1)), int(random.integers(picture.height - height + 1))
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, (left, top, left + width, top + height))


class _Writer:
    """Draws words, and notes their boxes."""

    def __init__(self, ground: Image.Image, source: Source, random: np.random.Generator) -> None:
        self.image, self.random = ground, random
        self.draw = ImageDraw.Draw(ground)
        self.fonts, self.vocabulary = _fonts(source.fonts), _words(source.seed)
        self.boxes: list[tuple[float, ...]] = []

    def font(self, least: float, most: float) -> ImageFont.FreeTypeFont:
        """A font of a size in pixels."""
        return ImageFont.truetype(self.fonts[self.random.integers(len(self.fonts))], self.random.uniform(least, most))

    def word(self) -> str:
        """A word, in some spelling."""
        word = self.vocabulary[self.random.integers(len(self.vocabulary))]
        return (word, word, word, word.capitalize(), word.upper())[self.random.integers(5)]

    def write(self, word: str, font: ImageFont.FreeTypeFont, at: tuple[float, float], ink: tuple[int, ...]) -> None:
        """Draws a word."""
        self.draw.text(at, word, ink, font)
        self.boxes.append(self.draw.textbbox(at, word, font))


def _page(writer: _Writer) -> None:
    """Fills the picture with lines of one font: dark on pale paper, or reversed."""
    random, image = writer.random, writer.image
    pale, font = random.random() < 0.8, writer.font(14, 26)
    paper = random.uniform(190, 255, 3) if pale else random.uniform(0, 60, 3)
    image.paste(Image.blend(Image.new('RGB', image.size, tuple(map(int, paper))), image, random.uniform(0.05, 0.3)))
    ink = tuple(map(int, random.uniform(0, 70, 3) if pale else random.uniform(180, 255, 3)))
    margin, step, space = random.uniform(4, 24), font.size * random.uniform(1.3, 1.8), 1.2 * font.getlength(' ')
    top = margin
    while top + step < HEIGHT:
        left = margin
        while left + font.getlength(word := writer.word()) < WIDTH - margin:
            writer.write(word, font, (left, top), ink)
            left += font.getlength(word) + space
        top += step


def _scene(writer: _Writer) -> None:
    """Puts a few words in different fonts on a photograph, each in an ink that can be read there."""
    random, image = writer.random, writer.image
    for _ in range(random.integers(2, 7)):
        word, font = writer.word(), writer.font(18, 54)
        for _ in range(_TRIES):
            at = random.uniform(0, WIDTH), random.uniform(0, HEIGHT)
            left, top, right, bottom = writer.draw.textbbox(at, word, font)
            gap = 0.5 * font.size
            apart = all(
                right + gap < other[0] or left - gap > other[2] or bottom + gap < other[1] or top - gap > other[3]
                for other in writer.boxes
            )
            if apart and left >= 2 and top >= 2 and right <= WIDTH - 2 and bottom <= HEIGHT - 2:
                ground = np.asarray(image.crop((int(left), int(top), int(right), int(bottom)))).mean()
                bright = random.uniform(170, 255, 3) if ground < 120 else random.uniform(0, 70, 3)
                writer.write(word, font, at, tuple(map(int, bright)))
                break


def _taken(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    """The picture (3, H, W) as a camera might take it: uneven light, slightly blurred, with noise."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    down, right = np.linspace(-1, 1, image.height)[:, None], np.linspace(-1, 1, image.width)
    light = 1 + random.uniform(-0.2, 0.2) * down + random.uniform(-0.2, 0.2) * right
    pixels = ndimage.gaussian_filter(pixels * light, (0, *2 * [random.uniform(0, 0.8)]))
    return (pixels + random.uniform(0, 6) * random.standard_normal(pixels.shape)).clip(0, 255)


def pages(split: str, count: int) -> Pages:
    """So many pictures of a split, always the same: pages and scenes by turns, and some photographed texts."""
    source = SPLITS[split]
    random = np.random.default_rng(source.seed)
    photographs, scan = [_picture(name) for name in source.photographs.split()], _picture(source.scan)
    taken, boxes = [], []
    for i in range(count):
        if i % _SCANS == _SCANS - 1:
            taken.append(_taken(_crop(scan, random, 1.5), random))
            boxes.append(None)
            continue
        writer = _Writer(_crop(photographs[i % len(photographs)], random, 2), source, random)
        (_scene if i % 2 else _page)(writer)
        taken.append(_taken(writer.image, random))
        boxes.append(np.array(writer.boxes).reshape(-1, 4))
    pixels = torch.from_numpy(np.stack(taken)).float() / 255
    mean, std = (torch.tensor(of)[:, None, None] for of in (MEAN, STD))
    return Pages((pixels - mean) / std, boxes)


def lines(split: str, count: int) -> Lines:
    """So many pictures of a split with one word each, always the same."""
    source = SPLITS[split]
    random = np.random.default_rng(source.seed)
    photographs = [_picture(name) for name in source.photographs.split()]
    taken, found = [], []
    for i in range(count):
        ground = _crop(photographs[i % len(photographs)], random, 2).crop((0, 0, WIDTH, LINE))
        ground = Image.blend(Image.new('RGB', ground.size, tuple(random.integers(256, size=3).tolist())), ground, 0.5)
        writer = _Writer(ground, source, random)
        word, font = writer.word(), writer.font(26, 46)
        while font.getlength(word) > WIDTH - 16:
            font = font.font_variant(size=0.9 * font.size)
        _, top, _, bottom = writer.draw.textbbox((0, 0), word, font)
        at = random.uniform(4, 8), (LINE - bottom - top) / 2 + random.uniform(-4, 4)
        bright = random.uniform(170, 255) if np.asarray(ground).mean() < 120 else random.uniform(0, 70)
        writer.write(word, font, at, 3 * (int(bright),))
        right = int(writer.boxes[0][2] + random.uniform(2, 8))
        pixels = _taken(ground, random).mean(0, keepdims=True)[..., :right]
        taken.append(np.pad(pixels, ((0, 0), (0, 0), (0, WIDTH - pixels.shape[2])), 'edge'))  # as EasyOCR does
        found.append(word)
    return Lines(torch.from_numpy(np.stack(taken)).float() / 127.5 - 1, found)
