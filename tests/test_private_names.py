"""The linter's check that no private name crosses subpackages."""
import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def checker(tmp_path, monkeypatch):
    file = Path(__file__).parents[1] / 'tools' / 'private_names.py'
    spec = importlib.util.spec_from_file_location('private_names', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'ROOT', tmp_path / 't2t_timm')
    return module


@pytest.mark.parametrize('code, found', [
    ('from ..weights.download import (\n    reason,\n    _delete,\n)', 'weights.download._delete'),
    ('from ..models import _builder', 'models._builder'),
    ('from ..models._builder import build_t2t_vit as b', 'models._builder.build_t2t_vit'),
    ('def f():\n    import t2t_timm.models._builder', 'models._builder'),
    ('from ..weights import download as d\nd._delete()', 'weights.download._delete'),
    ('import t2t_timm.weights.download\nt2t_timm.weights.download._delete()', 'weights.download._delete'),
    ('from .cards import _card\nfrom . import _private\nfrom t2t_timm.hub._x import y', None),
    ('from timm.models._hub import x\nfrom ..errors import UserError\nself._x\nfrom .. import __version__', None),
])
def test_private_names_of_other_subpackages_are_found(checker, code, found):
    file = checker.ROOT / 'hub' / 'a.py'
    file.parent.mkdir(parents=True)
    file.write_text(code)
    cases = checker.crossings(file)
    assert [case.split(': ')[1] for case in cases] == ([] if found is None else [
        f't2t_timm.{found} is private to another subpackage'])
