"""The driver: what comes out is what went in, but for what the recipe names; and a run that is stopped leaves nothing that looks finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwench import numerics
from qwench.checkpoint.reader import Checkpoint
from qwench.display import Report
from qwench.errors import CheckpointError, OutputError
from qwench.formats.release import open_source
from qwench.methods.rtn import round_fused
from qwench.models import map_of
from qwench.numerics import SCHEMES
from qwench.recipe import load_recipe, parse_recipe
from qwench.result import read_result
from qwench.run import run_recipe
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("run") / "moe", moe=True, shards=3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("run") / "dense")


@pytest.mark.parametrize("recipe", ["nvfp4a16", "nvfp4a16-gdn", "int4"])
@pytest.mark.parametrize("which", ["dense", "moe"])
def test_what_the_recipe_does_not_name_comes_out_bit_for_bit(
    recipe: str, which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    result = run_recipe(load_recipe(recipe), str(model), tmp_path / "out", 1, QUIET)
    source, release = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    kept = source.tensors.keys() & release.tensors.keys()
    assert len(kept) == sum(row.tensors for row in result.precision if row.stored == "BF16")
    assert all(bits(source.read(name)) == bits(release.read(name)) for name in kept)
    replaced = {
        slot.tensor
        for slot in map_of(source).slots()
        if any(name.startswith(slot.module + ".") for name in release.tensors.keys() - kept)
    }
    assert source.tensors.keys() - kept == replaced, "every tensor is either kept or replaced by its packed form"


def test_quantized_weights_are_the_rounding_of_the_fused_set(dense: Path, tmp_path: Path) -> None:
    run_recipe(load_recipe("nvfp4a16"), str(dense), tmp_path / "out", 1, QUIET)
    source, release = Checkpoint.open(dense), open_source(tmp_path / "out")
    block = map_of(source).blocks[3]
    members = block.fused["qkv_proj"]
    rounded = round_fused([source.read(s.tensor) for s in members], SCHEMES["nvfp4"])
    for slot, expected in zip(members, rounded, strict=True):
        assert torch.equal(release.read(slot.module + ".weight"), numerics.decode(expected))
    stored = Checkpoint.open(tmp_path / "out")
    outers = {float(stored.read(s.module + ".weight_global_scale")) for s in members}
    assert len(outers) == 1


def test_the_record_holds_measured_errors(dense: Path, tmp_path: Path) -> None:
    run_recipe(load_recipe("int4"), str(dense), tmp_path / "out", 1, QUIET)
    result = read_result(tmp_path / "out")
    source, release = Checkpoint.open(dense), open_source(tmp_path / "out")
    assert len(result.errors) == len(map_of(source).blocks) * 3 + 4
    for error in result.errors:
        difference = (release.read(error.module + ".weight") - source.read(error.module + ".weight").float()).abs()
        assert error.max_abs == pytest.approx(float(difference.max()), rel=1e-6)
        assert error.mean_abs == pytest.approx(float(difference.mean()), rel=1e-4)


def test_shards_and_index_are_read_by_the_safetensors_library(moe: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(
        "name: t\nsteps:\n  - quantize: {rules: [{roles: [expert.*], scheme: int4}]}\n  - export: {shard_size: 400000B}\n", "t"
    )
    run_recipe(recipe, str(moe), tmp_path / "out", 1, QUIET)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: file for file in sorted(set(index["weight_map"].values())) for name in load_file(tmp_path / "out" / file)}
    assert len(set(found.values())) > 2
    assert found == index["weight_map"]


def run_in_process(model: Path, out: Path, before: str) -> subprocess.CompletedProcess[str]:
    """`qwench run` with a line of Python before it, in a process of its own."""
    code = f"""
    import sys
    {before}
    sys.argv = ["qwench", "run", "int4", "--model", {str(model)!r}, "--out", {str(out)!r}]
    from qwench.cli import main
    main()
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=False
    )


STOP_AFTER = """
    import os, signal
    from qwench.checkpoint.writer import CheckpointWriter
    real, count = CheckpointWriter.write, 0
    def stopping(self, name, tensor):
        global count
        count += 1
        if count == 20:
            os.kill(os.getpid(), signal.SIGNAL)
        real(self, name, tensor)
    CheckpointWriter.write = stopping
"""


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGINT"])
def test_a_stopped_run_goes_on_and_ends_the_same(stop: str, dense: Path, tmp_path: Path) -> None:
    run_recipe(load_recipe("int4"), str(dense), tmp_path / "whole", 1, QUIET)
    stopped = run_in_process(dense, tmp_path / "out", STOP_AFTER.replace("SIGNAL", stop))
    assert stopped.returncode == (-signal.SIGKILL if stop == "SIGKILL" else 2), stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out").exists()
    finished = run_in_process(dense, tmp_path / "out", "")
    assert finished.returncode == 0, finished.stderr
    assert "resumed" in finished.stderr
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert names == {p.name for p in (tmp_path / "out").iterdir()}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for name in names - {"result.json", "provenance.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    whole, resumed = read_result(tmp_path / "whole"), read_result(tmp_path / "out")
    assert whole.errors == resumed.errors, "errors of the first part are not lost"
    assert resumed.run.resumed_tensors > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.language_model.layers.1.mlp.down_proj.weight", "model.language_model.layers.0.linear_attn.out_proj.weight"]
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(name: str, value: float, dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in dense.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity") as caught:
        run_recipe(load_recipe("int4"), str(model), tmp_path / "out", 1, QUIET)
    assert name in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty_is_left_alone(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run_recipe(load_recipe("int4"), str(dense), tmp_path / "out", 1, QUIET)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
