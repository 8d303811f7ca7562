"""Files and folders that appear whole or not at all, and errors that name them."""
import errno

import pytest

from t2t_timm.files import check_target, folder_beside, is_part, new_file, new_folder


@pytest.fixture(params=[new_file, new_folder])
def new(request):
    return request.param


def write(path, new, text):
    with new(path) as part:
        assert part.parent == path.parent or new is new_folder
        (part / 'a' if new is new_folder else part).write_text(text)
        assert not (path.exists() and new is new_folder)


def test_appears_at_the_end_with_the_rights_of_any_other(tmp_path, new):
    write(tmp_path / 'x', new, 'text')
    assert [p.name for p in tmp_path.iterdir()] == ['x']
    (tmp_path / 'y').mkdir() if new is new_folder else (tmp_path / 'y').touch()
    assert (tmp_path / 'x').stat().st_mode == (tmp_path / 'y').stat().st_mode


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, new, error):
    if new is new_file:
        (tmp_path / 'x').write_text('old')
    with pytest.raises(error), new(tmp_path / 'x') as part:
        (part / 'a' if new is new_folder else part).write_text('half')
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == (['old'] if new is new_file else [])


def test_a_file_is_replaced_and_a_full_folder_is_not(tmp_path):
    write(tmp_path / 'x', new_file, 'old')
    write(tmp_path / 'x', new_file, 'new')
    assert (tmp_path / 'x').read_text() == 'new'
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'mine').touch()
    with pytest.raises(OSError) as e, new_folder(tmp_path / 'folder') as part:
        (part / 'a').touch()
    assert e.value.filename == str(tmp_path / 'folder')
    assert [p.name for p in (tmp_path / 'folder').iterdir()] == ['mine']
    assert len(list(tmp_path.iterdir())) == 2


def test_parts_are_told_from_other_files(tmp_path):
    with new_file(tmp_path / 'x', '.onnx') as part:
        assert part.suffix == '.onnx' and is_part(part.name)
        part.touch()
    assert not any(map(is_part, ('x', '.part', '.1.part', 'ILSVRC2012_val_00000001.JPEG', '.DS_Store')))


@pytest.mark.parametrize('begin', [new_file, new_folder, folder_beside])
@pytest.mark.parametrize('error', [None, RuntimeError, KeyError])
def test_a_full_disk_is_told_with_the_name_that_the_user_gave(tmp_path, file_limit, begin, error):
    file_limit(10_000)
    with pytest.raises(OSError) as e, begin(tmp_path / 'x') as part:
        try:
            (part if begin is new_file else part / 'a').write_bytes(bytes(20_000))
        except OSError:
            if error is None:
                raise
            raise error('a library says it in its own words') from None
    assert (e.value.errno, e.value.filename) == (errno.EFBIG, str(tmp_path / 'x'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('begin', [new_file, new_folder, folder_beside])
@pytest.mark.parametrize('error', [RuntimeError('a fault'), ConnectionRefusedError(errno.ECONNREFUSED, 'refused'),
                                   FileNotFoundError(errno.ENOENT, 'not there', 'another file')])
def test_other_errors_stay_what_they_are(tmp_path, begin, error):
    with pytest.raises(type(error)) as e, begin(tmp_path / 'x'):
        raise error
    assert e.value is error


def test_a_target_in_a_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr('os.access', lambda *args: False)  # whoever runs the tests may be allowed all
    with pytest.raises(PermissionError) as e:
        check_target(tmp_path / 'a.png', '.png')
    assert e.value.filename == str(tmp_path / 'a.png')
