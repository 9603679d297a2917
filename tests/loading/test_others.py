"""Formats of other writers: what every engine would make of releases in them, good ones and such as are broken in the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.loading.findings import Finding
from qwench.loading.proof import prove
from tests.loading.others import OTHERS, make

ENGINES = ("vllm", "sglang", "sglang-0.5.19", "transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


def findings(folder: Path, engine: str) -> tuple[Finding, ...]:
    with Checkpoint.open(folder) as source:
        return prove(source, engine).findings


@pytest.mark.parametrize("case", OTHERS)
def test_the_worst_in_every_engine(case: str, home: Path) -> None:
    folder = make(home, case)
    worst = [next((f.level for f in findings(folder, engine) if f.level != "note"), "") for engine in ENGINES]
    assert worst == list(OTHERS[case][-1])
