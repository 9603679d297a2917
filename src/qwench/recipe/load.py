"""Reading recipes: bundled ones by name, others by path; what is wrong with one, in words."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from qwench.errors import RecipeError, suggestion, suggestion_beside
from qwench.recipe.complaints import explain
from qwench.recipe.recipe import Recipe
from qwench.recipe.written import read_yaml, yaml_mend


def bundled() -> dict[str, str]:
    """The recipes that the package carries: name -> YAML text."""
    folder = resources.files("qwench") / "recipes"
    return {p.name.removesuffix(".yaml"): p.read_text(encoding="utf-8") for p in folder.iterdir() if p.name.endswith(".yaml")}


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by path, or by the name of a bundled one. Raises RecipeError."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), where=str(path))
        except FileNotFoundError:
            raise RecipeError(
                f"there is no recipe file {path}{suggestion_beside(path)}",
                "give a path to a YAML file, or a name from `qwench recipes`",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}", "give a readable YAML file") from None
    known = bundled()
    if name_or_path not in known:
        raise RecipeError(
            f"there is no bundled recipe {name_or_path!r}{suggestion(name_or_path, list(known))}",
            f"use one of {', '.join(sorted(known))}, or the path of a YAML file",
        )
    return parse_recipe(known[name_or_path], where=name_or_path)


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text; `where` names it in errors. Raises RecipeError."""
    try:
        data = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}", yaml_mend(error)) from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where} holds no mapping", "a recipe has the keys name, about and steps")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(
            f"recipe {where}:\n" + "\n".join(f"  {line}" for line in explain(error)), "see docs/recipes.md"
        ) from None
