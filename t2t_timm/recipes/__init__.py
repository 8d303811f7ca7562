"""Training recipes: YAML files for timm's train.py --config."""
from pathlib import Path

from ..errors import UserError, suggestion

__all__ = ['recipe_names', 'recipe_path']

_DIR = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(path.stem for path in _DIR.glob('*.yaml'))


def recipe_path(name: str) -> str:
    """Return the path of a recipe's YAML file.

    Raises:
        UserError: No recipe of that name.
    """
    path = _DIR / f'{name}.yaml'
    if name not in recipe_names():
        raise UserError(
            f"No recipe named {name!r}; there are {', '.join(recipe_names())}.{suggestion(name, recipe_names())}")
    return str(path)
