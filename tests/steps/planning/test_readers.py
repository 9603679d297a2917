"""What engines would stumble over, said by a plan and kept in the record: the rules of `qwench.loading` on a release that is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.recipe import load_recipe, parse_recipe
from qwench.result import read_result
from qwench.run import plan_for, run_recipe
from qwench.steps.cards.engines import engine_sections
from qwench.steps.checks.proof import offline
from qwench.steps.materials.prepare import prepared
from qwench.steps.planning import readers
from qwench.steps.planning.plan import Plan, make_plan
from qwench.steps.planning.readers import ENGINES, planned_proofs, reader_notes

EVERY = "attention.*, delta.qkv, delta.z, delta.out, expert.*, shared.*"


def text_of(rule: str, export: str) -> str:
    return f"name: t\nacceptance: off\nsteps:\n  - quantize: {{rules: [{{roles: [{EVERY}], scheme: int4{rule}}}]}}\n  - export: {export}\n"


def plan_of(text: str) -> Plan:
    recipe = parse_recipe(text, "t")
    source = prepared(recipe, Checkpoint.open(checkpoint("moe")), None)
    return make_plan(recipe, source, map_of(source))


@pytest.mark.parametrize(
    ("rule", "export", "says"),
    [
        ("", "{format: auto-round}", []),
        ("", "{format: compressed-tensors}", []),
        ("", "{format: gptq}", ["sglang 0.5.23, by its rules: Qwen3_5ForCausalLMMTP: a module would run on whatever memory held", "quantizes all experts of a GPTQ file"]),
        ("", "{format: gptq, drop: [mtp]}", []),
        (", layers: 1..", "{format: gptq, drop: [mtp]}", ["layers.0.mlp.experts is built as int4 g128 and has no 'weight'", "quantizes all experts of a GPTQ file"]),
        (", layers: 1..", "{format: compressed-tensors}", ["mlp.experts (3): built as int4 g128, and the file's weight_packed", "store kept experts one by one"]),
        (", layers: 1..", "{format: compressed-tensors, experts: single}", ["transformers"]),
        (", layers: 1..", "{format: auto-round}", []),
    ],
    ids=["auto-round", "ct", "gptq, head kept", "gptq, no head", "gptq, a layer kept", "ct, a fused layer kept", "ct, a single layer kept", "auto-round, a layer kept"],
)  # fmt: skip
def test_a_plan_says_which_engine_would_not_load_it(rule: str, export: str, says: list[str]) -> None:
    notes = reader_notes(plan_of(text_of(rule, export)))
    assert bool(notes) == bool(says), notes
    assert all(any(word in note for note in notes) for word in says), notes
    assert any(note.startswith("sglang") for note in notes) == any("sglang" in word or "experts" in word for word in says)


def test_release_5_has_nothing_against_it() -> None:
    for name in ("reap50", "reap50-autoround-int4", "reap50-autoround-int4-mtp"):
        recipe = load_recipe(name)
        source = prepared(recipe, Checkpoint.open(checkpoint("moe")), None)
        assert reader_notes(make_plan(recipe, source, map_of(source))) == []


def test_plan_record_and_card_say_what_the_finished_folder_shows(tmp_path: Path) -> None:
    recipe = parse_recipe(text_of(", layers: 1..", "{format: compressed-tensors}"), "t")
    (note,) = [note for note in plan_for(recipe, "demo:moe").notes if note.startswith("sglang")]
    run_recipe(recipe, str(checkpoint("moe")), tmp_path / "out", 0, Report("t", "bytes", None))
    result = read_result(tmp_path / "out")
    assert [proof.engine for proof in result.load_proofs] == list(ENGINES)
    for proof in result.load_proofs:
        shown = offline(tmp_path / "out", proof.engine)
        assert [f.what for f in proof.findings] == [f.what for f in shown.findings]
        assert proof.consumed == shown.consumed and proof.good == shown.good
    sections = {section["title"]: section for section in engine_sections(result, "t")}
    assert sections["SGLang"]["status"] == f"{note}." and sections["SGLang"]["command"] is None
    assert sections["vLLM"]["status"] == "Not verified."


def test_a_plan_that_no_table_can_play_through_has_no_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("numbers that no table knows", "ask another")

    plan = plan_of(text_of("", "{format: gptq}"))
    monkeypatch.setattr(readers, "prove", refuse)
    assert planned_proofs(plan) == [] == reader_notes(plan)
