"""Image files are found by their names, and read as browsers show them."""
import os
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from t2t_timm.commands.images import ImageReader, find_images, open_image
from t2t_timm.commands.pictures import read_image

PIXELS = np.arange(54, dtype=np.uint8).reshape(6, 9) * 4  # grey; no rotation or reflection leaves them as they are
FORMATS = ['png', 'jpg', 'jpeg', 'webp', 'bmp', 'tif', 'tiff', 'gif', 'avif']


@pytest.fixture
def model():
    return timm.create_model('test_t2t_vit').eval()


def test_names_and_globs(tmp_path):
    for name in ('b/2.jpg', 'b/c/1.PNG', 'a.txt', '[x].png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = str(tmp_path)
    assert find_images([folder]) == [f'{folder}/[x].png', f'{folder}/b/2.jpg', f'{folder}/b/c/1.PNG']
    assert find_images([f'{folder}/[x].png']) == [f'{folder}/[x].png']  # a name, though it looks like a glob
    assert find_images([f'{folder}/**/*.jpg', f'{folder}/*.gif']) == [f'{folder}/b/2.jpg', f'{folder}/*.gif']


def test_folders_give_images_and_name_the_rest(tmp_path, caplog):
    names = [f'b/{i}.{name}' for i, name in enumerate(FORMATS)] + ['B.PNG']
    for name in [*names, 'notes.txt', '.DS_Store', 'c/d', 'z.csv']:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([str(tmp_path)]) == sorted(os.path.join(tmp_path, name) for name in names)
    shown = ', '.join(os.path.join(tmp_path, name) for name in ('.DS_Store', 'c/d', 'notes.txt'))
    assert caplog.messages == [f'Skipped 4 that have no extension of an image: {shown} and 1 more.']


def test_links_of_a_folder(tmp_path, caplog):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / '1.png').touch()
    try:
        (tmp_path / 'a' / 'circle').symlink_to('..', target_is_directory=True)
        (tmp_path / 'a' / 'broken.png').symlink_to('nowhere')
        (tmp_path / 'a' / 'long.png').symlink_to(300 * 'x')  # to ask whether it is a file is an error of its own
        (tmp_path / 'a' / 'broken').symlink_to('nowhere')
        (tmp_path / 'b').symlink_to('a', target_is_directory=True)
    except OSError as e:
        pytest.skip(f'links cannot be made here; run it on Linux or macOS: {e}')
    image, broken, long = (str(tmp_path / 'a' / name) for name in ('1.png', 'broken.png', 'long.png'))
    assert find_images([str(tmp_path)]) == find_images([str(tmp_path / 'a' / '*.png')]) == [image, broken, long]
    assert caplog.messages == [f'Skipped 1 that has no extension of an image: {tmp_path / "a" / "broken"}.']
    with pytest.raises(ValueError, match='^No such file or directory$'):
        open_image(broken)


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


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', '1'])
def test_other_modes(tmp_path, mode):
    Image.new('RGB', (3, 2)).convert(mode).save(tmp_path / 'a.tiff')
    assert open_image(str(tmp_path / 'a.tiff')).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize('orientation, turned', [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.T), (6, lambda a: a[::-1].T), (7, lambda a: a[::-1, ::-1].T), (8, lambda a: a.T[::-1]),
])
def test_every_exif_orientation_for_every_command(tmp_path, model, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file, upright = str(tmp_path / 'a.png'), str(tmp_path / 'b.png')
    Image.fromarray(PIXELS).save(file, exif=exif)
    Image.fromarray(np.ascontiguousarray(turned(PIXELS))).save(upright)
    np.testing.assert_array_equal(np.asarray(open_image(file))[..., 0], turned(PIXELS))
    assert torch.equal(ImageReader(model)(file), ImageReader(model)(upright))
    assert read_image(file, model).tobytes() == read_image(upright, model).tobytes()


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_leaves_the_image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / 'a.png', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12')
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / 'a.png')))[..., 0], PIXELS)


@pytest.mark.parametrize(
    'mode, suffix', [('RGBA', 'png'), ('LA', 'png'), ('RGBA', 'tiff'), ('RGBA', 'gif'), ('RGBA', 'webp')])
def test_transparency_is_on_white(tmp_path, mode, suffix):
    image = Image.new('RGBA', (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (100, 100, 100, 255))
    image.putpixel((2, 0), (200, 200, 200, 0 if suffix == 'gif' else 51))  # 51 / 255 is a fifth
    image.convert(mode).save(tmp_path / f'a.{suffix}', **(dict(lossless=True) if suffix == 'webp' else {}))
    expected = [[255] * 3, [100] * 3, [255 if suffix == 'gif' else 244] * 3]
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / f'a.{suffix}')))[0], expected)


@pytest.mark.parametrize('suffix', ['png', 'tiff'])
def test_sixteen_bits(tmp_path, suffix):
    values = np.array([[0, 0x1234, 0x80ff, 0xffff]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f'a.{suffix}')
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / f'a.{suffix}')))[..., 0], values >> 8)


GREY = np.arange(256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize('values, tags', [
    (GREY * 16, {281: 4095}),  # 12 of 16 bits
    (GREY.astype(np.int32) * 16, {281: 4095}),
    (GREY.astype(np.int32) * 3 - 300, {340: -300, 341: 465}),
    ((GREY / 255).astype(np.float32), {341: 1.}),
    ((GREY / 255).astype(np.float32), {281: 1}),
    (65535 - GREY * 257, {262: 0}),  # white is 0
])
def test_a_tiff_may_say_which_value_is_white(tmp_path, values, tags):
    Image.fromarray(values).save(tmp_path / 'a.tif', tiffinfo=tags)
    np.testing.assert_allclose(np.asarray(open_image(str(tmp_path / 'a.tif')))[..., 0].astype(int), GREY, atol=1)


@pytest.mark.parametrize('values, tags, words', [
    (GREY.astype(np.int32), {}, '^its values are integers of 32 bits, .* which of them is white'),
    ((GREY / 255).astype(np.float32), {}, '^its values are .* or floating-point numbers, .* which of them is white'),
    (GREY * 16, {}, '^its largest value is 4,080 of 65,535, .* scale its values, or save it as a grey TIFF'),
    (GREY, {281: 0}, '^its tags say that 0 is black and 0 white$'),
    (np.full((2, 2), np.nan, np.float32), {341: 1.}, '^it has values that are not finite$'),
])
def test_values_of_unknown_range_are_refused(tmp_path, values, tags, words):
    Image.fromarray(values).save(tmp_path / 'a.tif', tiffinfo=tags)
    with pytest.raises(ValueError, match=words):
        open_image(str(tmp_path / 'a.tif'))


def write_png_of_16_bits(path, values):
    """Write colours, which Pillow writes with 8 bits alone."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    head = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def test_colours_of_16_bits(tmp_path):
    values = np.repeat(GREY[..., None], 3, axis=2)
    write_png_of_16_bits(tmp_path / 'a.png', values * 257)
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / 'a.png'))), values)
    write_png_of_16_bits(tmp_path / 'a.png', values * 16)
    with pytest.raises(ValueError, match='^its largest value is 3,855 of 65,535'):
        open_image(str(tmp_path / 'a.png'))
    write_png_of_16_bits(tmp_path / 'a.png', values * 0)  # black whatever its range is
    assert open_image(str(tmp_path / 'a.png')).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize('size', [(1, 60000), (60000, 1)])
def test_a_thin_image_is_not_resized(tmp_path, model, size):
    Image.new('L', size).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match=r'^it has [16]\S* x \S+ pixels .* limit of 178,956,970 in all: crop it$'):
        ImageReader(model)(str(tmp_path / 'a.png'))
    assert read_image(str(tmp_path / 'a.png'), model).size == (56, 56)  # cropped first
    Image.new('L', (size[0] // 100 or 1, size[1] // 100 or 1)).save(tmp_path / 'a.png')
    assert ImageReader(model)(str(tmp_path / 'a.png')).shape == (1, 3, 56, 56)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('mode', ['center', 'border', 'squash'])
def test_what_is_read_is_timms_transform(tmp_path, channels, mode):
    model = timm.create_model(
        'test_t2t_vit', in_chans=channels, img_size=(40, 56), pretrained_cfg_overlay=dict(crop_mode=mode, crop_pct=0.8))
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    config = timm.data.resolve_model_data_config(model, dict(input_size=(channels, 40, 56)))
    for name in ('mean', 'std') if channels == 1 else ():  # as timm's loader does
        config[name] = (np.mean(config[name]),)
    with Image.open(tmp_path / 'a.png') as image:
        expected = timm.data.create_transform(**config)(image.convert('L' if channels == 1 else 'RGB'))
    assert torch.equal(ImageReader(model)(str(tmp_path / 'a.png'))[0], expected)


@pytest.mark.parametrize('content', [b'', b'text', b'\x89PNG\r\n\x1a\n and no more', None])
def test_what_is_no_image(tmp_path, content):
    if content is not None:
        (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(ValueError) as e:
        open_image(str(tmp_path / 'a.png'))
    assert str(e.value) and '\n' not in str(e.value)
