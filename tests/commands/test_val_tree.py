"""ImageNet's validation set as it is handed out, in small: real JPEGs, some of the 1,000 classes."""
import io
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image
from timm.data import ImageNetInfo, create_dataset

from t2t_timm.cli import main
from t2t_timm.commands.val_tree import val_tree
from t2t_timm.files import sole_writer

SYNSETS = ImageNetInfo('imagenet-1k').label_names()
LABELS = {
    f'ILSVRC2012_val_{i:08d}.JPEG': label
    for i, label in enumerate((65, 970, 230, 0, 516, 999, 65, 334, 1, 998, 500, 0), 1)}
NAMES = list(LABELS)


def jpeg(seed, **kwargs):
    pixels = np.random.RandomState(seed).randint(0, 256, (20 + seed, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG', **kwargs)
    return buffer.getvalue()


IMAGES = {name: jpeg(i) for i, name in enumerate(NAMES)}


def write_list(labels, form='{name} {label}'):
    lines = (form.format(name=name, label=label, synset=SYNSETS[label]) for name, label in labels.items())
    Path('val.txt').write_text('\n'.join(lines) + '\n')


def write_tar(path, members, mode='w'):
    """Write a tar; members are names and data, or TarInfo."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_folder(path, images):
    for name, data in images:
        (Path(path) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(path) / name).write_bytes(data)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


def expected():
    tree = {f'{SYNSETS[label]}/{name}': IMAGES[name] for name, label in LABELS.items()}
    return {**tree, 'class_map.txt': ''.join(f'{synset}\n' for synset in SYNSETS).encode()}


def timm_labels(folder, class_map=''):
    reader = create_dataset('', folder, class_map=class_map).reader
    return {os.path.basename(file): label for file, label in reader.samples}


@pytest.fixture(autouse=True)
def handed_out(tmp_path, monkeypatch):
    """The folder flat, ILSVRC2012_img_val.tar and val.txt, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_list(LABELS)
    write_folder('flat', IMAGES.items())
    write_tar('ILSVRC2012_img_val.tar', IMAGES.items())
    return tmp_path


@pytest.fixture
def mistake(handed_out, mistake):
    """A function that runs the command, which must fail and change nothing, and returns its message."""
    def mistake_in_the_tree(*argv):
        before = files(handed_out), sorted(handed_out.rglob('*'))
        message = mistake('val-tree', *argv)
        assert (files(handed_out), sorted(handed_out.rglob('*'))) == before
        return message
    return mistake_in_the_tree


@pytest.mark.parametrize('source', ['flat', 'ILSVRC2012_img_val.tar'])
def test_all_classes(source):
    values = np.random.RandomState(0).permutation(np.arange(2000) % 1000).tolist()
    labels = {f'ILSVRC2012_val_{i:08d}.JPEG': label for i, label in enumerate(values, 2)}
    write_list(labels)
    images = [(name, IMAGES[NAMES[i % 12]]) for i, name in enumerate(labels)]
    for file in Path('flat').iterdir():
        file.unlink()
    write_folder('flat', images)
    write_tar('ILSVRC2012_img_val.tar', images)
    text = val_tree(source, 'val.txt', 'imagenet/val')
    assert re.fullmatch(r'imagenet/val: 2,000 images in 1,000 of 1,000 classes, 2,000 (linked|extracted)\.', text)
    dataset = create_dataset('', 'imagenet')  # finds val in it, as validate.py does
    assert dataset.reader.class_to_idx == {synset: i for i, synset in enumerate(SYNSETS)}
    assert timm_labels('imagenet') == labels
    assert not list(Path('imagenet').rglob('class_map.txt'))


@pytest.mark.parametrize('source', ['flat', 'ILSVRC2012_img_val.tar'])
def test_some_classes_need_the_class_map(source, capsys):
    assert main(['val-tree', source, 'val.txt', 'val']) == 0
    out = capsys.readouterr().out
    assert out.startswith('val: 12 images in 10 of 1,000 classes, 12 ') and '--class-map val/class_map.txt' in out
    assert files('val') == expected()
    assert timm_labels('val', 'val/class_map.txt') == timm_labels('val', 'class_map.txt') == LABELS
    assert timm_labels('val') != LABELS
    assert sorted(os.listdir()) == ['ILSVRC2012_img_val.tar', 'flat', 'val', 'val.txt']


@pytest.mark.parametrize('mode', ['gz', 'bz2', 'xz'])
def test_compressed_tar(mode):
    write_tar('val.tar.any', reversed(IMAGES.items()), f'w:{mode}')
    assert '12 extracted' in val_tree('val.tar.any', 'val.txt', 'val')
    assert files('val') == expected()


def test_links_hold_when_both_are_moved(handed_out):
    val_tree('flat', handed_out / 'val.txt', 'a/b/val')
    link = Path('a/b/val', SYNSETS[65], NAMES[0])
    assert os.readlink(link) == f'../../../../flat/{NAMES[0]}'
    (handed_out / 'moved').mkdir()
    os.rename('flat', 'moved/flat')
    os.rename('a', 'moved/a')
    assert files('moved/a/b/val') == expected()


def test_copies_without_links(monkeypatch):
    def no_links(*args):
        raise OSError('not here')
    monkeypatch.setattr(os, 'symlink', no_links)
    assert '12 copied' in val_tree('flat', 'val.txt', 'val')
    assert files('val') == expected() and not any(p.is_symlink() for p in Path('val').rglob('*'))


@pytest.mark.parametrize('form', [
    'val/{name} {label}', 'val/{synset}/{name} {label}', 'val\\{synset}\\{name}\t{label}', '{name} {label:03d}\r\n',
    'val/{name:.23}.jpeg {label}'])  # as older Paddle lists are
def test_forms_of_the_list(form):
    write_list(LABELS, form)
    Path('val.txt').write_bytes('\ufeff'.encode() + Path('val.txt').read_bytes())  # the mark of Windows
    val_tree('ILSVRC2012_img_val.tar', 'val.txt', 'val')
    assert files('val') == expected()


@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_images_in_folders_of_their_class(kind):
    images = [(f'ILSVRC2012/val/{SYNSETS[LABELS[name]]}/{name}', data) for name, data in IMAGES.items()]
    images += [('ILSVRC2012/readme.md', b'no image'), ('ILSVRC2012/._a.JPEG', b'what a system hides')]
    write_folder('folder', images)
    write_tar('tar', images)
    val_tree(kind, 'val.txt', 'val')
    assert files('val') == expected()


def test_members_go_nowhere_else(tmp_path):
    paths = ['../../{}', '/{}', './a/../../{}', '..//{}'] * 3
    write_tar('evil.tar', [(path.format(name), IMAGES[name]) for path, name in zip(paths, NAMES, strict=True)])
    before = files(tmp_path)
    val_tree('evil.tar', 'val.txt', 'val')
    assert files('val') == expected()
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith('val/')} == before
    assert sorted(p.name for p in tmp_path.parent.glob('*.JPEG')) == []


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_member_that_is_no_file(mistake, kind):
    info = tarfile.TarInfo(NAMES[3])
    info.type, info.linkname = kind, '../val.txt'
    write_tar('a.tar', [(name, data) for name, data in IMAGES.items() if name != NAMES[3]] + [(info, b'')])
    assert f"Empty, or no regular file: 1 ('{NAMES[3]}')" in mistake('a.tar', 'val.txt', 'val')


def test_again_does_nothing(capsys):
    for source in ('ILSVRC2012_img_val.tar', 'flat'):
        assert main(['val-tree', source, 'val.txt', 'val']) == 0
        stamps = {p: p.stat().st_mtime_ns for p in [Path('val'), *Path('val').rglob('*')]}
        capsys.readouterr()
        assert main(['val-tree', source, 'val.txt', 'val']) == 0
        assert 'complete already, nothing to do' in capsys.readouterr().out
        assert {p: p.stat().st_mtime_ns for p in [Path('val'), *Path('val').rglob('*')]} == stamps


def test_lost_and_cut_images_are_put_back():
    val_tree('ILSVRC2012_img_val.tar', 'val.txt', 'val')
    kept = Path('val', SYNSETS[65], NAMES[0]).stat().st_mtime_ns
    Path('val', SYNSETS[970], NAMES[1]).unlink()
    Path('val', SYNSETS[230], NAMES[2]).write_bytes(IMAGES[NAMES[2]][:100])
    assert '12 images in 10 of 1,000 classes, 2 extracted' in val_tree('ILSVRC2012_img_val.tar', 'val.txt', 'val')
    assert files('val') == expected()
    assert Path('val', SYNSETS[65], NAMES[0]).stat().st_mtime_ns == kept


def test_two_at_once(capsys):
    part = Path('val.incomplete', f'.{"0" * 16}.part')
    part.parent.mkdir()
    part.touch()
    with sole_writer(Path('val')):
        assert main(['val-tree', 'flat', 'val.txt', 'val']) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f't2t-timm val-tree: Another command is writing to {Path("val").resolve()}: wait until it has ended.')
    assert part.exists()  # what the other one is writing
    assert main(['val-tree', 'flat', 'val.txt', 'val']) == 0
    assert files('val') == expected() and not list(Path().glob('.val*'))


@pytest.mark.parametrize('existing', ['folder', 'link'])
def test_into_an_empty_folder(tmp_path, existing):
    (tmp_path / 'disk').mkdir()
    if existing == 'folder':
        Path('val').mkdir()
    else:
        Path('val').symlink_to('disk')
    val_tree('flat', 'val.txt', 'val')
    assert files('val') == expected() and Path('val').is_symlink() == (existing == 'link')
    assert not list(tmp_path.glob('*.incomplete'))


@pytest.mark.slow
def test_killed_and_run_again():
    script = '''
import os, signal
from t2t_timm.cli import main
replace, count = os.replace, 0
def kill_at_the_sixth(part, path):
    global count
    count += 1
    if count == 6:
        os.truncate(part, 50)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = kill_at_the_sixth
main(['val-tree', 'ILSVRC2012_img_val.tar', 'val.txt', 'val'])
'''
    assert warm.run(script).returncode == -signal.SIGKILL
    assert not Path('val').exists()
    images = list(Path('val.incomplete').rglob('*.JPEG'))
    assert len(images) == 5 and len([p for p in Path('val.incomplete').rglob('*.part')]) == 1
    kept = {p.relative_to('val.incomplete'): (p.stat().st_ino, p.stat().st_mtime_ns) for p in images}
    assert '12 images in 10 of 1,000 classes, 7 ' in val_tree('ILSVRC2012_img_val.tar', 'val.txt', 'val')
    assert files('val') == expected() and not Path('val.incomplete').exists()
    assert {p: (Path('val', p).stat().st_ino, Path('val', p).stat().st_mtime_ns) for p in kept} == kept


@pytest.mark.parametrize('text, words', [
    ('a.JPEG 1\nb.JPEG\nc.JPEG 1 2\nd.JPEG 1.5\ne.JPEG\u0661 1\nf.txt 1\n',
     "Unreadable lines: 5 (line 2 'b.JPEG', line 3 'c.JPEG 1 2', line 4 'd.JPEG 1.5' and 2 more)"),
    ('a.JPEG 1000\nb.JPEG -1\nc.JPEG 0\n', "Labels outside 0 to 999: 2 (line 1 'a.JPEG 1000', line 2 'b.JPEG -1')"),
    ('a.JPEG 1000\nb.JPEG 1\n', "(line 1 'a.JPEG 1000'). The labels seem to be counted from 1; timm counts from 0"),
    ('a.JPEG 1\n\nval/a.jpeg 1\n', "Names listed twice: 1 (line 3 'val/a.jpeg 1')"),
    ('val/n01751748/a.JPEG 66\n', f"Labels of another class than the path's: 1 (line 1 'val/n01751748/a.JPEG 66', "
                                  f'66 is {SYNSETS[66]})'),
    ('490\n361\n171\n', 'labels without names, like those of the devkit: 3 ('),
    ('ILSVRC2012_val_00000001.JPEG 489\nILSVRC2012_val_00000002.JPEG 0\n', "Labels in the devkit's order: 1 ("),
    ('\n \n', 'It is empty.'),
], ids=['unreadable', 'range', 'from 1', 'twice', 'path', 'bare', 'devkit', 'empty'])
def test_mistakes_in_the_list(mistake, text, words):
    Path('val.txt').write_text(text, encoding='utf-8')
    for source in ('flat', 'ILSVRC2012_img_val.tar'):
        message = mistake(source, 'val.txt', 'val')
        assert words in message and '"NAME.JPEG LABEL", labels 0 to 999' in message


@pytest.mark.parametrize('kind', ['folder', 'tar'])
@pytest.mark.parametrize('images, words', [
    (list(IMAGES.items())[5:], f": 5 ('{NAMES[0]}', '{NAMES[1]}', '{NAMES[2]}' and 2 more)"),
    ([*IMAGES.items(), ('a.jpg', b'more'), ('b/c.PNG', b'more')], "Not in the list: 2 ("),
    ([*IMAGES.items(), (f'b/{NAMES[0]}', b'more')], f"There twice: 1 ('{NAMES[0]}')"),
    ([*list(IMAGES.items())[1:], (NAMES[0], b'')], f"Empty, or no regular file: 1 ('{NAMES[0]}')"),
    ([*list(IMAGES.items())[1:], (f'{SYNSETS[66]}/{NAMES[0]}', b'a')],
     f"In another class's folder: 1 ('{SYNSETS[66]}/{NAMES[0]}', in the list {SYNSETS[65]})"),
    ([], ': 12 ('),
], ids=['missing', 'extra', 'twice', 'empty', 'class', 'none'])
def test_mistakes_in_the_images(mistake, kind, images, words):
    Path('folder').mkdir()
    write_folder('folder', images)
    write_tar('tar', images)
    message = mistake(kind, 'val.txt', 'val')
    assert 'Nothing was written' in message and words in message


@pytest.mark.parametrize('part', [0.02, 0.3, 0.6])
@pytest.mark.parametrize('mode', ['', 'gz', 'bz2', 'xz'])
def test_tar_that_is_cut_off(mistake, mode, part):
    write_tar('whole', [(name, jpeg(i, quality=95)) for i, name in enumerate(NAMES)], f'w:{mode}')
    whole = Path('whole').read_bytes()
    Path('cut').write_bytes(whole[:int(part * len(whole))])
    message = mistake('cut', 'val.txt', 'val')
    # tarfile takes a cut between two images for the end
    assert re.search('damaged or cut off: name|is the tar complete', message)


@pytest.mark.parametrize('argv, words', [
    (['none', 'val.txt', 'val'], 'none: No such file or directory.'),
    (['flat', 'none', 'val'], 'none: No such file or directory.'),
    (['val.txt', 'val.txt', 'val'], 'val.txt is no readable tar, or it is damaged or cut off'),
    (['flat', 'ILSVRC2012_img_val.tar', 'val'], 'ILSVRC2012_img_val.tar is not a text file'),
    (['flat', 'val.txt', 'val.txt'], 'val.txt is not a folder: name a new one'),
    (['flat', 'val.txt', 'flat/val'], 'flat/val lies in flat'),
    (['flat', 'val.txt', 'flat'], 'flat lies in flat'),
    (['ILSVRC2012_img_val.tar', 'val.txt', '.'], '. contains the current folder'),
    (['ILSVRC2012_img_val.tar', 'val.txt', 'flat'], 'flat has something else in it: take that out, or name a new'),
])
def test_mistakes_in_the_arguments(mistake, argv, words):
    assert words in mistake(*argv)


@pytest.mark.parametrize('header', ['size', 'GNU.sparse.size'])
@pytest.mark.parametrize('index', [0, 1])
def test_a_tar_with_a_word_where_a_number_belongs(mistake, header, index):
    info = tarfile.TarInfo(NAMES[index])
    info.pax_headers = {header: 'many', 'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'}
    write_tar('bad.tar', [(name, data) if name != info.name else (info, data) for name, data in IMAGES.items()])
    assert 'bad.tar is no readable tar, or it is damaged or cut off' in mistake('bad.tar', 'val.txt', 'val')


def test_another_list_does_not_go_on(mistake):
    write_folder('val.incomplete', [(f'{SYNSETS[66]}/{NAMES[0]}', IMAGES[NAMES[0]])])
    assert 'val.incomplete has something else in it: take that out' in mistake('flat', 'val.txt', 'val')
