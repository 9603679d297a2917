"""What `inspect` says of parts that a checkpoint lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from qwench.checkpoint.reader import Checkpoint
from qwench.steps.checks.inspect import inspection, show
from tests.support.tiny import tiny_config, write_tiny


def losses(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = inspection(Checkpoint.open(folder), "it", None, None)["losses"]
    return found


def test_a_lost_head_is_named_with_its_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "tuned", mtp=None)
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    (loss,) = losses(folder)
    assert "the MTP head is missing: config.json announces 1 layer of it (mtp_num_hidden_layers)" in loss["what"]
    assert "--donor BASE" in loss["mend"]
    show(inspection(Checkpoint.open(folder), "it", None, None), Console(soft_wrap=True))
    assert "lost: the MTP head is missing" in capsys.readouterr().out


def test_a_lost_tower_is_named_with_both_ways_out(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tuned", vision=False)
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    (loss,) = losses(folder)
    assert "the vision tower is missing" in loss["what"] and "layout: text" in loss["mend"]


@pytest.mark.parametrize("mtp", [None, "published"])
def test_what_was_never_announced_is_not_lost(mtp: None, tmp_path: Path) -> None:
    assert losses(write_tiny(tmp_path / "m", mtp=mtp, vision=False)) == []
