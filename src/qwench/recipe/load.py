"""Reading recipes: bundled ones by name, others by path; what is wrong with one, in words."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from qwench.errors import RecipeError
from qwench.recipe import gguf, graft, prune, rules, steps
from qwench.recipe.gguf import GGUF_TAG, TENSORS_TAG
from qwench.recipe.recipe import Recipe
from qwench.recipe.rules import Strict, suggestion


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
                f"there is no recipe file {path}", "give a path to a YAML file, or a name from `qwench recipes`"
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
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}", "mend the syntax at that line") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where} holds no mapping", "a recipe has the keys name, about and steps")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(
            f"recipe {where}:\n" + "\n".join(f"  {line}" for line in _explain(error)), "see docs/recipes.md"
        ) from None


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's complaints as lines that name the place, with a suggestion for unknown keys."""
    lines, said = list[str](), list[tuple[int | str, ...]]()
    for item in error.errors():
        within = any(place[: len(item["loc"])] == item["loc"] for place in said)
        if item["type"] == "default_factory_not_called" or (item["type"] == "too_short" and within):
            continue  # what follows from a complaint before it
        said.append(item["loc"])
        place = ".".join(str(p) for p in item["loc"] if p not in (GGUF_TAG, TENSORS_TAG))
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key{suggestion(str(item['loc'][-1]), _all_keys())}")
        else:
            lines.append(f"{place or 'recipe'}: {item['msg'].removeprefix('Value error, ')}")
    return lines


def _all_keys() -> list[str]:
    """Every key that some part of a recipe knows."""
    parts: list[type[BaseModel]] = [Recipe]
    for room in (rules, steps, gguf, graft, prune):
        parts += [found for found in vars(room).values() if isinstance(found, type) and issubclass(found, Strict)]
    return sorted({name for part in parts for name in part.model_fields})
