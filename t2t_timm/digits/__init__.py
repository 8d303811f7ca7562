"""1,000 real handwritten digits, held out from the training of test_t2t_vit; tools/make_digits.py made the archive."""
import tarfile
from pathlib import Path

from ..files import check_new_folder, new_folder

__all__ = ['extract_heldout']

_ARCHIVE = Path(__file__).parent / 'heldout.tar'  # CLASS/ROW.png: label and its name, row in the source's table


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
            path = root / member.name
            path.parent.mkdir(exist_ok=True)
            image = tar.extractfile(member)
            assert image is not None  # the archive has files alone
            path.write_bytes(image.read())
    return out_dir
