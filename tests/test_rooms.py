"""The table of rooms in docs/architecture.md, held against the imports of the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "qwench"

LOW = {
    "machine",
    "errors",
    "numerics",
    "checkpoint",
    "methods",
    "models",
    "formats",
    "loading",
    "stream",
    "engines",
    "evaluation",
    "recipe",
    "result",
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "machine": set(),
    "numerics": {"errors"},
    "checkpoint": {"errors"},
    "methods": {"errors", "numerics"},
    "models": {"errors", "checkpoint", "numerics"},
    "formats": {"errors", "checkpoint", "models", "numerics"},
    "stream": {"errors", "checkpoint", "models", "numerics"},
    "loading": {"errors", "checkpoint", "models", "formats", "numerics"},
    "engines": {"errors", "checkpoint"},
    "evaluation": {"errors", "machine", "checkpoint", "models", "stream"},
    "recipe": {"errors", "numerics"},
    "result": {"errors", "numerics"},
    "steps": LOW | {"display"},
    "display": {"result", "machine"},
    "run": LOW | {"steps", "display"},
    "measuring": LOW | {"steps", "display"},
    "reproduce": LOW | {"steps", "run", "display"},
    "cli": LOW | {"steps", "run", "measuring", "reproduce", "display", "demo"},
    "__main__": {"cli"},
    "demo": {"errors"},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports, wherever in the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"qwench.{alias.name}" for alias in node.names] if module == "qwench" else [module]
        rooms.update(name.split(".")[1] for name in names if name.startswith("qwench."))
    return rooms


FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a room that docs/architecture.md does not know"
    forbidden = imported_rooms(path) - MAY_IMPORT[room] - {room, "__version__"}
    assert not forbidden, f"{path.name} in {room} imports {sorted(forbidden)}"


def test_the_document_shows_every_room() -> None:
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in {room_of(p) for p in FILES}:
        assert room in text, f"docs/architecture.md does not mention {room}"


def test_no_code_from_a_checkpoint_is_ever_run() -> None:
    for path in FILES:
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path
