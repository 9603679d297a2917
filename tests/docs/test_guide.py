"""The guide, typed as a reader types it: every page in a folder of its own, from its first command to its last, and what it shows is what comes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from benchmarks import quality_tables
from qwench.cli.app import app
from qwench.recipe import bundled
from tests.docs.pages import GUIDE, Block, blocks, missing, pages, shape

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
MARK = "=== block "
METHOD = "5-add-a-method"
"""The page whose blocks change the package itself: they are made in a copy of it."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, without the weights of the carried checkpoints, which are linked."""
    home = tmp_path / "copy"
    package = ROOT / "src" / "qwench"
    shutil.copytree(package, home / "src" / "qwench", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    (home / "src" / "qwench" / "demo").symlink_to(package / "demo")
    return home


def environment(folder: Path, package: Path) -> dict[str, str]:
    """Variables of a reader who stands in `folder` and has the package at `package` installed."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "qwench").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m qwench "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    others = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR", "PYTEST_ADDOPTS")}
    return others | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1", "MODEL": ""}


def script(page: Sequence[Block]) -> str:
    """All commands of a page for one shell, each block announced."""
    lines = ["set -eo pipefail", "exec 2>&1"]
    for number, block in enumerate(page):
        if block.kind == "sh" and not block.skipped:
            lines += [f"echo '{MARK}{number}'", block.text]
    return "\n".join(lines)


def typed(page: Sequence[Block], folder: Path, package: Path) -> dict[int, str]:
    """What every block of commands said, by its number on the page."""
    done = subprocess.run(
        ["bash", "-c", script(page)], cwd=folder, env=environment(folder, package), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"a command of the page failed\n{done.stdout[-4000:]}"
    parts = [part.partition("\n") for part in done.stdout.split(MARK)[1:]]
    return {int(number): said for number, _, said in parts}


def write_files(page: Sequence[Block], folder: Path) -> None:
    for block in page:
        if block.kind in ("yaml", "python"):
            place = folder / block.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block.text)


def change_package(page: Sequence[Block], home: Path) -> None:
    """What the page's `diff` blocks say, in a copy of the package: each names lines that stand there once."""
    for block in page:
        if block.kind != "diff":
            continue
        name, *lines = block.text.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line.startswith("-"))
        after = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
        text = (home / name).read_text()
        assert text.count(before) == 1, f"line {block.line}: {name} has these lines {text.count(before)} times:\n{before}"
        (home / name).write_text(text.replace(before, after))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found, folder, package = list(blocks(page)), tmp_path / "reader", ROOT / "src"
    folder.mkdir()
    if page.stem == METHOD:
        folder = request.getfixturevalue("copy")
        change_package(found, folder)
        package = folder / "src"
    write_files(found, folder)
    said = typed(found, folder, package)
    shown = [(number, block) for number, block in enumerate(found) if block.kind == "text"]
    assert shown
    for number, block in shown:
        assert number - 1 in said, f"{page.name}, line {block.line}: what is shown follows no command"
        lost = missing(block.text, said[number - 1])
        assert not lost, f"{page.name}, line {block.line}: these lines did not come: {lost}\nof\n{said[number - 1]}"


NOT_RUN = [(page, block) for page in pages() for block in blocks(page) if block.kind == "sh" and block.skipped]


@pytest.mark.parametrize(("page", "block"), NOT_RUN, ids=lambda x: x.stem if isinstance(x, Path) else f"line-{x.line}")
def test_commands_that_cannot_run_here_are_ones_that_qwench_takes(page: Path, block: Block) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line)
        if words[0] == "qwench":
            COMMANDS[words[1]].make_context(words[1], words[2:])  # raises for an option or argument that there is not
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"no target {words[1]}"
    pytest.skip(f"{page.name}, line {block.line}: {block.skipped}: commands checked, not run")


def test_the_tables_are_those_that_were_measured() -> None:
    page = quality_tables.PAGE.read_text(encoding="utf-8")
    assert page == quality_tables.filled(page), "run python -m benchmarks.quality_tables"


def test_every_bundled_recipe_was_measured() -> None:
    measured = {row["recipe"] for which in quality_tables.MODELS for row in quality_tables.rows_of(which)}
    assert measured == set(bundled())


def test_the_entrance_names_every_page_and_pages_lead_on() -> None:
    entrance = (GUIDE / "README.md").read_text(encoding="utf-8")
    places = [entrance.index(f"({page.name})") for page in pages()]
    assert len(places) == 5 and places == sorted(places)
    for page, following in pairwise(pages()):
        assert f"({following.name})" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*pages(), GUIDE / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in set(re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))):
        assert (page.parent / target).exists(), target


def test_shapes_and_missing_lines() -> None:
    assert shape("KL   0.00276 ± 8e-05, 10.4 MB") == "KL 0 ± 0, 0 MB"
    assert missing("b 1\nc", "a 2\nb 3\nc and more\n") == []
    assert missing("c\nb 1", "a 2\nb 3\nc\n") == ["b 1"], "the order counts"
    assert missing("agrees", "disagrees\n") == ["agrees"]
