"""hub: lines in the text of a manifest: where they go, and that nothing else changes."""
import difflib

import pytest
import yaml

from t2t_timm.errors import UserError
from t2t_timm.hub.hub_lines import known_hub_lines, with_hub_lines
from t2t_timm.weights.manifest import MANIFEST, load_manifest

LINES = {'sha256': '0a' * 32, 'size': 123}
HUB = f'hub: {{sha256: {"0a" * 32}, size: 123}}'
NAMES = list(load_manifest()['weights'])


@pytest.mark.parametrize('newline', ['\n', '\r\n'])
def test_every_entry_of_the_manifest(newline):
    text = before = MANIFEST.read_text(encoding='utf-8').replace('\n', newline)
    for i, name in enumerate(NAMES):
        text = with_hub_lines(text, name, dict(LINES, size=i))
    expected = yaml.safe_load(before)
    for i, name in enumerate(NAMES):
        expected['weights'][name]['hub'] = dict(LINES, size=i)
    assert yaml.safe_load(text) == expected
    assert text.count(newline) == text.count('\n')
    old, new = (t.splitlines(keepends=True) for t in (before, text))
    changes = [line for line in difflib.ndiff(old, new) if line[0] in '+-']
    removed = [line[2:].rstrip() for line in changes if line[0] == '-']
    assert all(line.startswith('  t2t_vit') and '{' in line for line in removed)  # entries of one line, no other
    for line in removed:  # ... which stay as they were up to their brace
        assert any(new_line.startswith(line[:line.rindex('}')] + ',') for new_line in new), line
    for i, name in enumerate(NAMES):  # and once more, with other values
        text = with_hub_lines(text, name, dict(LINES, size=i + 1))
    assert len(text.splitlines()) == len(new)
    assert with_hub_lines(text, NAMES[3], dict(LINES, size=4)) is text


@pytest.mark.parametrize('entry, expected', [
    ('{a: 1}  # why\n', f'{{a: 1,\n    {HUB}}}  # why\n'),
    ('{a: 1, }\n', f'{{a: 1,\n    {HUB}}}\n'),
    ('{\n    a: 1,\n  }\n', f'{{\n    a: 1,\n    {HUB}}}\n'),
    ('\n    a: 1  # one\n\n  # of the next\n', f'\n    a: 1  # one\n    {HUB}\n\n  # of the next\n'),
    ('\n    a: 1', f'\n    a: 1\n    {HUB}\n'),
    ('\n    a: [1,\n        2]\n', f'\n    a: [1,\n        2]\n    {HUB}\n'),
    ('\n    a: |\n      text\n', f'\n    a: |\n      text\n    {HUB}\n'),
    ('\n    hub: {sha256: x, size: 1}\n    a: 1\n', f'\n    {HUB}\n    a: 1\n'),
    ('\n    hub:\n      sha256: x\n      size: 1\n    a: 1\n', f'\n    {HUB}\n    a: 1\n'),
    ('{hub: {sha256: x, size: 1}, a: 1}\n', f'{{{HUB}, a: 1}}\n'),
])
@pytest.mark.parametrize('after', ['', '  other: {a: 2}\n'])
def test_layouts(entry, expected, after):
    text = 'weights:\n  name: '
    after = after if entry.endswith('\n') else ''
    assert with_hub_lines(text + entry + after, 'name', LINES) == text + expected + after


def test_an_entry_that_cannot_take_them_is_left_alone():
    with pytest.raises(UserError, match="entry name is written .* can't be put into: hub: "):
        with_hub_lines('weights:\n  name: {a: 1  # no comma\n  }\n', 'name', LINES)


@pytest.mark.parametrize('text, words', [
    ('', 'is not a manifest'),
    ('{', 'is not a manifest'),
    ('weights: [1]', 'has no entry t2t_vit_7.in1k'),
    ('weights: {t2t_vit_7.in1k: 1}', 'is not a manifest'),
    ('weights: {t2t_vit_10.in1k: {}}', 'has no entry t2t_vit_7.in1k'),
])
def test_what_is_no_manifest(text, words, tmp_path):
    with pytest.raises(UserError, match=words):
        known_hub_lines(text, ['t2t_vit_7.in1k'], tmp_path)
