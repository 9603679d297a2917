"""What the gate says that it will hold, against what it held: the largest resident memory of a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.models import map_of
from qwench.models.run import VOCABULARY_ROWS
from qwench.recipe import parse_recipe
from qwench.steps.heads.memory import HEAD_ROWS, gate_memory
from tests.support.tiny import save_checkpoint, tiny_config, tiny_shapes, tiny_tensors, write_tiny

RECIPE = "name: t\n{}steps:\n  - export: {{}}\n"

MEASURE = """
import sys
from pathlib import Path
from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.machine import peak_rss
from qwench.models import map_of
from qwench.recipe import AcceptanceGate
from qwench.steps.heads.gate import acceptance_of, gate_rows
demo = Checkpoint.open(checkpoint("dense"))
acceptance_of(demo, gate_rows(AcceptanceGate(documents=2, length=8), demo.folder, map_of(demo)))  # what is imported on first use
source = Checkpoint.open(Path(sys.argv[1]))
rows, before = gate_rows(AcceptanceGate(documents=2, length=64), source.folder, map_of(source)), peak_rss()
acceptance_of(source, rows)
print(peak_rss() - before)
"""


def wide(folder: Path) -> Path:
    """A random checkpoint whose layers and vocabulary outweigh everything else."""
    config = tiny_config(vision=False)
    config["text_config"] |= {"hidden_size": 768, "vocab_size": 48_000, "intermediate_size": 6144}
    save_checkpoint(folder, config, tiny_tensors(tiny_shapes(config)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("dense") / name, folder)
    return folder


def test_the_gate_holds_what_the_plan_says(tmp_path: Path) -> None:
    source = Checkpoint.open(wide(tmp_path / "wide"))
    stated = gate_memory(
        parse_recipe(RECIPE.format("acceptance: {documents: 2, length: 64}\n"), "t"), source, map_of(source), changed=True
    )
    command = [sys.executable, "-c", MEASURE, str(source.folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    assert 0.7 * stated < int(ran.stdout.split()[-1]) < 1.1 * stated


@pytest.mark.parametrize(
    ("acceptance", "mtp", "changed"), [("acceptance: off\n", "published", True), ("", None, True), ("", "published", False)]
)
def test_it_holds_nothing_where_nothing_is_measured(acceptance: str, mtp: None, changed: bool, tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "tiny", mtp=mtp))
    assert gate_memory(parse_recipe(RECIPE.format(acceptance), "t"), source, map_of(source), changed) == 0


def test_the_rows_of_the_head_are_those_of_the_trunk() -> None:
    assert HEAD_ROWS == VOCABULARY_ROWS
