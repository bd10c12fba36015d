"""One reader of image files: pixels with the values and the type that the file has, upright, with all its bands."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from . import InputError, require

_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # how files begin
READABLE = {'.npy', *Image.registered_extensions()}  # extensions that `read_image` knows
# Colour spaces of TIFF that Pillow turns into RGB: palette, CMYK, YCbCr and three of L*a*b*.
_CONVERTED = (3, 5, 6, 8, 9, 10)


def read_image(path: Path) -> np.ndarray:
    """Reads an image as (H, W, C), with the file's own values. The type tells their depth; 1 bit becomes 0 and 255.

    Images are turned upright by their EXIF orientation. Gray images have one channel, other colour spaces become RGB,
    an alpha channel is dropped. TIFF files keep all samples, bands and pages as channels. Raises InputError if the file
    is not an image, its pages differ, or it holds values that are not finite in float32.
    """
    try:
        if path.suffix.lower() == '.npy':
            array = np.load(path, allow_pickle=False)
        else:
            with path.open('rb') as file:
                array = (_read_tiff if file.read(4) in _TIFF else _read_picture)(path)
    except Exception as error:  # readers raise anything for a damaged file; ours keeps its message
        raise InputError(str(error) or type(error).__name__) from error
    if not isinstance(array, np.ndarray):
        raise InputError('holds several arrays: save each to its own file')
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in 'buif':
        raise InputError(f'expected numbers of shape (H, W) or (H, W, C), got {array.dtype} of shape {array.shape}')
    if array.shape[0] != array.shape[1] == array.shape[2]:
        raise InputError(f'shape {array.shape} seems to be (C, H, W): save it as (H, W, C)')
    if array.dtype == bool:
        array = array * np.uint8(255)
    with np.errstate(over='ignore'):
        bad = np.count_nonzero(~np.isfinite(array.astype(np.float32)))
    if bad:
        raise InputError(f'holds {bad} values that are NaN, infinite or not finite in float32')
    return array.astype(array.dtype.newbyteorder('='), copy=False)


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        raw = str(image.tile[0].args) if image.tile else ''
        deep = dict(PNG=r';16B$', PPM=r', (?!255\))\d+\)$').get(str(image.format))
        if deep and image.mode in ('RGB', 'RGBA') and re.search(deep, raw):
            warnings.warn('16-bit colour is read as 8 bits, as in timm: save TIFF or .npy to keep all.', stacklevel=2)
        image.load()  # Pillow turns some formats upright by itself, once they are loaded
        upright = ImageOps.exif_transpose(image)
        if image.mode in ('1', 'LA', 'La'):
            return np.asarray(upright.convert('L'))
        if image.mode == 'I' and image.format in ('PNG', 'PPM'):  # Pillow may widen their 16 bits to 32
            return np.asarray(upright).astype(np.uint16)
        if image.mode.startswith(('I', 'F', 'L')) and image.mode != 'LAB':  # gray, 8 to 32 bits
            return np.asarray(upright)
        return np.asarray(upright.convert('RGB'))


def _read_tiff(path: Path) -> np.ndarray:
    require(tifffile='tifffile')
    import tifffile

    with tifffile.TiffFile(path) as file:
        # Without overviews and masks.
        series = [of for of in file.series if not (of.keyframe.is_reduced or of.keyframe.is_mask)] or file.series[:1]
        page: Any = series[0].keyframe
        if kinds := sorted({_kind(of) for of in series[1:]} - {_kind(series[0])}):
            raise InputError(f'has pages that differ, {_kind(series[0])} and {kinds[0]}: save each to its own file')
        alone = len(series) == 1 and len(series[0]) == 1
        if page.photometric in _CONVERTED:
            if not alone:
                raise InputError(f'has several pages in colour space {page.photometric.name}: save each as RGB')
            return _read_picture(path)
        try:
            arrays = [_channels_last(of.asarray(), of.axes) for of in series]
        except Exception as error:  # tifffile raises several types where a decoder is missing
            if not isinstance(error, ImportError) and 'imagecodecs' not in str(error):
                raise
            # Bits up to which Pillow gives the same values, by number format (integer, float) and channels.
            simple = {(1, 1): 16, (1, 3): 8, (3, 1): 32}.get((page.sampleformat, page.samplesperpixel), 0)
            if alone and page.bitspersample <= simple:
                return _read_picture(path)
            what = f'its compression {page.compression.name} of {page.bitspersample} bits'
            raise InputError(f'{what} needs a package: pip install imagecodecs') from error
    array = np.concatenate(arrays, 2)
    if array.dtype.kind == 'u' and page.bitspersample < 8 * array.itemsize:  # 2, 4, 10, 12 or 14 bits
        array = (array * (np.iinfo(array.dtype).max / (2**page.bitspersample - 1))).round().astype(array.dtype)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype in (bool, np.uint8):
        array = ~array  # as Pillow does, which leaves 16 bits alone
    return _upright(array, page.tags.valueof('Orientation', 1))


def _kind(series: Any) -> str:
    return f'{series.dtype} {series.shape} {series.axes}'


def _channels_last(array: np.ndarray, axes: str) -> np.ndarray:
    """Moves rows and columns to the front; samples, pages and planes become channels."""
    array = np.moveaxis(array, (axes.index('Y'), axes.index('X')), (0, 1))
    return array.reshape(*array.shape[:2], -1)


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turns (H, W, C) by an orientation of EXIF, 1 to 8; others mean nothing."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array
