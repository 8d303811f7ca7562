"""Files and folders that appear whole or not at all."""
import pytest

from t2t_timm.files import is_part, new_file, new_folder


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
    with pytest.raises(OSError), new_folder(tmp_path / 'folder') as part:
        (part / 'a').touch()
    assert [p.name for p in (tmp_path / 'folder').iterdir()] == ['mine']
    assert len(list(tmp_path.iterdir())) == 2


def test_parts_are_told_from_other_files(tmp_path):
    with new_file(tmp_path / 'x', '.onnx') as part:
        assert part.suffix == '.onnx' and is_part(part.name)
        part.touch()
    assert not any(map(is_part, ('x', '.part', '.1.part', 'ILSVRC2012_val_00000001.JPEG', '.DS_Store')))
