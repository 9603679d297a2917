"""The known failures of the field, each broken as others write it and right as we write it: what every engine would make of it, with no engine at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import EngineError
from qwench.loading.findings import Finding
from qwench.loading.proof import TABLES, prove
from tests.loading.cases import CASES, make, release, variant

ENGINES = ("vllm", "sglang", "sglang-0.5.19", "transformers")
FINE = ("", "", "", "")
EVERYWHERE = {
    "good dense bf16": FINE,
    "good moe bf16": FINE,
    "good dense int4": FINE,
    "good moe int4": FINE,
    "good dense nvfp4a16": ("", "", "refuses", ""),
    "good moe nvfp4a16": ("", "", "refuses", "wrong"),
    "good dense fp8": FINE,
    "good dense fp8-block": ("", "refuses", "refuses", ""),
    "good dense fp8-w8a8": FINE,
    "fp8 head missing from ignore": ("random", "random", "random", ""),
    "good dense gptq": FINE,
    "good dense gptq8": FINE,
    "good moe gptq": ("", "random", "random", ""),
    "good dense auto-round": FINE,
    "good moe auto-round": FINE,
    "good moe kept": ("", "random", "random", ""),
    "good dense text": FINE,
    "good moe text": FINE,
    "text-only with image positions": ("wrong", "", "", ""),
    "head's shards in ignore": ("", "", "random", ""),
    "fc quantized by a broad target": ("refuses", "", "", ""),
    "fc stored quantized": ("", "random", "random", ""),
    "head's experts missing from ignore": ("refuses", "random", "random", ""),
    "half of a joined module in ignore": ("refuses", "refuses", "refuses", "random"),
    "prefix-bound pattern": ("refuses", "", "", ""),
    "a global scale is missing": ("random", "random", "refuses", "random"),
    "a global scale differs": ("wrong", "refuses", "refuses", ""),
    "an expert's global scale differs": ("wrong", "refuses", "refuses", "wrong"),
    "a tensor has another name": ("refuses", "random", "random", "random"),
    "a norm is missing": ("random", "random", "random", "random"),
    "scales of one expert are missing": ("random", "random", "random", "random"),
    "unpruned head": ("refuses", "refuses", "refuses", ""),
    "good moe pruned": FINE,
    "good dense nvfp4 w4a4": FINE,
    "one expert too many": ("lost", "lost", "lost", ""),
    "gptq dynamic names q alone": ("refuses", "refuses", "refuses", ""),
    "gptq without a pattern for the head": ("", "random", "random", ""),
    "gptq moe without a pattern for the head": ("refuses", "random", "random", ""),
    "gptq says desc_act": ("refuses", "", "", ""),
    "gptq says asymmetric": ("refuses", "refuses", "refuses", ""),
    "auto-round stacks by another name": ("refuses", "random", "random", "random"),
    "auto-round half of a joined module": ("refuses", "refuses", "refuses", "random"),
    "a tower beside a text-only class": ("refuses", "random", "random", ""),
    "two files and none named": ("", "", "", "random"),
    "kept experts fused in gptq": ("", "random", "random", "random"),
}
"""For each case the worst that happens in each of ENGINES; nothing where it loads and means what is stored."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


def findings(folder: Path, engine: str, values: bool = True) -> tuple[Finding, ...]:
    with Checkpoint.open(folder) as source:
        return prove(source, engine, values).findings


def test_every_case_is_here() -> None:
    assert set(CASES) == set(EVERYWHERE)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_the_worst_in_every_engine(case: str, home: Path) -> None:
    folder = make(home, case)
    worst = [next((f.level for f in findings(folder, engine) if f.level != "note"), "") for engine in ENGINES]
    assert worst == list(EVERYWHERE[case])


def test_sglang_drops_five_tensors_of_a_head_whose_shards_are_in_ignore(home: Path) -> None:
    """sglang #35797: a draft head that runs on random numbers, with an acceptance length of 1.000."""
    from qwench.loading import sglang

    with Checkpoint.open(make(home, "head's shards in ignore")) as source:
        _, head = sglang.replay(source.config, source.tensors, "0.5.19")
        _, mended = sglang.replay(source.config, source.tensors, "0.5.21")
    lost = sorted(name for name, dropped in head.dropped.items() if not dropped.designed)
    assert lost == [
        "mtp.layers.0.mlp.gate_proj.weight", "mtp.layers.0.mlp.up_proj.weight",
        "mtp.layers.0.self_attn.k_proj.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.self_attn.v_proj.weight",
    ]  # fmt: skip
    assert not mended.unfilled
    (finding,) = findings(make(home, "head's shards in ignore"), "sglang-0.5.19")
    assert "re:^mtp" in finding.mend and "35797" in finding.rule


def test_experts_after_a_fused_tensor_are_lost_to_sglang(home: Path) -> None:
    """Layer 1 is kept and fused, layers 0, 2 and 3 are quantized one by one: what comes after the fused tensor is dropped."""
    (finding,) = findings(make(home, "good moe kept"), "sglang")
    assert finding.names == ("model.language_model.layers.2.mlp.experts", "model.language_model.layers.3.mlp.experts")
    assert "is_fused_expert" in finding.rule


def test_a_differing_global_scale_is_told_with_its_numbers_and_needs_the_values(home: Path) -> None:
    folder = make(home, "an expert's global scale differs")
    (finding,) = findings(folder, "vllm")
    assert "experts.5" in finding.what and "gate_proj 7909.52, up_proj 3954.76" in finding.what
    assert findings(folder, "vllm", values=False) == ()


def test_what_stops_an_engine_names_tensor_and_module(home: Path) -> None:
    (finding,) = findings(make(home, "fc quantized by a broad target"), "vllm")
    assert finding.names == ("mtp.fc.weight",) and "built as int4 g128" in finding.what and "ignore" in finding.mend


def test_rules_say_where_they_were_read() -> None:
    for table in TABLES.values():
        assert len({rule.name for rule in table.rules}) == len(table.rules)
        assert all(rule.says and ("/" in rule.source or "issue" in rule.source) for rule in table.rules)


def test_unknown_engines_and_methods(home: Path, tmp_path: Path) -> None:
    with Checkpoint.open(release(home, "dense", "bf16")) as source, pytest.raises(EngineError, match="did you mean 'vllm'"):
        prove(source, "vlm")
    other = variant(
        release(home, "dense", "bf16"), tmp_path / "m", lambda c: c.update(quantization_config={"quant_method": "hqq"})
    )
    told = {engine: findings(other, engine)[0] for engine in ENGINES}
    assert [finding.level for finding in told.values()] == ["refuses", "refuses", "refuses", "unknown"]
    assert "does not read 'hqq'" in told["vllm"].what and "transformers" in told["vllm"].mend
    assert "not played through" in told["transformers"].what
