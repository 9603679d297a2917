"""Lists of what is not quantized, rewritten from what files in formats of other writers hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.loading.modelopt import SIDECAR, effective
from qwench.loading.proof import TABLES, prove
from qwench.loading.reading import reading
from qwench.loading.reconfigured import Reconfigured
from qwench.steps.checks.doctor import examine
from qwench.steps.checks.mend import mended
from qwench.steps.checks.mend_lists import entries, full_list, stored_modules
from tests.loading.others import OTHERS, base, make

CURED = [
    "fp8: head's names missing from the list", "fp8: head's experts missing from the list", "fp8: half of a joined module in the list",
    "fp8: parts of names in the list", "awq: head missing from the list", "awq: no list", "awq: the tower by a part of its names",
    "awq: the tower by its full name", "awq: a part of too many names", "awq: a joined module listed by its members",
    "nvfp4: head missing from the list", "nvfp4: names without language_model", "nvfp4: layer 1 excluded by a wildcard",
    "modelopt fp8: head missing from the list",
]  # fmt: skip
BEYOND = [
    "fp8: in_proj_a and b quantized",
    "fp8: A_log converted",
    "fp8: a scale is missing",
    "nvfp4: outer scales differ",
    "bitsandbytes",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


@pytest.mark.parametrize("case", CURED)
def test_lists_are_mended_for_every_engine_that_reads_the_format(case: str, home: Path) -> None:
    with Checkpoint.open(make(home, case)) as source:
        readers = [name for name, table in TABLES.items() if reading(table.engine, effective(source).config) == "replayed"]
        assert len(readers) >= 4 and not all(prove(source, name).good for name in readers)
        found = mended(source)
        assert found.told and all(prove(Reconfigured(source, found.config), name).good for name in readers)


@pytest.mark.parametrize("case", BEYOND)
def test_what_lies_in_the_tensors_is_left_alone(case: str, home: Path) -> None:
    with Checkpoint.open(make(home, case)) as source:
        found = mended(source)
        assert found.told == [] and found.config == source.config


@pytest.mark.parametrize("case", [name for name in OTHERS if name.startswith("good")])
def test_a_release_that_loads_is_not_changed(case: str, home: Path) -> None:
    with Checkpoint.open(make(home, case)) as source:
        assert mended(source).told == []


def test_what_files_hold_decides(home: Path) -> None:
    with Checkpoint.open(base(home, "moe", "awq")) as source:
        quantized, kept = stored_modules(source)
        config = full_list(source)
    assert "model.language_model.layers.0.mlp.experts.5.up_proj" in quantized and "mtp.layers.0.mlp.experts.5.up_proj" in kept
    assert config is not None
    names = config["quantization_config"]["modules_to_not_convert"]
    assert "mtp.layers.0.mlp.experts" in names and not any(".experts." in name for name in names)
    assert "model.language_model.layers.0.linear_attn.in_proj_ba" in names  # the only name that SGLang asks for
    assert not any(name.endswith("mlp.gate") for name in names)


def test_joined_names_only_where_all_members_are_kept() -> None:
    kept = [f"l.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "gate")] + ["l.attn.q_proj"]
    assert entries(kept, joined=True) == ["l.mlp.gate_proj", "l.mlp.up_proj", "l.attn.q_proj", "l.mlp.gate_up_proj"]
    assert entries(kept, joined=False) == ["l.mlp.gate_proj", "l.mlp.up_proj", "l.attn.q_proj"]


def test_a_mixed_file_lists_no_layer_that_is_stored_as_it_is(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base(home, "dense", "mixed"), tmp_path / "m")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quantized_layers"]["mtp.layers.0.self_attn.o_proj"] = {"quant_algo": "FP8"}
    config["quantization_config"]["ignore"].remove("mtp*")
    (folder / "config.json").write_text(json.dumps(config))
    found = examine(str(folder), fix=True)
    assert found.mends and found.proofs["vllm"].good and found.proofs["sglang"].good
    mixed = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "mtp.layers.0.self_attn.o_proj" in mixed["ignore"] and not any("mtp" in name for name in mixed["quantized_layers"])


def test_an_older_modelopt_file_is_mended_where_it_says_it(home: Path, tmp_path: Path) -> None:
    """config.json says nothing of its quantization, and goes on saying nothing."""
    folder = shutil.copytree(base(home, "dense", "nvfp4-sidecar"), tmp_path / "m")
    said: dict[str, Any] = json.loads((folder / SIDECAR).read_text())
    said["quantization"]["exclude_modules"] = ["lm_head", "model.visual*"]
    (folder / SIDECAR).write_text(json.dumps(said))
    config = (folder / "config.json").read_bytes()
    assert not examine(str(folder)).proofs["vllm"].good
    found = examine(str(folder), fix=True)
    assert found.changed == (SIDECAR,) and (folder / "config.json").read_bytes() == config
    assert found.proofs["vllm"].good and found.proofs["sglang"].good
    mended_list = json.loads((folder / SIDECAR).read_text())
    assert "mtp.fc" in mended_list["quantization"]["exclude_modules"] and mended_list["producer"] == said["producer"]
    assert set(mended_list) == set(said)
