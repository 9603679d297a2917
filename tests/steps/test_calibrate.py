"""Calibrated recipes: what smoothing must not change, what rounding must improve, and a run that is stopped in the middle of a walk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.display import Report
from qwench.formats.release import open_source
from qwench.models import map_of
from qwench.models.place import Place
from qwench.models.run import Trunk
from qwench.numerics import SCHEMES, Scheme
from qwench.recipe import Recipe, Smooth, parse_recipe
from qwench.result import Result, read_result
from qwench.run import run_recipe
from qwench.steps.changes import Smoothing
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.walk import Walk, walk
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)
ROWS, LENGTH = 6, 24


def outliers(folder: Path) -> Path:
    """Gives every norm of the layers a few channels that are far larger than the rest: what smoothing is for."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")) and "mtp" not in name:
            tensor[3::29] += 6
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outliers(write_tiny(tmp_path_factory.mktemp("calibrate") / "model", moe=request.param))


def ids_of(source: Checkpoint) -> Tensor:
    return torch.randint(map_of(source).other("embed").shape[0], (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def all_linears(source: Checkpoint) -> dict[str, Scheme]:
    never = ("router", "shared.router", "delta.a", "delta.b")
    return {s.module: SCHEMES["int4"] for b in map_of(source).blocks for s in b.slots if s.linear and s.role not in never}


def test_smoothing_without_rounding_leaves_the_model_unchanged(model: Path, tmp_path: Path) -> None:
    """Every fold at once, router, shared expert's gate and decay projections among the readers."""
    source = Checkpoint.open(model)
    map, ids = map_of(source), ids_of(source)
    up = ("expert.up", "shared.up") if map.blocks[0].fused.get("experts") else ("mlp.up",)
    change = Smoothing(Smooth(folds=("norm.post", "norm.input", "attention.v", *up), grid=6), all_linears(source), source)
    files = HiddenFiles(tmp_path, (ROWS, LENGTH, map.other("embed").shape[1]), torch.float32)
    altered: list[str] = []
    walk(Walk([change]), source, map, ids, files, lambda live: altered.extend(live.altered), lambda *_: None)
    kept_one = sum("1 is kept" in said for said in change.reports.values())
    assert kept_one < len(change.reports) / 2, "the model has outliers: most searches find something"
    assert any(name.endswith("layernorm.weight") or "layernorm" in name for name in altered)
    trunk = Trunk(source, map)
    expected, got = trunk.forward(ids), trunk.norm(files.before("changed", len(map.blocks)).read(0, ROWS))
    scale = float(trunk.logits(expected).std())
    assert float((trunk.logits(expected) - trunk.logits(got)).abs().max()) < 2e-4 * scale


def test_a_scale_for_a_moe_norm_reaches_router_and_shared_gate(tmp_path: Path) -> None:
    source = Checkpoint.open(outliers(write_tiny(tmp_path / "model", moe=True)))
    map = map_of(source)
    change = Smoothing(Smooth(grid=6), all_linears(source), source)
    files = HiddenFiles(tmp_path / "walk", (ROWS, LENGTH, map.other("embed").shape[1]), torch.float32)
    seen: list[set[str]] = []
    walk(
        Walk([change]), source, map, ids_of(source), files,
        lambda live: seen.append({live.altered[m].role for m in live.altered}), lambda *_: None,
    )  # fmt: skip
    changed = [roles for roles in seen if roles]
    assert changed
    for roles in changed:
        assert {"norm.post", "router", "shared.router", "shared.gate", "shared.up", "expert.gate", "expert.up"} <= roles


RECIPE = """
name: t
calibration: {{samples: 12, length: 256}}
steps:
{smooth}  - quantize: {{method: {method}, autoround: {{iterations: 12}}, rules: [{{roles: [mlp.*, attention.*, delta.qkv, delta.z, delta.out], scheme: int4, layers: 1..}}]}}
{correct}  - export: {{format: compressed-tensors}}
"""


def recipe_of(method: str, smooth: bool = False, correct: bool = False) -> Recipe:
    text = RECIPE.format(
        method=method, smooth="  - smooth: {}\n" if smooth else "", correct="  - correct: {rank: 16}\n" if correct else ""
    )
    if method == "rtn" and not smooth:
        text = text.replace("calibration: {samples: 12, length: 256}\n", "")
    return parse_recipe(text, "t")


def error_of(release: Path, source: Path, ids: Tensor) -> float:
    """Mean squared difference of the normed hidden states."""
    a, b = (Trunk(s, map_of(s)).forward(ids) for s in (open_source(release), Checkpoint.open(source)))
    return float((a - b).square().mean())


def test_calibrated_methods_on_the_trained_demo_are_closer_than_rounding(tmp_path: Path) -> None:
    source = checkpoint("dense")
    for method in ("rtn", "gptq", "autoround"):
        run_recipe(recipe_of(method), str(source), tmp_path / method, 0, QUIET)
    from qwench.stream.rows import held_out_rows

    ids = held_out_rows(source, 4, 256).ids
    rounding = error_of(tmp_path / "rtn", source, ids)
    assert error_of(tmp_path / "gptq", source, ids) < 0.8 * rounding
    assert error_of(tmp_path / "autoround", source, ids) < 0.95 * rounding, "twelve steps are few"
    record = read_result(tmp_path / "gptq").calibration
    assert record is not None and record.rows > 0
    assert sum("of rounding" in said for said in record.reports.values()) >= 7 * 2


def test_what_a_calibrated_recipe_does_not_touch_comes_out_bit_for_bit(tmp_path: Path) -> None:
    source_folder = checkpoint("dense")
    run_recipe(recipe_of("gptq", smooth=True), str(source_folder), tmp_path / "out", 0, QUIET)
    source, release = Checkpoint.open(source_folder), Checkpoint.open(tmp_path / "out")
    reports = read_result(tmp_path / "out").calibration
    assert reports is not None
    smoothed = {
        int(key.split()[1]) for key, said in reports.reports.items() if key.startswith("layer") and "1 is kept" not in said
    }
    for name in source.tensors.keys() & release.tensors.keys():
        same = torch.equal(source.read(name).view(torch.int16), release.read(name).view(torch.int16))
        is_smoothed = any(f"layers.{n}.post_attention_layernorm" in name and not name.startswith("mtp") for n in smoothed)
        assert same != is_smoothed, name


STOP = """
import os, signal
from qwench.stream.hidden import HiddenFiles
real = HiddenFiles.publish
def stopping(self, stream, layer):
    if layer == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, stream, layer)
HiddenFiles.publish = stopping
"""


def test_a_walk_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    recipe, model = tmp_path / "recipe.yaml", checkpoint("dense")
    recipe.write_text(
        RECIPE.format(method="gptq", smooth="", correct="")
        .replace("attention.*, delta.qkv, delta.z, delta.out", "attention.*")
        .replace("}]}", "}, {roles: [mtp.fc, mtp.mlp.*], scheme: int4}]}")
    )
    depth = len(map_of(Checkpoint.open(model)).blocks)

    def run(out: Path, before: str) -> subprocess.CompletedProcess[str]:
        code = (
            textwrap.dedent(before)
            + f"""
import sys
sys.argv = ["qwench", "run", {str(recipe)!r}, "--model", {str(model)!r}, "--out", {str(out)!r}]
from qwench.cli import main
main()
"""
        )
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )

    assert run(tmp_path / "whole", "").returncode == 0
    for at in (5, depth + 1):  # in the trunk, then in the MTP head
        assert run(tmp_path / "out", STOP.format(at=at)).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.partial" / "walk" / f"changed-{at - 1}.bin").exists()
    finished = run(tmp_path / "out", "")
    assert finished.returncode == 0, finished.stderr
    assert "resumed" in finished.stderr
    for path in (tmp_path / "whole").iterdir():
        if path.name not in {"result.json", "provenance.json"}:
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not (tmp_path / ".out.partial").exists()
    whole, resumed = read_result(tmp_path / "whole"), read_result(tmp_path / "out")
    assert whole.calibration == resumed.calibration, "reports of the first part are not lost"
    assert whole.errors == resumed.errors


def test_a_walk_in_other_numbers_does_not_go_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows half of the way in bfloat16 and half in float32 would be neither's result."""
    model, place = str(checkpoint("dense")), Place(dtype=torch.bfloat16)
    text = "name: test\nacceptance: 'off'\ncalibration: {samples: 4, length: 16}\nsteps: [{quantize: {method: gptq, rules: [{roles: ['mlp.*'], scheme: int4}]}}, {export: {format: compressed-tensors}}]"
    recipe, real = parse_recipe(text, "test"), HiddenFiles.publish

    def stopping(self: HiddenFiles, stream: str, layer: int) -> None:
        real(self, stream, layer)
        if layer == 3:
            raise KeyboardInterrupt

    def run(out: str, at: Place) -> Result:
        return run_recipe(recipe, model, tmp_path / out, 1, QUIET, accept_any=True, place=at)

    monkeypatch.setattr(HiddenFiles, "publish", stopping)
    for out in ("same", "other"):
        with pytest.raises(KeyboardInterrupt):
            run(out, place)
    monkeypatch.setattr(HiddenFiles, "publish", real)
    assert run("same", place).run.resumed_tensors > 0
    assert run("other", place.exact).run.resumed_tensors == 0


def test_live_blocks_show_experts_as_views(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "model", moe=True, trunk_experts="single"))
    map = map_of(source)
    live = LiveBlock(source, map, Trunk(source, map).modules, 0)
    slot = live.block.slot("expert.up", 1)
    assert torch.equal(live.weight(slot), source.read(slot.tensor, slot.part).float())
    live.weight(slot).fill_(2.0)
    name, part = live.parameter(slot)
    assert bool((live.weights[name][part] == 2.0).all())
