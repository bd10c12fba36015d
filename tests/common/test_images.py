"""Images as networks take them: the preparation is timm's, whatever the depth and the number of bands."""

import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform

from timm_harmonic.common import InputError
from timm_harmonic.common.images import DepthError, ImageFolder, Preparation, batches_of, scale_note

pytestmark = [
    # timm's data set does not close files.
    pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning'),
    pytest.mark.filterwarnings('ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning'),
    pytest.mark.filterwarnings('ignore:.*is passed over'),
]


def network(channels=3):
    return timm.create_model('resnet10t', num_classes=3, in_chans=channels)


def preparation(model, **given):
    return Preparation(model, given)


@pytest.fixture
def folder(tmp_path):
    """Classes whose order differs by number, by letter and by case, with images at several depths."""
    random = np.random.default_rng(0)
    for name in ('val/class10', 'val/class9', 'val/Apple', 'val/deep/zebra', 'val/.hidden', 'train/class9'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in (1, 2, 10):
            image = Image.fromarray(random.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
            image.convert('L' if i == 2 else 'RGB').save(tmp_path / 'images' / name / f'{i}.png')
    (tmp_path / 'images' / 'val' / 'empty').mkdir()
    (tmp_path / 'images' / 'val' / 'class9' / 'notes.txt').write_text('no image')
    (tmp_path / 'images' / 'val' / 'link').symlink_to(tmp_path / 'images' / 'train' / 'class9')
    return tmp_path / 'images'


def test_folders_are_timms(folder):
    """Files, classes and prepared images are those of timm's own loader, to the bit."""
    model = network()
    prepare = preparation(model, img_size=32)
    transform = create_transform(**timm.data.resolve_data_config(dict(img_size=32), model=model))
    for split in ('validation', 'val', 'train', 'nothing'):
        ours, theirs = ImageFolder(folder, split, prepare), create_dataset('', folder, split=split)
        shown = [i for i, name in enumerate(theirs.filenames()) if '.hidden' not in name]
        assert [str(path) for path in ours.files] == [theirs.filenames(absolute=True)[i] for i in shown]
        assert ours.classes == [name for name in theirs.reader.class_to_idx if name != '.hidden']
        for i in range(2):
            assert torch.equal(ours[i][0], transform(theirs[shown[i]][0]))
    with pytest.raises(InputError, match='no images in'):
        ImageFolder(folder / 'val' / 'empty', 'train', prepare)


def test_batches(folder):
    """In order, or drawn at random but always the same; a bad file is named."""
    images = ImageFolder(folder, 'validation', preparation(network(), img_size=32))
    labels = [label for _, batch in batches_of(images, 5) for label in batch.tolist()]
    assert labels == images.labels
    first, again = ([pixels for pixels, _ in batches_of(images, 2, slice(6))] for _ in range(2))
    assert [len(pixels) for pixels in first] == [2, 2, 2]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0][0], images[0][0])
    images.files[3].write_bytes(b'no image')
    with pytest.raises(InputError, match=rf'^{images.files[3]}: cannot identify image file .*$'):
        list(batches_of(images, 5))


def pixels(channels, height=40, width=56):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize('dtype', ['>u2', np.int16, np.float32, np.int32])
def test_bands_are_scaled_and_normalised_one_by_one(dtype):
    model = network(5)
    scale = 1000.0 if np.dtype(dtype).itemsize == 4 else None
    given = dict(mean=[0.1, 0.2, 0.3, 0.4, 0.5], std=[0.5, 0.4, 0.3, 0.2, 0.1], scale=scale)
    prepare = preparation(model, img_size=32, crop_pct=1.0, **given)
    full = np.float32(scale or np.iinfo(dtype).max)
    array = (np.random.default_rng(0).random((32, 40, 5)) * full).astype(dtype)
    expected = (array[:, 4:36] / full - np.float32(given['mean'])) / np.float32(given['std'])
    np.testing.assert_allclose(prepare(array).numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    with pytest.raises(InputError, match='the image has 3 channels, the network takes 5'):
        prepare(array[..., :3])
    with pytest.raises(InputError, match='mean has 2 values, the network takes 5 channels'):
        preparation(model, mean=[0.5, 0.5])
    with pytest.raises(InputError, match='std must be finite numbers above 0, got'):
        preparation(model, std=[0.0])


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic', 'lanczos'])
@pytest.mark.parametrize('crop', [dict(crop_pct=0.8), dict(crop_mode='squash'), dict(crop_mode='border', crop_pct=0.9)])
def test_every_depth_and_number_of_bands_is_prepared_as_8_bit_colour_is(crop, interpolation):
    """Up to the rounding to 8 bits, which cuts off what overshoots: crop mode, size, interpolation are the config's."""
    given = dict(img_size=24, interpolation=interpolation, mean=[0.4, 0.5, 0.6], std=[0.3, 0.2, 0.25], **crop)
    colour, array = preparation(network(), **given), 64 + pixels(3) // 2
    expected = colour(array)
    same = dict(atol=2.1 / 255 / 0.2, rtol=0)
    torch.testing.assert_close(colour(array.astype(np.uint16) * 257), expected, **same)
    scaled = preparation(network(), scale=2.0, **given)(array / 255 * 2)
    if interpolation in ('nearest', 'bilinear'):  # the others overshoot, and only 8 and 16 bits are cut off
        torch.testing.assert_close(scaled, expected, **same)
    for key in ('mean', 'std'):
        given[key] = given[key] * 2
    bands = preparation(network(6), **given)(np.concatenate([array, array], 2))
    torch.testing.assert_close(bands, torch.cat([expected, expected]), **same)


def test_gray_and_colour_of_any_depth_fit_either_network():
    array, given = 64 + pixels(3) // 2, dict(img_size=32, crop_pct=1.0)
    for channels, bands in ((3, array[..., :1]), (1, array)):
        prepare = preparation(network(channels), **given)
        found = prepare(bands.astype(np.uint16) * 257)
        torch.testing.assert_close(found, prepare(bands), atol=3 / 255 / 0.22, rtol=0)


def test_more_than_8_bits_without_a_stated_scale_are_a_warning(tmp_path):
    """Networks that timm trained have seen 8 bits alone."""
    model = network()
    np.save(tmp_path / 'a.npy', pixels(3).astype(np.uint16) * 257)
    with pytest.warns(UserWarning, match=r'a\.npy holds uint16 and was divided by 65535.* state it by --scale'):
        preparation(model).read(tmp_path / 'a.npy')
    preparation(model, scale=65535).read(tmp_path / 'a.npy')


def test_scale_is_stated_once(tmp_path):
    """Floats and wide integers need one. A network's config keeps it, what is given counts more."""
    model = network(2)
    for dtype in (np.float16, np.float64, np.int32, np.uint32, np.int64):
        with pytest.raises(DepthError, match=f'holds {np.dtype(dtype)}: .* --scale 1 for'):
            preparation(model)(np.zeros((40, 40, 2), dtype))
    array = np.random.default_rng(0).integers(0, 10000, (40, 40, 2))
    expected = preparation(model, scale=10000.0)(array)
    model.pretrained_cfg['notes'] = ('measured', scale_note(10000))
    for dtype in (np.uint16, np.int32, np.float32):
        torch.testing.assert_close(preparation(model)(array.astype(dtype)), expected)
    torch.testing.assert_close(preparation(model, scale=5000.0)(array // 2), expected, atol=1e-3, rtol=0)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    torch.testing.assert_close(preparation(loaded)(array), expected)
    for wrong in (0, -1.0, float('nan')):
        with pytest.raises(InputError, match='scale must be a number above 0'):
            preparation(model, scale=wrong)


@pytest.mark.parametrize(('first', 'second'), [('u1', 'u2'), ('u2', 'i2'), ('u1', 'f4')])
def test_images_of_two_depths_are_an_error_that_names_both(first, second, tmp_path):
    for name, dtype in dict(a=first, b=second).items():
        np.save(tmp_path / f'{name}.npy', pixels(3).astype(dtype))
    images = ImageFolder(tmp_path, 'train', preparation(network(), img_size=32, scale=255.0))
    with pytest.raises(DepthError, match=r'a\.npy holds u?int\d+, .*b\.npy holds .*: images must have one depth'):
        list(batches_of(images, 1))


@pytest.mark.parametrize('change', ['scale', 'dark', 'bright', 'none'])
def test_what_is_far_from_training_is_a_warning(change, tmp_path):
    """Once, for the first such image."""
    array = np.random.default_rng(0).normal(0.4, 0.2, (40, 40, 3)).clip(0, 1)
    array = dict(scale=array * 255, dark=array * 0, bright=array + 3, none=array)[change].astype(np.float32)
    prepare = preparation(network(), img_size=32, scale=1.0)
    for name in 'ab':
        np.save(tmp_path / f'{name}.npy', array)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for name in 'ab':
            prepare.read(tmp_path / f'{name}.npy')
    assert len(caught) == (change != 'none')
    for warning in caught:
        words = ('a.npy is not like the training images: divided by 1, less the mean 0.4', 'instead of about 0 and 1')
        assert all(part in str(warning.message) for part in words)
