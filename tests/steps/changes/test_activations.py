"""Ranges of activations in a walk: what is observed, what is shared, what an expert gets that no token reached, and what the next layer reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import Part
from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import CheckpointError, PlanError
from qwench.formats.release import Release, open_source
from qwench.methods.activation_range import BlockSizes, divisor
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.numerics import SCHEMES, InputRounding, Scheme
from qwench.recipe import ActivationSettings, Quantize, Rule, parse_recipe
from qwench.result import read_result
from qwench.run import run_recipe
from qwench.steps.changes import ActivationRanges, Rounding
from qwench.steps.checks.verify import verify
from qwench.steps.planning.plan import make_plan
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.observe import taking_inputs
from qwench.stream.walk import Walk, walk
from tests.support.tiny import write_tiny

W4A4, W8A8 = SCHEMES["nvfp4-w4a4"], SCHEMES["fp8-w8a8"]
NEVER = ("router", "shared.router", "delta.a", "delta.b")


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("ranges") / "m", moe=request.param))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("ranges") / "moe", moe=True))


def schemes_of(source: Checkpoint, mixer: Scheme = W4A4) -> dict[str, Scheme]:
    slots = [s for block in map_of(source).blocks for s in block.slots if s.linear and s.role not in NEVER]
    return {s.module: mixer if s.role.startswith(("attention", "delta")) else W4A4 for s in slots}


class Watched:
    """A walk of rounding and ranges; keeps what each finished layer holds."""

    def __init__(
        self, source: Checkpoint, folder: Path, settings: ActivationSettings, ids: Tensor, mixer: Scheme = W4A4
    ) -> None:
        schemes = schemes_of(source, mixer)
        rules = Quantize(rules=(Rule(roles=("mlp.*",), scheme="nvfp4-w4a4"),))
        self.change = ActivationRanges(settings, schemes)
        self.divisors: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}
        self.rounded: dict[str, InputRounding] = {}
        self.embedded = Trunk(source, map_of(source)).embed(ids)
        self.files = HiddenFiles(folder, tuple(self.embedded.shape), torch.float32)
        walk(
            Walk([Rounding(rules, None, schemes), self.change]),
            source,
            map_of(source),
            ids,
            self.files,
            self.emit,
            lambda *_: None,
        )

    def emit(self, live: LiveBlock) -> None:
        self.rounded |= live.rounded
        for module, quantized in live.quantized.items():
            self.weights[f"{module}.weight"] = quantized.dequantize()
            if quantized.input_outer is not None:
                self.divisors[module] = float(quantized.input_outer)
        if live.block.index == 0:
            live.rounded = {}
            with taking_inputs(live, {name: self.taker(name) for name in live.block.inputs}):
                live.run(self.embedded)

    def taker(self, name: str):  # type: ignore[no-untyped-def]
        def take(x: Tensor) -> None:
            if x.numel():
                self.largest[name] = max(self.largest.get(name, 0.0), float(x.abs().max()))

        return take


def ids_of(source: Checkpoint, rows: int = 4, length: int = 20) -> Tensor:
    return torch.randint(map_of(source).other("embed").shape[0], (rows, length), generator=torch.Generator().manual_seed(6))


def test_modules_get_the_divisor_of_what_they_read(source: Checkpoint, tmp_path: Path) -> None:
    """Of layer 0, whose input is at hand; experts each by the tokens that were sent to them."""
    found = Watched(source, tmp_path, ActivationSettings(experts="own"), ids_of(source))
    assert set(found.divisors) == set(schemes_of(source))
    block = map_of(source).blocks[0]
    for name, largest in found.largest.items():
        for slot in block.inputs[name]:
            if slot.module in found.divisors:
                assert found.divisors[slot.module] == divisor(largest), (name, slot.role)
    for block in map_of(source).blocks:
        for slots in block.inputs.values():
            assert len({found.divisors[s.module] for s in slots if s.module in found.divisors}) <= 1
    assert len(set(found.divisors.values())) > len(map_of(source).blocks), "inputs differ"


def test_experts_share_a_range_unless_told_otherwise(moe: Checkpoint, tmp_path: Path) -> None:
    shared = Watched(moe, tmp_path / "s", ActivationSettings(), ids_of(moe)).divisors
    own = Watched(moe, tmp_path / "o", ActivationSettings(experts="own"), ids_of(moe)).divisors
    ups, downs = (
        [m for m in own if ".layers.0." in m and "experts." in m and m.endswith(end)] for end in ("up_proj", "down_proj")
    )
    for some in ([m for m in group if "shared" not in m] for group in (ups, downs)):
        assert {shared[m] for m in some} == {min(own[m] for m in some)}, "the divisor of the largest range"
        assert len({own[m] for m in some}) > 1


def test_an_expert_that_no_token_reached_gets_the_largest_range_and_is_named(moe: Checkpoint, tmp_path: Path) -> None:
    """Two tokens reach at most four of six experts."""
    found = Watched(moe, tmp_path, ActivationSettings(experts="own"), ids_of(moe, rows=1, length=2))
    says = found.change.reports["layer 0 experts inputs"]
    assert "experts that no token reached" in says
    missed = [n for n in range(6) if f"experts.{n}" not in found.largest]
    assert len(missed) >= 2 and f"({', '.join(map(str, missed))})" in says
    stem = f"{map_of(moe).prefix}layers.0.mlp.experts."
    for leaf in ("gate_proj", "down_proj"):
        reached = [found.divisors[f"{stem}{n}.{leaf}"] for n in range(6) if n not in missed]
        assert {found.divisors[f"{stem}{n}.{leaf}"] for n in missed} == {min(reached)}


@pytest.mark.parametrize("choice", ["percentile", "mse"])
def test_other_choices_reach_the_file(moe: Checkpoint, choice: str, tmp_path: Path) -> None:
    settings = ActivationSettings(range=choice, percentile=90)  # type: ignore[arg-type]
    amax = Watched(moe, tmp_path / "a", ActivationSettings(), ids_of(moe)).divisors
    found = Watched(moe, tmp_path / "c", settings, ids_of(moe))
    assert all(value > 0 for value in found.divisors.values())
    assert all(f"by {choice}" in says for says in found.change.reports.values())
    if choice == "percentile":
        assert all(found.divisors[m] >= 0.999 * amax[m] for m in amax) and found.divisors != amax
        assert "of blocks cut off" in found.change.reports["layer 0 experts inputs"]


class Held:
    """What a release of a walk would be, without a file."""

    def __init__(self, source: Checkpoint, found: Watched) -> None:
        self.folder, self.config, self.tensors = source.folder, source.config, source.tensors
        self.source, self.found = source, found

    def read(self, name: str, part: Part = ()) -> Tensor:
        held = self.found.weights.get(name)
        return self.source.read(name, part) if held is None else held

    def input_rounding(self, module: str) -> InputRounding | None:
        if module in self.found.divisors:
            return InputRounding("nvfp4", self.found.divisors[module])
        return InputRounding("fp8") if module in self.found.weights or f"{module}.weight" in self.found.weights else None


def test_the_next_layer_reads_what_the_release_will_put_out(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "m"))
    found = Watched(source, tmp_path / "w", ActivationSettings(), ids_of(source), mixer=W8A8)
    map = map_of(source)
    trunk, hidden = Trunk(Held(source, found), map), found.embedded
    for index in range(len(map.blocks)):
        hidden = trunk.run_block(index, hidden)
    got = found.files.before("changed", len(map.blocks)).read(0, len(hidden))
    assert torch.equal(got, hidden)
    assert {rounding.kind for rounding in found.rounded.values()} == {"nvfp4", "fp8"}


def test_inputs_without_one_finite_token_stop_the_walk(source: Checkpoint) -> None:
    map = map_of(source)
    live = LiveBlock(source, map, Trunk(source, map).modules, 1)
    change = ActivationRanges(ActivationSettings(), schemes_of(source))
    with pytest.raises(CheckpointError, match="layer 1: of 7 calibration tokens that mlp reads, not one is finite"):
        change._settle(live, "mlp", {"mlp": BlockSizes(left_out=7)}, {"mlp": []})


RECIPE = """
name: t
calibration: {samples: 6, length: 64}
steps:
  - quantize:
      rules:
        - {roles: [mlp.*, mtp.mlp.*, mtp.fc], scheme: nvfp4-w4a4}
        - {roles: [attention.*], scheme: nvfp4}
        - {roles: [delta.qkv, delta.z, delta.out], scheme: fp8-w8a8}
  - export: {format: compressed-tensors}
"""


def test_a_release_of_three_precisions_is_transformers_to_the_last_bit(tmp_path: Path) -> None:
    """NVFP4 with 4-bit inputs, NVFP4 alone, FP8 with 8-bit inputs; and the MTP head, which transformers does not run."""
    run_recipe(parse_recipe(RECIPE, "t"), str(checkpoint("dense")), tmp_path / "out", 0, Report("t", "bytes", None))
    release = open_source(tmp_path / "out")
    assert isinstance(release, Release)
    rounded = {m: release.input_rounding(m) for m in (w.module for w in release.stored.values())}
    kinds = [None if r is None else r.kind for r in rounded.values()]
    assert (kinds.count("nvfp4"), kinds.count("fp8"), kinds.count(None)) == (8 * 3 + 4, 6 * 3, 2 * 4)
    assert rounded["mtp.fc"] is not None and rounded["mtp.layers.0.mlp.down_proj"] is not None
    reports = read_result(tmp_path / "out").calibration
    assert reports is not None and "mtp layer 0 fc inputs" in reports.reports
    found = verify(tmp_path / "out", "transformers")
    assert found.outcome == "agrees" and found.mean_kl == 0.0, found.notes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("mtp.fc", "head"), "head: activations are rounded in decoder layers only"),
        (
            ("mtp.fc", "vision.blocks.0.attn.qkv.weight"),
            "vision.blocks.0.attn.qkv.weight: activations are rounded in decoder layers only",
        ),
        (("compressed-tensors", "gptq"), "gptq holds integers, not nvfp4"),
        (("compressed-tensors", "auto-round"), "auto-round holds integers, not nvfp4"),
        (("  - export", "  - correct: {rank: 8}\n  - export"), "engines give it the input as it was before rounding"),
        (("scheme: nvfp4}", "scheme: {kind: int, activations: fp8}}"), "int weights do not go with fp8 activations"),
        (
            ("scheme: nvfp4}", "scheme: {kind: nvfp4, group: 16, activations: fp8}}"),
            "nvfp4 weights do not go with fp8 activations",
        ),
        (("scheme: nvfp4}", "scheme: {kind: fp8, bits: 8, block: [128, 128], activations: fp8}}"), "not per block"),
        (("[delta.qkv, delta.z, delta.out]", "[delta.qkv]"), "engines fuse in_proj_qkvz"),
    ],
)
def test_a_plan_refuses_what_no_file_or_engine_could_do(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    source = Checkpoint.open(checkpoint("dense"))
    text = RECIPE.replace(*change)
    assert text != RECIPE
    with pytest.raises(PlanError) as caught:
        make_plan(parse_recipe(text, "t"), source, map_of(source))
    assert any(words in what for what, _ in caught.value.complaints), caught.value.complaints


def test_only_four_bit_activations_ask_for_rows() -> None:
    eight = RECIPE.replace("nvfp4-w4a4", "fp8-w8a8").replace("calibration: {samples: 6, length: 64}\n", "")
    assert parse_recipe(eight, "t").calibration is None
    assert parse_recipe(RECIPE.replace("calibration: {samples: 6, length: 64}\n", ""), "t").calibration is not None
    assert replace(W4A4, activations="none") == SCHEMES["nvfp4"]
