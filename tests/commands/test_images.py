"""Image files are found by their names, and read as browsers show them."""
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from t2t_timm.commands.images import find_images, image_reader, open_image
from t2t_timm.commands.pictures import read_image

FORMATS = ['png', 'jpg', 'jpeg', 'webp', 'bmp', 'tif', 'tiff', 'gif', 'avif']


@pytest.fixture
def model():
    return timm.create_model('test_t2t_vit').eval()


@pytest.fixture
def pixels():
    """Grey pixels that no rotation or reflection leaves as they are, (6, 9)."""
    return np.arange(54, dtype=np.uint8).reshape(6, 9) * 4


def test_folders_give_images_and_name_the_rest(tmp_path, caplog):
    names = [f'b/{i}.{name}' for i, name in enumerate(FORMATS)] + ['B.PNG']
    for name in [*names, 'notes.txt', '.DS_Store', 'c/d', 'z.csv']:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([str(tmp_path)]) == sorted(os.path.join(tmp_path, name) for name in names)
    shown = ', '.join(os.path.join(tmp_path, name) for name in ('.DS_Store', 'c/d', 'notes.txt'))
    assert caplog.messages == [f'Skipped 4 that have no extension of an image: {shown}, ....']


@pytest.mark.parametrize('suffix', FORMATS)
def test_formats(tmp_path, suffix):
    color = (200, 40, 120)
    try:
        Image.new('RGB', (16, 16), color).save(tmp_path / f'a.{suffix}')
    except (KeyError, OSError) as e:
        pytest.skip(f'this Pillow writes no {suffix}; install its wheel from the package index: {e}')
    image = open_image(str(tmp_path / f'a.{suffix}'))
    assert image.mode == 'RGB'
    np.testing.assert_allclose(np.asarray(image).astype(int), np.broadcast_to(color, (16, 16, 3)), atol=4)


@pytest.mark.parametrize('orientation, turned', [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.T), (6, lambda a: a[::-1].T), (7, lambda a: a[::-1, ::-1].T), (8, lambda a: a.T[::-1]),
])
def test_every_exif_orientation_for_every_command(tmp_path, pixels, model, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file, upright = str(tmp_path / 'a.png'), str(tmp_path / 'b.png')
    Image.fromarray(pixels).save(file, exif=exif)
    Image.fromarray(np.ascontiguousarray(turned(pixels))).save(upright)
    np.testing.assert_array_equal(np.asarray(open_image(file))[..., 0], turned(pixels))
    assert torch.equal(image_reader(model)(file), image_reader(model)(upright))
    assert read_image(file, model).tobytes() == read_image(upright, model).tobytes()


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_leaves_the_image(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / 'a.png', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12')
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / 'a.png')))[..., 0], pixels)


@pytest.mark.parametrize(
    'mode, suffix', [('RGBA', 'png'), ('LA', 'png'), ('RGBA', 'tiff'), ('RGBA', 'gif'), ('RGBA', 'webp')])
def test_transparency_is_on_white(tmp_path, mode, suffix):
    image = Image.new('RGBA', (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (100, 100, 100, 255))
    image.convert(mode).save(tmp_path / f'a.{suffix}', **(dict(lossless=True) if suffix == 'webp' else {}))
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / f'a.{suffix}')))[0], [[255] * 3, [100] * 3])


def test_half_transparent(tmp_path):
    Image.new('RGBA', (1, 1), (200, 0, 100, 51)).save(tmp_path / 'a.png')  # 51 / 255 is a fifth
    assert open_image(str(tmp_path / 'a.png')).getpixel((0, 0)) == (244, 204, 224)


@pytest.mark.parametrize('suffix', ['png', 'tiff'])
def test_sixteen_bits(tmp_path, suffix):
    values = np.array([[0, 0x1234, 0x80ff, 0xffff]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f'a.{suffix}')
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / f'a.{suffix}')))[..., 0], values >> 8)


@pytest.mark.parametrize('content', [b'', b'text', b'\x89PNG\r\n\x1a\n and no more', None])
def test_what_is_no_image(tmp_path, content):
    if content is not None:
        (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(ValueError) as e:
        open_image(str(tmp_path / 'a.png'))
    assert str(e.value) and '\n' not in str(e.value)
