"""Pruned releases from plan to bytes: what is refused, what every layout comes out as, and that what is chosen is what was chosen."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.writer import CheckpointWriter
from qwench.demo import checkpoint
from qwench.errors import CheckpointError, PlanError
from qwench.formats.release import open_source
from qwench.models import map_of, sketch
from qwench.models.pruned import Pruned
from qwench.models.run import Trunk
from qwench.recipe import load_recipe, parse_recipe
from qwench.result import PrunedLayer, PruningFacts, read_result
from qwench.steps.calibrate import calibrate, split_jobs
from qwench.steps.materials.prepare import prepared
from qwench.steps.planning.plan import Plan, make_plan
from qwench.steps.planning.table import as_data
from qwench.steps.quantize import do_jobs
from qwench.steps.record import coverage_warning, pruning_facts
from qwench.stream.rows import Rows, held_out_rows, ids_sha256
from tests.steps.test_calibrate_head import TOKEN, overflowing
from tests.support.files import same_bits
from tests.support.tiny import Experts, Head, Layout, write_tiny

ROWS, LENGTH = 10, 40
PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "qwen3.5-35b-a3b.json"
KEEP_ALL = ""
INT4 = "  - quantize: {method: rtn, rules: [{roles: [expert.*, shared.gate, shared.up, shared.down], scheme: int4}]}\n"


def plan_of(folder: Path, prune: str = "{ratio: 0.5}", others: str = "", export: str = "{format: compressed-tensors}") -> Plan:
    text = f"name: t\ncalibration: {{samples: {ROWS}, length: {LENGTH}}}\nsteps:\n  - prune: {prune}\n{others}  - export: {export}\n"
    recipe = parse_recipe(text, "t")
    opened = Checkpoint.open(folder) if folder.is_dir() else sketch(json.loads(folder.read_text(encoding="utf-8")))
    source = prepared(recipe, opened, None)
    return make_plan(recipe, source, map_of(source))


def rows_of(vocabulary: int) -> Rows:
    ids = torch.randint(1, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    return Rows(ids, tuple(range(ROWS)), tuple(str(n) for n in range(ROWS)), "random ids", "ab" * 32, ids_sha256(ids))


def released(plan: Plan, out: Path, rows: Rows | None = None) -> PruningFacts:
    """What a run writes, from rows at hand."""
    assert isinstance(plan.source, Pruned)
    with CheckpointWriter(out, plan.files, plan.fingerprint) as writer:
        calibrate(plan, plan.source.whole, writer, rows or rows_of(plan.map.other("embed").shape[0]), lambda *_: None)
        do_jobs(split_jobs(plan)[0], plan.source.whole, writer, lambda job: None)
        facts = pruning_facts(plan, writer.remarks)
        writer.commit({"config.json": json.dumps(plan.config).encode(), **plan.sidecars})
    assert facts is not None
    return facts


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        ("{ratio: 0.9}", r"prune keeps 1 of 6 experts \(ratio: 0.9\), and the router sends every token to 2"),
        ("{experts: 1}", r"prune keeps 1 of 6 experts \(experts: 1\), and the router sends every token to 2"),
        ("{experts: 6}", r"prune keeps 6 of 6 experts \(experts: 6\): none would go"),
        ("{experts: 300}", r"prune keeps 300 of 6 experts"),
        ("{ratio: 0.1}", r"prune keeps 6 of 6 experts \(ratio: 0.1\): none would go"),
    ],
)
def test_counts_that_leave_no_network_are_refused(tmp_path: Path, prune: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan_of(write_tiny(tmp_path / "m", moe=True), prune)


def test_a_dense_model_has_no_experts_to_prune(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="this model is dense"):
        plan_of(write_tiny(tmp_path / "m"))


def damaged(folder: Path, change: Any) -> Path:
    """A checkpoint with other tensors or another config."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(tensors, config["text_config"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


ROUTER = "model.language_model.layers.2.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, c: c.update(num_experts=7), r"config.json 7, mlp.gate.weight 6, mlp.experts.gate_up_proj 6, mlp.experts.down_proj 6"),
        (lambda t, c: t.update({ROUTER: t[ROUTER][:5].clone()}), r"layers.2: the numbers of experts disagree: config.json 6, mlp.gate.weight 5"),
        (
            lambda t, c: [t.pop(n) for n in list(t) if n.startswith("mtp.") and ".experts.4." in n],
            r"mtp.layers.0: the numbers of experts disagree: config.json 6, mlp.gate.weight 6, experts stored one by one 5",
        ),
        (lambda t, c: t.pop("mtp.layers.0.mlp.experts.4.up_proj.weight"), r"missing: mtp.layers.0.mlp.experts.4.up_proj.weight"),
    ],
    ids=["config", "router", "expert", "matrix"],
)  # fmt: skip
def test_a_checkpoint_whose_experts_do_not_add_up_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        plan_of(damaged(write_tiny(tmp_path / "m", moe=True), change))


LAYOUTS = [("conditional", "fused", "published"), ("causal", "single", "fused"), ("causal", "fused", "single")]


@pytest.mark.parametrize(
    "export", ["{format: compressed-tensors}", "{format: compressed-tensors, layout: text, experts: single}"]
)
@pytest.mark.parametrize(("layout", "trunk", "head"), LAYOUTS, ids=["-".join(names) for names in LAYOUTS])
def test_every_layout_comes_out_bit_for_bit_but_for_the_experts_that_went(
    tmp_path: Path, layout: Layout, trunk: Experts, head: Head, export: str
) -> None:
    folder = write_tiny(tmp_path / "m", moe=True, layout=layout, trunk_experts=trunk, mtp=head, vision=layout == "conditional")
    plan = plan_of(folder, "{experts: 4}", export=export)
    facts = released(plan, tmp_path / "out")
    source, release = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    old, kept = {s.module.removeprefix("model.language_model.").removeprefix("model."): s for s in map_of(source).slots()}, {}
    for layer in facts.layers:
        kept[layer.component, layer.layer] = layer.kept
        assert len(layer.kept) == 4 and sum(layer.tokens) == 2 * ROWS * (LENGTH - (layer.component == "mtp"))
    assert len(facts.layers) == 5 and facts.layers[-1].component == "mtp"
    for slot in map_of(release).slots():
        component = "mtp" if slot.role.startswith("mtp.") else "text"
        stays = kept.get((component, slot.layer if slot.layer is not None else -1), [])
        module = slot.module.removeprefix("model.language_model.").removeprefix("model.")
        if slot.expert is not None:
            module = module.replace(f"experts.{slot.expert}.", f"experts.{stays[slot.expert]}.")
        expected = source.read(old[module].tensor, old[module].part)
        expected = expected[stays] if slot.role.removeprefix("mtp.") == "router" else expected
        assert same_bits(release.read(slot.tensor, slot.part), expected), slot.module
    text = release.config.get("text_config", release.config)
    assert text["num_experts"] == 4
    assert ("single" in export) <= ("model.layers.1.mlp.experts.3.up_proj.weight" in release.tensors)


def test_the_choice_is_that_of_the_formula_on_the_trained_demo(tmp_path: Path) -> None:
    """Saliency as its authors compute it: the mean of router weight times norm over an expert's tokens, one token at a time, on a model run by transformers."""
    from transformers import Qwen3_5MoeForConditionalGeneration

    plan = plan_of(checkpoint("moe"))
    rows = held_out_rows(checkpoint("moe"), 4, 128)
    facts = released(plan, tmp_path / "out", rows)
    model: Any = Qwen3_5MoeForConditionalGeneration.from_pretrained(checkpoint("moe"), dtype=torch.float32)
    sums, counts = torch.zeros(4, 12, dtype=torch.float64), torch.zeros(4, 12, dtype=torch.int64)

    def look(layer: int, block: Any, hidden: torch.Tensor) -> None:
        for x in hidden.flatten(0, -2):
            shares, chosen = (block.gate.weight @ x).softmax(-1).topk(4)
            for share, expert in zip((shares / shares.sum()).tolist(), chosen.tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                out = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                sums[layer, expert] += share * float(out.norm())
                counts[layer, expert] += 1

    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda block, read, number=number: look(number, block, read[0]))
    with torch.no_grad():
        model(input_ids=rows.ids)
    for number in range(4):
        saliency = sums[number] / counts[number]
        exact = number == 0  # behind the first layer a walk's rows are bfloat16: some tokens stand between two experts
        assert facts.layers[number].tokens == pytest.approx(counts[number].tolist(), abs=0 if exact else 5)
        assert facts.layers[number].saliency == pytest.approx(saliency.tolist(), rel=1e-5 if exact else 0.02)
        assert facts.layers[number].kept == sorted(saliency.topk(6).indices.tolist())


def test_pruned_and_quantized_in_one_walk_runs_as_the_pruned_one_does(tmp_path: Path) -> None:
    folder = checkpoint("moe")
    whole, rounded = plan_of(folder), plan_of(folder, others=INT4, export="{format: auto-round, layout: text}")
    facts = released(whole, tmp_path / "whole"), released(rounded, tmp_path / "rounded")
    assert facts[0] == facts[1], "experts are ranked on the original network, whatever becomes of it"
    release = Checkpoint.open(tmp_path / "rounded")
    assert release.tensors["model.layers.3.mlp.experts.5.down_proj.qweight"].shape == (256 // 8, 128)
    assert not any(".experts.6." in name for name in release.tensors)
    assert release.tensors["mtp.layers.0.mlp.gate.weight"].shape == (6, 128)
    ids = rows_of(992).ids[:3]
    outputs = [
        Trunk(source, map_of(source)).forward(ids) for source in map(open_source, (tmp_path / "whole", tmp_path / "rounded"))
    ]
    error = (outputs[0] - outputs[1]).square().mean() / outputs[0].square().mean()
    assert 0 < float(error) < 0.05


@pytest.mark.parametrize("component", ["text", "mtp"])
def test_an_expert_that_answers_with_nan_is_named_with_its_layer(tmp_path: Path, component: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        if component == "text":
            tensors["model.language_model.layers.2.mlp.experts.down_proj"][4] = math.nan
        else:
            tensors["mtp.layers.0.mlp.experts.4.down_proj.weight"][:] = math.inf

    folder = damaged(write_tiny(tmp_path / "m", moe=True), spoil)
    where = "layer 2" if component == "text" else "mtp layer 0"
    with pytest.raises(
        CheckpointError, match=rf"^{where}: expert 4 puts out NaN or infinity for each of the \d+ calibration tokens"
    ):
        released(plan_of(folder), tmp_path / "out")


@pytest.mark.parametrize("criterion", ["frequency", "norm_max", "random"])
def test_other_criteria_choose_by_their_own_numbers(tmp_path: Path, criterion: str) -> None:
    folder = write_tiny(tmp_path / "m", moe=True)
    by_reap, other = (
        released(plan_of(folder, f"{{ratio: 0.5, criterion: {word}}}"), tmp_path / word) for word in ("reap", criterion)
    )
    assert other.criterion == criterion
    assert [layer.saliency for layer in other.layers] == [layer.saliency for layer in by_reap.layers], "REAP's, to compare with"
    assert [layer.kept for layer in other.layers] != [layer.kept for layer in by_reap.layers]
    for ours, best in zip(other.layers, by_reap.layers, strict=True):
        assert ours.saliency_kept <= best.saliency_kept
        if criterion == "frequency":
            assert sum(ours.tokens[e] for e in ours.kept) >= sum(best.tokens[e] for e in best.kept)


def test_random_choices_follow_the_seed_and_differ_between_layers(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe=True)
    facts = [
        released(plan_of(folder, f"{{ratio: 0.5, criterion: random, seed: {seed}}}"), tmp_path / f"{n}")
        for n, seed in enumerate((3, 3, 4))
    ]
    assert facts[0] == facts[1] != facts[2]
    assert len({tuple(layer.kept) for layer in facts[0].layers}) > 2


def test_experts_that_calibration_barely_reached_are_named() -> None:
    def layer(tokens: list[int]) -> PrunedLayer:
        return PrunedLayer(
            component="mtp", layer=0, kept=[1, 3], tokens=tokens, saliency=[1.0] * 4, saliency_kept=0.5, contribution_kept=0.6
        )

    assert coverage_warning(layer([9, 8, 7, 8]), 7) == ""
    assert coverage_warning(layer([9, 6, 0, 8]), 7) == (
        "mtp layer 0: fewer than 7 calibration tokens reached experts [1, 2], none reached [2]; [1] of them stayed"
    )
    assert coverage_warning(layer([3, 8, 9, 8]), 7).endswith("reached experts [0]; none of them stayed")


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
RUN = """
import sys
sys.argv = ["qwench", "run", {recipe!r}, "--model", {model!r}, "--out", {out!r}]
from qwench.cli import main
main()
"""


def run_in_a_process(recipe: Path, out: Path, before: str = "") -> int:
    code = before + RUN.format(recipe=str(recipe), model=str(checkpoint("moe")), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False).returncode


def test_a_run_that_was_killed_ends_with_the_same_experts_and_the_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: t\nacceptance: off\ncalibration: {samples: 6, length: 64}\nsteps:\n  - prune: {ratio: 0.5, least_tokens: 100}\n"
        f"{INT4}  - export: {{format: auto-round}}\n"
    )
    assert run_in_a_process(recipe, tmp_path / "whole") == 0
    for at in (3, 5):  # behind the third layer, then behind the MTP head
        assert run_in_a_process(recipe, tmp_path / "out", STOP.format(at=at)) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert run_in_a_process(recipe, tmp_path / "out") == 0
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("result.json", "provenance.json"):  # these tell of the run
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    whole, resumed = read_result(tmp_path / "whole"), read_result(tmp_path / "out")
    assert resumed.run.resumed_tensors > 0
    assert whole.pruning == resumed.pruning and whole.pruning is not None
    assert [layer.label for layer in whole.pruning.layers] == ["layer 0", "layer 1", "layer 2", "layer 3", "mtp layer 0"]
    assert whole.pruning.warnings and all("fewer than 100 calibration tokens" in said for said in whole.pruning.warnings)
    assert whole.calibration is not None and "6 of 12 experts stay" in whole.calibration.reports["mtp layer 0 pruning"]


def planned(recipe: str) -> tuple[Plan, dict[str, Any]]:
    """The plan of a bundled recipe on the published 35B-A3B, and what `qwench plan` says of it."""
    config = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    loaded = load_recipe(recipe)
    source = prepared(loaded, sketch(config), None)
    plan = make_plan(loaded, source, map_of(source))
    return plan, as_data(plan)


def test_the_35b_is_planned_from_67_gib_to_35_to_11() -> None:
    """71.9 GB with vision and MTP; half of the experts are 32.2 GB in the trunk and 0.8 GB in the head."""
    plan, said = planned("reap50")
    assert said["source_bytes"] == pytest.approx(71.9e9, rel=1e-3) and said["source_bytes"] / 2**30 == pytest.approx(
        67, rel=1e-2
    )
    assert said["source_bytes"] - said["bytes"] == 2 * (41 * 128 * 3 * 2048 * 512 + 41 * 128 * 2048)
    assert said["bytes"] == pytest.approx(38.9e9, rel=1e-2)
    assert sum(row["source_bytes"] for row in said["precision"]) == said["source_bytes"], "experts that go were somewhere"
    text = plan_of(PUBLISHED, export="{format: compressed-tensors, layout: text, experts: single, drop: [mtp]}")
    assert text.nbytes / 2**30 == pytest.approx(34.6, rel=1e-2), "what release 5 was before it was quantized"
    plan, said = planned("reap50-autoround-int4")
    assert said["bytes"] == pytest.approx(11.2e9, rel=1e-2)
    assert plan.config["num_experts"] == 128 and plan.config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert plan.config["quantization_config"]["packing_format"] == "auto_round:auto_gptq"
    written = {tensor.name for file in plan.files for tensor in file.tensors}
    assert {"model.layers.39.mlp.experts.127.down_proj.qweight", "model.layers.0.mlp.gate.weight"} <= written
    assert not any(".experts.128." in name or name.startswith(("mtp.", "model.visual.")) for name in written)
    plan, said = planned("reap50-autoround-int4-mtp")
    assert said["bytes"] == pytest.approx(12.9e9, rel=1e-2)
    assert plan.config["text_config"]["num_experts"] == 128
    written = {tensor.name for file in plan.files for tensor in file.tensors}
    assert "mtp.layers.0.mlp.experts.127.up_proj.weight" in written and any(
        name.startswith("model.visual.") for name in written
    )
    assert not any(name.startswith("mtp.layers.0.mlp.experts.128.") for name in written)


def test_the_recipe_of_a_mixture_says_what_it_misses_in_a_dense_model() -> None:
    loaded = load_recipe("reap50-autoround-int4")
    source = prepared(loaded, Checkpoint.open(checkpoint("dense")), None)
    with pytest.raises(PlanError, match="this model is dense"):
        make_plan(loaded, source, map_of(source))


def test_a_repair_changes_down_projections_and_nothing_else_and_helps_on_other_rows(tmp_path: Path) -> None:
    rows = held_out_rows(checkpoint("moe"), 24, 96)
    plans = [plan_of(checkpoint("moe"), f"{{ratio: 0.5, repair: {repair}}}") for repair in ("none", "least-squares")]
    plain, mended = (released(plan, tmp_path / str(n), rows) for n, plan in enumerate(plans))
    assert [layer.kept for layer in plain.layers] == [layer.kept for layer in mended.layers]
    assert all(layer.error is None and not layer.repaired for layer in plain.layers)
    assert all(layer.error_repaired < 0.9 * layer.error for layer in mended.layers)  # type: ignore[operator]
    sources = [Checkpoint.open(tmp_path / str(n)) for n in range(2)]
    changed: dict[str, int] = {}
    for block in (*map_of(sources[0]).blocks, *map_of(sources[0]).mtp):
        for slot in block.slots:
            if not same_bits(*(source.read(slot.tensor, slot.part) for source in sources)):
                assert slot.role.removeprefix("mtp.") in ("expert.down", "shared.down"), slot.module
                changed[block.label] = changed.get(block.label, 0) + 1
    assert changed == {layer.label: layer.repaired for layer in mended.layers}
    ids = held_out_rows(checkpoint("moe"), 32, 96).ids[24:]
    original = Checkpoint.open(checkpoint("moe"))
    wanted, cut, whole = (Trunk(source, map_of(source)).forward(ids) for source in (original, *sources))
    assert float((whole - wanted).square().mean()) < 0.8 * float((cut - wanted).square().mean())


def test_a_repair_that_cannot_be_judged_is_left(tmp_path: Path) -> None:
    rows = rows_of(416)
    few = Rows(rows.ids[:3], (0, 1, 2), ("0", "1", "2"), "random ids", "ab" * 32, ids_sha256(rows.ids[:3]))
    plan = plan_of(write_tiny(tmp_path / "m", moe=True), "{ratio: 0.5, repair: least-squares}")
    assert not any(layer.repaired for layer in released(plan, tmp_path / "out", few).layers)


def test_a_row_that_overflows_takes_no_part_in_the_ranking(tmp_path: Path) -> None:
    """From the layer on that makes it non-finite; what it did in that layer's sums before somebody noticed is not in them either."""
    plan = plan_of(overflowing(write_tiny(tmp_path / "m", moe=True)))
    rows = rows_of(416)
    rows.ids[rows.ids == TOKEN] = TOKEN + 1
    rows.ids[8, 30] = TOKEN
    facts = released(plan, tmp_path / "out", rows)
    assert [sum(layer.tokens) for layer in facts.layers] == [2 * 400, *[2 * 360] * 3, 2 * 9 * 39]
    assert all(layer.not_finite == 0 for layer in facts.layers)
