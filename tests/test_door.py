"""The door: names that programs import from `qwench` itself, cheap to import and complete enough to make a release and measure it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qwench


def test_every_name_of_the_door_is_there_and_nothing_else_is_promised() -> None:
    assert sorted(qwench.__all__) == qwench.__all__
    assert sorted(name for names in qwench.BEHIND.values() for name in names) == [
        n for n in qwench.__all__ if n != "__version__"
    ]
    assert all(getattr(qwench, name) is not None for name in qwench.__all__)
    assert set(qwench.__all__) <= set(dir(qwench))


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qwench.quantise


def test_importing_it_loads_no_torch() -> None:
    asked = "import sys, qwench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def test_a_release_from_python(tmp_path: Path) -> None:
    """As the docstring of the package does it."""
    recipe = qwench.load_recipe("nvfp4a16")
    planned = qwench.plan_for(recipe, "demo:moe")
    made = qwench.run_recipe(recipe, "demo:moe", tmp_path / "out")
    assert made.bytes == sum(file.nbytes for file in planned.files)
    measured = qwench.evaluate_release(tmp_path / "out", "demo:moe", documents=2, length=24)
    assert measured.divergence.mean.mean > 0
    assert qwench.read_result(tmp_path / "out").evaluation == measured
    assert qwench.verify_release(tmp_path / "out", "transformers").outcome in ("agrees", "loads")
