"""Evaluation tasks on drawn things: icons, letters, typefaces and leaves. White on black, gray."""

import json
import logging
import re
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from timm_harmonic.small_data.tasks import Images

from .base import Split, drawn_apart, normalised, packaged

_DRAWN = 96  # pixels of a drawing before it is placed
_SIDE, _LEAF, _TEXT = 32, 48, 48

# Icons: names in the sets, of which the first that a set has counts, alone and with an ending.
ICONS = {
    'bell': 'bell notifications',
    'bin': 'trash trash-can delete-bin delete',
    'book': 'book',
    'bookmark': 'bookmark',
    'calendar': 'calendar event',
    'camera': 'photo_camera device-camera camera',
    'cloud': 'cloud',
    'envelope': 'envelope mail',
    'flag': 'flag',
    'folder': 'folder',
    'gear': 'gear cog settings',
    'gift': 'gift card_giftcard present',
    'heart': 'heart favorite',
    'house': 'house home',
    'key': 'key vpn_key',
    'lock': 'lock lock-closed',
    'microphone': 'microphone mic',
    'pencil': 'pencil edit',
    'search': 'search magnifying-glass magnify zoom',
    'star': 'star star-empty star-full',
}
_ENDINGS = ('', '-outline', '-line', '-fill', '-filled', '-thin', '-light', '-bold', '-full', '-empty', '-alt')
# By designer: Material Design Icons has Google's shapes.
_ICON_SETS = {
    'Font Awesome': ('fontawesome6-solid-webfont-6.7.2.ttf', 'fontawesome6-regular-webfont-6.7.2.ttf'),
    'Elusive': ('elusiveicons-webfont-2.0.ttf',),
    'Material': (
        'materialdesignicons6-webfont-6.9.96.ttf',
        *(
            f'assets/material_icons_{style.lower()}_regular/MaterialIcons{style}-Regular.otf'
            for style in ('Outlined', 'Round', 'Sharp')
        ),
    ),
    'Phosphor': ('phosphor-1.3.0.ttf',),
    'Remix': ('remixicon-2.5.0.ttf',),
    'Codicon': ('codicon-0.0.36.ttf',),
    'Boxicons': ('assets/boxicons/boxicons.ttf',),
    'Lucide': ('assets/lucide/lucide.ttf',),
    'Typicons': ('assets/typicons/typicons.ttf',),
    'Ligature Symbols': ('assets/ligature_symbols/LigatureSymbols-2.11.ttf',),
}
_TEST_ICONS = 8
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
_TEST_TYPEFACES = 15
# Typefaces to tell apart, and others.
# fmt: off
TYPEFACES = (
    'arvo', 'bitter', 'bodoni_moda', 'caveat', 'chakra_petch', 'comfortaa', 'cormorant_garamond', 'dancing_script',
    'delius', 'inconsolata', 'indie_flower', 'inter', 'josefin_sans', 'lato', 'lobster', 'merriweather', 'orbitron',
    'playfair_display', 'roboto_slab', 'space_mono',
)
_FONTS = (
    *TYPEFACES,
    'anton', 'bungee', 'dm_serif_display', 'great_vibes', 'pacifico', 'permanent_marker', 'press_start_2p',
    'shadows_into_light', 'titan_one', 'zeyada',
)
# fmt: on
_TEST_TEXTS = 20
LEAVES = tuple(f'species {i + 1}' for i in range(6))
_TEST_LEAVES = 20


def _placed(drawing: Image.Image, side: int, random: np.random.Generator) -> np.ndarray:
    """A drawing (1, side, side) of random size at a random place."""
    drawing = drawing.crop(drawing.getbbox())
    scale = random.uniform(0.65, 0.95) * side / max(drawing.size)
    small = drawing.resize([max(1, round(scale * size)) for size in drawing.size], Image.Resampling.LANCZOS)
    canvas = Image.new('L', (side, side))
    left, top = (int(random.integers(side - size + 1)) for size in small.size)
    canvas.paste(small, (left, top))
    return np.asarray(canvas, np.float32)[None]


@cache
def _loaded(font: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font), size)


@cache
def _glyph(font: Path, character: str) -> Image.Image:
    canvas = Image.new('L', (3 * _DRAWN, 3 * _DRAWN))
    place = (1.5 * _DRAWN, 1.5 * _DRAWN)
    ImageDraw.Draw(canvas).text(place, character, 255, _loaded(font, _DRAWN), anchor='mm')
    return canvas


def _in_turn(groups: list[list[Image.Image]], count: int, random: np.random.Generator) -> list[Image.Image]:
    """At most `count` drawings, one of each group before a second one of any."""
    ranked = [
        (rank, random.random(), group[i]) for group in groups for rank, i in enumerate(random.permutation(len(group)))
    ]
    return [drawing for _, _, drawing in sorted(ranked, key=lambda item: item[:2])[:count]]


@cache
def _icons() -> dict[str, dict[str, list[Image.Image]]]:
    """Drawings by class and set of icons."""
    found: dict[str, dict[str, list[Image.Image]]] = {name: {} for name in ICONS}
    for name_of_set, files in _ICON_SETS.items():
        for file in files:
            path = packaged('iconipy', file) if '/' in file else packaged('qtawesome', f'fonts/{file}')
            codes = _codes(path)
            for name, words in ICONS.items():
                for word in words.split():
                    here = [codes[key] for ending in _ENDINGS if (key := word + ending) in codes]
                    if here:
                        drawn = [_glyph(path, chr(code)) for code in dict.fromkeys(here)]
                        found[name].setdefault(name_of_set, []).extend(drawn)
                        break
    return found


def _codes(font: Path) -> dict[str, int]:
    """Characters of a font of icons by name."""
    from fontTools.ttLib import TTFont

    named = font.with_name(font.stem.replace('webfont', 'webfont-charmap') + '.json')
    if font.stem.startswith('phosphor'):
        named = font.with_name('phosphor-charmap-1.3.0.json')
    if named.exists():
        return {name: int(code, 16) for name, code in json.loads(named.read_text()).items()}
    sheet = font.with_suffix('.css')
    if sheet.exists() and font.stem == 'boxicons':
        rules = re.findall(r'\.bx(s?)-([\w-]+):before\s*{\s*content:\s*"\\(\w+)"', sheet.read_text())
        return {name + '-fill' * bool(solid): int(code, 16) for solid, name, code in rules}
    logging.getLogger('fontTools').setLevel(logging.ERROR)  # it reports bytes that some fonts have too many
    with TTFont(font) as opened:
        return {name: code for code, name in opened.getBestCmap().items()}


def icons(count: int, seed: int) -> tuple[Images, Images]:
    """Icons of twenty things: five sets of icons for training and the other five for testing."""
    splits: list[Split] = []
    names, halves = list(_ICON_SETS), drawn_apart(len(_ICON_SETS), (5, 5), np.random.default_rng(0))
    for split, number in enumerate((count, _TEST_ICONS)):
        images: list[np.ndarray] = []
        labels: list[int] = []
        random, sets = np.random.default_rng([seed, number]), [names[i] for i in halves[split]]
        for label, of_set in enumerate(_icons().values()):
            chosen = _in_turn([of_set[name] for name in sets if name in of_set], number, random)
            images += [_placed(drawing, _SIDE, random) for drawing in chosen]
            labels += [label] * len(chosen)
        splits.append((images, labels))
    return normalised(*splits)


@cache
def _font(name: str) -> Path:
    files = packaged(f'fontpkg_{name}', 'files')
    return min(files.glob('*.ttf'), key=lambda path: ('Italic' in path.stem, 'Regular' not in path.stem, path.name))


def letters(count: int, seed: int) -> tuple[Images, Images]:
    """Capitals: `count` of fifteen typefaces for training and fifteen others for testing."""
    random = np.random.default_rng(seed)
    splits: list[Split] = []
    for part in drawn_apart(len(_FONTS), (count, _TEST_TYPEFACES), random):
        chosen = [_font(_FONTS[i]) for i in part]
        pairs = [(label, font) for label in range(len(LETTERS)) for font in chosen]
        images = [_placed(_glyph(font, LETTERS[label]), _SIDE, random) for label, font in pairs]
        splits.append((images, [label for label, _ in pairs]))
    return normalised(*splits)


def typefaces(count: int, seed: int) -> tuple[Images, Images]:
    """Typefaces, six letters at a time: letters from A to M for training and from N to Z for testing."""
    random = np.random.default_rng(seed)
    splits: list[Split] = []
    for alphabet, number in (('abcdefghijklm', count), ('nopqrstuvwxyz', _TEST_TEXTS)):
        pairs = [(label, name) for label, name in enumerate(TYPEFACES) for _ in range(number)]
        images = [_text(_font(name), alphabet, random) for _, name in pairs]
        splits.append((images, [label for label, _ in pairs]))
    return normalised(*splits)


def _text(font: Path, alphabet: str, random: np.random.Generator) -> np.ndarray:
    """Two lines of three letters, the first one a capital, at a random place."""
    box = _glyph(font, 'H').getbbox()
    size = 16 * _DRAWN / (box[3] - box[1]) if box else 16.0
    canvas = Image.new('L', (_TEXT, _TEXT))
    for line in (0.27, 0.75):
        word = ''.join(random.choice(list(alphabet), 3)).capitalize()
        place = (0.5 * _TEXT + random.uniform(-3, 3), line * _TEXT + random.uniform(-3, 3))
        ink = Image.new('L', (_TEXT, _TEXT))
        ImageDraw.Draw(ink).text(place, word, 255, _loaded(font, size), anchor='mm')
        canvas = ImageChops.lighter(canvas, ink)
    return np.asarray(canvas, np.float32)[None]


@cache
def _outlines() -> tuple[np.ndarray, np.ndarray]:
    """Distances of the outlines of leaves from their centres (N, 427), standardised, and their species."""
    paths = [packaged('aeon', f'datasets/data/OSULeaf/OSULeaf_{split}.ts') for split in ('TRAIN', 'TEST')]
    lines = ''.join(path.read_text().partition('@data\n')[2] for path in paths).split()
    rows = [line.split(':') for line in lines]
    return np.array([row[0].split(',') for row in rows], float), np.array([int(row[1]) - 1 for row in rows])


def leaves(count: int, seed: int) -> tuple[Images, Images]:
    """Silhouettes of leaves of six trees, rotated at random; other leaves for testing."""
    random = np.random.default_rng(seed)
    distances, species = _outlines()
    splits: list[Split] = [([], []), ([], [])]
    for label in range(len(LEAVES)):
        own = np.flatnonzero(species == label)
        parts = drawn_apart(len(own), (count, _TEST_LEAVES), random)
        for (images, labels), part in zip(splits, parts, strict=True):
            images += [_placed(_leaf(distances[i], random.uniform(0, 2 * np.pi)), _LEAF, random) for i in own[part]]
            labels += [label] * len(part)
    return normalised(*splits)


def _leaf(distances: np.ndarray, turn: float) -> Image.Image:
    radius = np.maximum(distances + 3.2, 0.3)
    radius *= 1.4 * _DRAWN / radius.max()
    angles = np.linspace(0, 2 * np.pi, len(radius), endpoint=False) + turn
    canvas = Image.new('L', (3 * _DRAWN, 3 * _DRAWN))
    points = 1.5 * _DRAWN + radius * np.stack([np.cos(angles), -np.sin(angles)])
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.T], fill=255)
    return canvas
