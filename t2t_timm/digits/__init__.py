"""1,000 real handwritten digits, held out from the training of test_t2t_vit; tools/make_digits.py made the archive."""
import re
import shutil
import tarfile
from pathlib import Path

from ..errors import UserError
from ..files import check_new_folder, new_folder

__all__ = ['extract_heldout', 'heldout_names']

_ARCHIVE = Path(__file__).parent / 'heldout.tar'
_NAME = re.compile(r'\d_[a-z]+/\d{4}\.png')  # label and its name; row in the table the image came from


def heldout_names() -> list[str]:
    """Return the names of the held-out images, CLASS/ROW.png, sorted by label."""
    with tarfile.open(_ARCHIVE) as tar:
        return tar.getnames()


def extract_heldout(out_dir: str | Path) -> Path:
    """Write the held-out images as an ImageFolder, one folder per class in the order of the labels; return its path.

    Args:
        out_dir: Folder to write; made if missing.

    Raises:
        UserError: out_dir holds something already, is not a folder, or there is no folder to make it in.
    """
    out_dir = Path(out_dir)
    check_new_folder(out_dir)
    with new_folder(out_dir) as root, tarfile.open(_ARCHIVE) as tar:
        for member in tar:
            if not member.isreg() or not _NAME.fullmatch(member.name):
                raise UserError(f'{_ARCHIVE} holds {member.name!r}, which is not a digit: install t2t-timm again.')
            path = root / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # it is None for folders and links alone
            with source, open(path, 'wb') as target:
                shutil.copyfileobj(source, target)
    return out_dir
