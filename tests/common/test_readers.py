"""The reader of image files: values, depth and bands of every container, upright; what it refuses, and why."""

import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from timm_harmonic.common import InputError
from timm_harmonic.common.readers import read_image

RANDOM = np.random.default_rng(0)
GRAY8 = RANDOM.integers(0, 256, (20, 30), dtype=np.uint8)
GRAY16 = RANDOM.integers(0, 65536, (20, 30), dtype=np.uint16)
COLOUR = RANDOM.integers(0, 256, (20, 30, 4), dtype=np.uint8)
PAGES = RANDOM.integers(0, 65536, (5, 20, 30), dtype=np.uint16)
BANDS = RANDOM.random((20, 30, 13)).astype(np.float32)
BITS = GRAY8 > 127
RGB = Image.fromarray(COLOUR[..., :3])
DEEP = RANDOM.integers(0, 65536, (20, 30, 4), dtype=np.uint16)


def write_png(path, array, kind):
    """A PNG of 16 bits; `kind` is the colour type of PNG. Pillow writes none in colour."""
    height, width = array.shape[:2]
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    header = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([16, kind, 0, 0, 0])
    chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n')
    with path.open('ab') as file:
        for name, data in chunks:
            file.write(len(data).to_bytes(4, 'big') + name + data + zlib.crc32(name + data).to_bytes(4, 'big'))


def write_pages(path, *pages, **options):
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            file.write(page, **options)


def write_with_overviews(path):
    with tifffile.TiffWriter(path) as file:
        file.write(GRAY16, subifds=1)
        file.write(GRAY16[::2, ::2], subfiletype=1)
        file.write(GRAY16[::2, ::2], subfiletype=1)


# Each writes a file; the second entry is what the file holds.
FILES = {
    'gray.png': (lambda path: Image.fromarray(GRAY16).save(path), GRAY16),
    'gray.pgm': (lambda path: Image.fromarray(GRAY16).save(path), GRAY16),
    '8.pgm': (lambda path: Image.fromarray(GRAY8).save(path), GRAY8),
    'tiff.png': (lambda path: tifffile.imwrite(path, DEEP, photometric='minisblack', planarconfig='contig'), DEEP),
    'alpha.png': (lambda path: Image.fromarray(COLOUR).save(path), COLOUR[..., :3]),
    'palette.gif': (RGB.convert('P').save, np.asarray(RGB.convert('P').convert('RGB'))),
    'palette.tif': (RGB.convert('P').save, np.asarray(RGB.convert('P').convert('RGB'))),
    'cmyk.tif': (RGB.convert('CMYK').save, np.asarray(RGB.convert('CMYK').convert('RGB'))),
    'ycbcr.tif': (RGB.convert('YCbCr').save, np.asarray(RGB.convert('YCbCr').convert('RGB'))),
    'rgb.tif': (RGB.save, COLOUR[..., :3]),
    'lzw.tif': (lambda path: RGB.save(path, compression='tiff_lzw'), COLOUR[..., :3]),
    'zstd.tif': (lambda path: RGB.save(path, compression='zstd'), COLOUR[..., :3]),
    'lzw16.tif': (lambda path: Image.fromarray(GRAY16).save(path, compression='tiff_lzw'), GRAY16),
    'pages.tif': (lambda path: tifffile.imwrite(path, PAGES, photometric='minisblack'), PAGES.transpose(1, 2, 0)),
    'a page each.tif': (lambda path: write_pages(path, *PAGES), PAGES.transpose(1, 2, 0)),
    'planes.tif': (
        lambda path: tifffile.imwrite(path, PAGES, photometric='minisblack', planarconfig='separate'),
        PAGES.transpose(1, 2, 0),
    ),
    'bands.tiff': (
        lambda path: tifffile.imwrite(path, BANDS, photometric='minisblack', planarconfig='contig'),
        BANDS,
    ),
    'big.tif': (lambda path: tifffile.imwrite(path, GRAY16, byteorder='>', bigtiff=True), GRAY16),
    'overviews.tif': (write_with_overviews, GRAY16),
    'white.tif': (lambda path: tifffile.imwrite(path, GRAY8, photometric='miniswhite'), 255 - GRAY8),
    '1.png': (Image.fromarray(BITS).save, BITS * np.uint8(255)),
    '1.tif': (Image.fromarray(BITS).save, BITS * np.uint8(255)),
    '1.npy': (lambda path: np.save(path, BITS), BITS * np.uint8(255)),
    'white1.tif': (lambda path: tifffile.imwrite(path, BITS, photometric='miniswhite'), ~BITS * np.uint8(255)),
    'one.npy': (lambda path: np.save(path, BANDS[..., 0]), BANDS[..., 0]),
    'big.npy': (lambda path: np.save(path, GRAY16.astype('>u2')), GRAY16),
    'float.tif': (lambda path: tifffile.imwrite(path, BANDS[..., 0]), BANDS[..., 0]),
}


@pytest.mark.parametrize('name', FILES)
def test_values_and_depth(name, tmp_path):
    write, expected = FILES[name]
    write(tmp_path / name)
    found = read_image(tmp_path / name)
    np.testing.assert_array_equal(found, expected.reshape(20, 30, -1))
    assert found.dtype == expected.dtype
    if name in ('white.tif', '1.tif', '1.png', 'white1.tif'):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(found[..., 0], np.asarray(image.convert('L')))


def test_fewer_bits_than_the_type_fill_it(tmp_path):
    """Four bits are read as 0 to 255, as Pillow does. The file is written by hand: few programs write such files."""
    values = np.arange(16, dtype=np.uint8).reshape(1, 16)
    packed = bytes((values[0, ::2] << 4 | values[0, 1::2]).tolist())
    entries = [(256, 16), (257, 1), (258, 4), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 8)]
    directory = b''.join(
        tag.to_bytes(2, 'little') + b'\3\0\1\0\0\0' + value.to_bytes(4, 'little') for tag, value in entries
    )
    start = b'II*\0' + (16).to_bytes(4, 'little') + packed
    (tmp_path / '4.tif').write_bytes(start + len(entries).to_bytes(2, 'little') + directory + bytes(4))
    np.testing.assert_array_equal(read_image(tmp_path / '4.tif')[..., 0], 17 * values)


COLOURS = {
    'rgb.png': lambda path: write_png(path, DEEP[..., :3], 2),
    'rgba.png': lambda path: write_png(path, DEEP, 6),
    'rgb.ppm': lambda path: path.write_bytes(b'P6 30 20 65535\n' + DEEP[..., :3].astype('>u2').tobytes()),
}


@pytest.mark.parametrize('name', COLOURS)
def test_colour_of_16_bits_is_read_as_8_and_that_is_said(name, tmp_path):
    COLOURS[name](tmp_path / name)
    with pytest.warns(UserWarning, match='16-bit colour is read as 8 bits'):
        found = read_image(tmp_path / name)
    assert np.abs(found * 257.0 - DEEP[..., :3]).max() < 257


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('name', ['photo.png', 'deep.png', 'photo.tif', 'lzw.tif', 'photo.webp'])
def test_upright_by_exif(name, orientation, tmp_path):
    image = Image.fromarray(GRAY16) if name == 'deep.png' else RGB
    exif = image.getexif()
    exif[274] = orientation
    options = dict(compression='tiff_lzw') if name == 'lzw.tif' else dict(lossless=True) if 'webp' in name else {}
    image.save(tmp_path / name, exif=exif, **options)
    image.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / name), expected.reshape(*expected.shape[:2], -1))


def two_palettes(path):
    RGB.convert('P').save(path, save_all=True, append_images=[RGB.convert('P')])


REFUSED = {
    'differ.tif': (lambda path: write_pages(path, GRAY16, GRAY16[::2]), 'pages that differ, uint16 .* and uint16'),
    'depths.tif': (lambda path: write_pages(path, GRAY16, GRAY8), 'pages that differ, uint16 .* and uint8'),
    'palettes.tif': (two_palettes, 'several pages in colour space PALETTE'),
    'rgba.tif': (
        lambda path: Image.fromarray(COLOUR).save(path, compression='tiff_lzw'),
        'compression LZW of 8 bits needs a package: pip install imagecodecs',
    ),
    'pages.tif': (
        lambda path: Image.fromarray(GRAY8).save(
            path, save_all=True, append_images=[Image.fromarray(GRAY8)], compression='tiff_lzw'
        ),
        'compression LZW of 8 bits needs a package: pip install imagecodecs',
    ),
    'nan.tif': (lambda path: tifffile.imwrite(path, np.full((4, 5), np.nan, 'f4')), 'holds 20 values that are NaN'),
    'inf.npy': (lambda path: np.save(path, np.array([[1, np.inf], [0, 1e300]])), 'holds 2 values that are NaN'),
    'first.npy': (lambda path: np.save(path, np.zeros((3, 20, 20))), r'shape \(3, 20, 20\) seems to be \(C, H, W\)'),
    'complex.npy': (lambda path: np.save(path, np.zeros((3, 3), complex)), 'expected numbers of shape .* complex'),
    'text.npy': (lambda path: np.save(path, np.array([['a']])), 'expected numbers of shape'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, tmp_path):
    write, words = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=words):
        read_image(tmp_path / name)


def test_damaged_files_are_named_whatever_their_reader_raises(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    (tmp_path / 'empty.npy').touch()
    np.savez(tmp_path / 'several', array)
    (tmp_path / 'several.npz').rename(tmp_path / 'several.npy')
    tifffile.imwrite(tmp_path / 'zlib.tif', array, compression='zlib')
    data = (tmp_path / 'zlib.tif').read_bytes()
    (tmp_path / 'zlib.tif').write_bytes(data[:1000] + bytes(500) + data[1500:])
    (tmp_path / 'header.tif').write_bytes(b'II*\0\0\0\0\0')
    Image.fromarray(array).save(tmp_path / 'bomb.png')
    data = bytearray((tmp_path / 'bomb.png').read_bytes())
    data[16:24] = (60000).to_bytes(4, 'big') * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    (tmp_path / 'bomb.png').write_bytes(data)
    for path in tmp_path.iterdir():
        with pytest.raises(InputError):
            read_image(path)
