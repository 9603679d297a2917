"""Hashes of finished files, which guard a refactoring: the same recipe on the carried checkpoints writes the same bytes as it did.

Only recipes without calibration are here: their arithmetic is element by element, so that processors and threads do not matter. Where a change of bytes is meant, say so in
CHANGELOG.md and write the new line of `SHA256SUMS` (the message of the failing test holds it).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qwench.recipe import load_recipe
from qwench.run import run_recipe

LINES = (Path(__file__).parent / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
RELEASES = sorted({line.split()[1].rpartition("/")[0] for line in LINES})


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_the_same_bytes_as_ever(release: str, tmp_path: Path) -> None:
    recipe, model = release.split("/")
    run_recipe(load_recipe(recipe), f"demo:{model}", tmp_path / "out")
    expected = [line for line in LINES if f" {release}/" in line]
    names = [line.rpartition("/")[2] for line in expected]
    found = [f"{hashlib.sha256((tmp_path / 'out' / name).read_bytes()).hexdigest()}  {release}/{name}" for name in names]
    assert found == expected, "the bytes changed; if they were meant to, these are the new lines:\n" + "\n".join(found)
