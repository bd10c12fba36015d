"""Images: the reader, the preparation as timm's, and folders in timm's order."""

import zlib

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform

from timm_harmonic.common import InputError
from timm_harmonic.common.images import ImageFolder, Preparation, batches_of, image_files, natural_order, read_image

pytestmark = [
    # timm's data set does not close files.
    pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning'),
    pytest.mark.filterwarnings('ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning'),
]


def network(channels=3):
    return timm.create_model('resnet10t', num_classes=3, in_chans=channels)


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
    prepare = Preparation(model, dict(img_size=32))
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


def test_order_is_timms():
    names = ['b', 'B', 'a10', 'a9', 'A1', 'a', '10', '9', 'x1y2', 'x1y10']
    assert sorted(names, key=natural_order) == sorted(sorted(names), key=timm.utils.natural_key)
    assert sorted(['1²3', '1a'], key=natural_order)  # timm's fails


def test_batches(folder):
    """In order, or drawn at random but always the same; a bad file is named."""
    images = ImageFolder(folder, 'validation', Preparation(network(), dict(img_size=32)))
    labels = [label for _, batch in batches_of(images, 5) for label in batch.tolist()]
    assert labels == images.labels
    first, again = ([pixels for pixels, _ in batches_of(images, 2, count=3)] for _ in range(2))
    assert [len(pixels) for pixels in first] == [2, 2, 2]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0][0], images[0][0])
    images.files[3].write_bytes(b'no image')
    with pytest.raises(InputError, match=rf'^{images.files[3]}: cannot identify image file .*$'):
        list(batches_of(images, 5))


@pytest.mark.parametrize('dtype', ['>u2', np.int16, np.float32])
def test_bands_are_scaled_and_normalised_one_by_one(dtype):
    model = network(5)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]
    prepare = Preparation(model, dict(img_size=32, crop_pct=1.0, mean=mean, std=std))
    scale = 1 if dtype is np.float32 else np.iinfo(dtype).max
    array = (np.random.default_rng(0).random((32, 40, 5)) * scale).astype(dtype)
    expected = (array[:, 4:36] / np.float32(scale) - np.float32(mean)) / np.float32(std)
    np.testing.assert_allclose(prepare(array).numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    with pytest.raises(InputError, match='the image has 3 channels, the network takes 5'):
        prepare(array[..., :3])
    with pytest.raises(InputError, match='mean has 2 values, the network takes 5 channels'):
        Preparation(model, dict(mean=[0.5, 0.5]))


def test_links(tmp_path):
    """One to a folder above is passed over, a broken one is no silent gap, a missing folder is named."""
    (tmp_path / 'loop').symlink_to(tmp_path)
    (tmp_path / 'broken.png').symlink_to(tmp_path / 'nothing.png')
    assert image_files(tmp_path) == [tmp_path / 'broken.png']
    with pytest.raises(InputError, match='cannot list'):
        image_files(tmp_path / 'nowhere')


def test_pictures_of_every_kind(tmp_path):
    random = np.random.default_rng(0)
    gray = random.integers(0, 65536, (20, 30, 1), dtype=np.uint16)
    colour = random.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    pages = random.integers(0, 65536, (5, 20, 30), dtype=np.uint16)
    bands = random.random((20, 30, 13)).astype(np.float32)
    image = Image.fromarray(colour[..., :3])
    palette = image.convert('P')
    Image.fromarray(gray[..., 0]).save(tmp_path / 'gray.png')
    Image.fromarray(colour).save(tmp_path / 'alpha.png')
    palette.save(tmp_path / 'palette.gif')
    palette.save(tmp_path / 'palette.tif')
    image.save(tmp_path / 'lzw.tif', compression='tiff_lzw')
    tifffile.imwrite(tmp_path / 'pages.tif', pages, photometric='minisblack')
    tifffile.imwrite(tmp_path / 'bands.tiff', bands, photometric='minisblack', planarconfig='contig')
    np.save(tmp_path / 'one.npy', bands[..., 0])
    expected = {
        'gray.png': gray,
        'alpha.png': colour[..., :3],
        'palette.gif': np.asarray(palette.convert('RGB')),
        'palette.tif': np.asarray(palette.convert('RGB')),
        'lzw.tif': colour[..., :3],
        'pages.tif': pages.transpose(1, 2, 0),
        'bands.tiff': bands,
        'one.npy': bands[..., :1],
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(read_image(tmp_path / name), array, err_msg=name)


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
