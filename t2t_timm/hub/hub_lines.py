"""The manifest's `hub:` lines, put into the text of a manifest; every other character of it stays as it is."""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..weights.manifest import YamlLoader

__all__ = ['known_hub_lines', 'with_hub_lines']


def known_hub_lines(text: str, names: Iterable[str], file: Path) -> dict[str, dict[str, Any]]:
    """Return what a manifest's text says of each architecture.tag's weights on the Hub, {} where it says nothing.

    Args:
        text: Text of the manifest.
        names: Architectures with their tags.
        file: Where the text is from, for messages.

    Raises:
        UserError: It is not the text of a manifest, or a name is not in it.
    """
    try:
        weights = yaml.load(text, YamlLoader)['weights']
        missing = [name for name in names if name not in weights]
        known = {name: weights[name].get('hub') or {} for name in names if name in weights}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{file} is not a manifest: it should be a copy of t2t_timm/weights/manifest.yaml.') from e
    if missing:
        raise UserError(f'{file} has no entry {", ".join(missing)}; it should be of the same version as this package.')
    return known


def with_hub_lines(text: str, name: str, lines: dict[str, Any]) -> str:
    """Return a manifest's text with what is known of an architecture.tag's weights on the Hub put in or replaced.

    Args:
        text: Text of the manifest.
        name: Architecture and tag, which has an entry.
        lines: sha256 and size of the weights.

    Raises:
        UserError: The entry is written in a way that the lines can't be put into.
    """
    expected = yaml.load(text, YamlLoader)
    if expected['weights'][name].get('hub') == lines:
        return text
    expected['weights'][name]['hub'] = lines
    hub = f'hub: {{{", ".join(f"{key}: {value}" for key, value in lines.items())}}}'
    start, end, added = _edit(text, name, hub, '\r\n' if '\r\n' in text else '\n')
    changed = text[:start] + added + text[end:]
    try:
        good = yaml.load(changed, YamlLoader) == expected
    except yaml.YAMLError:
        good = False
    if not good:
        raise UserError(f"The manifest's entry {name} is written in a way that its line can't be put into: {hub}")
    return changed


def _edit(text: str, name: str, added: str, newline: str) -> tuple[int, int, str]:
    """Return start and end of the text that the lines replace, and the lines with what stands around them there."""
    _, weights = _pair(yaml.compose(text, YamlLoader), 'weights')
    key, entry = _pair(weights, name)
    hub = _pair(entry, 'hub')
    if hub is not None:
        return hub[0].start_mark.index, _end(hub[1]).index, added
    if entry.flow_style:  # {a: b, c: d}: on a line of its own before the brace
        end = entry.end_mark.index - 1
        before = text[:end].rstrip()
        comma = '' if before.endswith((',', '{')) else ','
        return len(before), end, f'{comma}{newline}{" " * (key.start_mark.column + 2)}{added}'
    last = _end(entry)
    at = text.find('\n', last.index - (last.column == 0)) + 1  # a block scalar ends at the beginning of a line
    line = f'{" " * entry.value[0][0].start_mark.column}{added}{newline}'
    return (at, at, line) if at else (len(text), len(text), newline + line)


def _pair(mapping: Any, key: str) -> Any:
    # key and value nodes, as (yaml.Node, yaml.Node), or None; yaml's nodes tell nothing of what is in them
    return next((pair for pair in mapping.value if pair[0].value == key), None)


def _end(node: yaml.Node) -> yaml.Mark:
    # a block collection's own end lies beyond the comments and empty lines that follow it
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark
