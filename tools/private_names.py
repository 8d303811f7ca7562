"""Checks that no subpackage of t2t_timm imports a private name of another: one that begins with an underscore.

ruff's import-private-name looks at other packages only, import-linter at modules only.
"""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / 't2t_timm'


def imported(tree: ast.Module, package: list[str]) -> list[tuple[int, list[str], str]]:
    """Return of every import of the package its line, what it imports as a dotted path, and the name it is given."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split('.') if node.module else [])
            found += [(node.lineno, [*base, alias.name], alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split('.'), alias.asname or alias.name) for alias in node.names]
    return [case for case in found if case[1][0] == ROOT.name]


def crossings(file: Path) -> list[str]:
    """Return a sentence for every private name that a file imports from another subpackage, or reads of its module."""
    package = [ROOT.name, *file.relative_to(ROOT).parts[:-1]]
    own = package[1] if len(package) > 1 else file.stem
    tree = ast.parse(file.read_text(encoding='utf-8'))
    cases = []
    for line, path, name in imported(tree, package):
        if len(path) < 2 or path[1] == own:
            continue
        cases += [(line, path)] if any(is_private(part) for part in path) else []
        cases += [
            (node.lineno, [*path, node.attr]) for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) == name]
    place = file.relative_to(ROOT.parent)
    return [f'{place}:{line}: {".".join(path)} is private to another subpackage' for line, path in cases]


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.startswith('__')


if __name__ == '__main__':
    found = [case for file in sorted(ROOT.rglob('*.py')) for case in crossings(file)]
    sys.exit('\n'.join(found) or 0)
