"""Plans of GGUF files: published sizes from a config alone, types of roles, complaints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwench.errors import PlanError
from qwench.formats.gguf import GgufPlan, Override, plan_gguf
from qwench.models import map_of, sketch
from tests.support.tiny import tiny_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GIB = 2**30


def planned(config: dict[str, Any], **arguments: Any) -> GgufPlan:
    source = sketch(config)
    return plan_gguf(source, map_of(source), **arguments)


def types(plan: GgufPlan) -> dict[str, str]:
    return {t.tensor.name: t.type for t in plan.tensors}


@pytest.mark.parametrize(
    ("file_type", "size"), [("BF16", 17.14), ("Q8_0", 9.11), ("Q6_K", 7.04), ("Q4_K_M", 5.38)]
)  # of a published release with MTP
def test_published_sizes_of_the_9b(file_type: str, size: float) -> None:
    config = json.loads((CONFIGS / "qwen3.5-9b.json").read_text(encoding="utf-8"))
    plan = planned(config, file_type=file_type)
    assert plan.tensor_bytes / GIB == pytest.approx(size, rel=0.003)
    assert not plan.notes
    assert sum(".nextn." in t.tensor.name for t in plan.tensors) == 4


def test_published_size_of_the_tower() -> None:
    config = json.loads((CONFIGS / "qwen3.5-9b.json").read_text(encoding="utf-8"))
    assert planned(config, content="vision").tensor_bytes / GIB == pytest.approx(0.86, rel=0.003)


def test_the_35b() -> None:
    config = json.loads((CONFIGS / "qwen3.5-35b-a3b.json").read_text(encoding="utf-8"))
    plan = planned(config, file_type="Q4_K_M")
    assert plan.architecture == "qwen35moe" and not plan.notes
    assert types(plan)["blk.40.ffn_down_exps.weight"] == "Q6_K"
    assert 4.7 < plan.bits_per_weight < 5.1
    assert plan.parameters > 35e9


def test_parts_add_up() -> None:
    config = tiny_config(moe=True)
    whole, trunk, head = (set(types(planned(config, content=c))) for c in ("model", "trunk", "mtp"))
    assert whole == trunk | head
    assert trunk & head == {"token_embd.weight", "output.weight", "output_norm.weight"}


def test_roles_get_what_they_are_given() -> None:
    overrides = [Override("delta.*", "Q8_0"), Override("delta.out", "BF16"), Override("mtp.*", "Q6_K")]
    found = types(planned(tiny_config(moe=True), file_type="Q4_0", overrides=overrides))
    assert found["blk.1.attn_qkv.weight"] == found["blk.1.ssm_alpha.weight"] == "Q8_0"
    assert found["blk.1.ssm_out.weight"] == "BF16"
    assert found["blk.1.ssm_conv1d.weight"] == found["blk.1.ssm_norm.weight"] == "F32"
    assert found["blk.4.ffn_down_exps.weight"] == "Q6_K" and found["blk.1.ffn_down_exps.weight"] == "Q4_0"
    assert found["blk.4.nextn.eh_proj.weight"] == "Q6_K"
    assert found["blk.4.attn_q.weight"] == "Q8_0"  # 128 columns: Q6_K falls back


def test_fallbacks_are_said() -> None:
    notes = planned(tiny_config(), file_type="Q4_K_M").notes
    (said,) = [n for n in notes if "Q5_0 and not Q4_K, whose blocks of 256 do not divide rows of 128" in n]
    count, _, roles = said.partition(" tensors are ")[0], *said.partition(": ")[1:]
    found = types(planned(tiny_config(), file_type="Q4_K_M"))
    assert int(count) == sum(
        t == "Q5_0" for n, t in found.items() if n.split(".")[-2] not in ("ssm_out", "attn_output", "ffn_down")
    )
    assert {"attention.k", "delta.z", "embed"} <= set(roles.split(", "))


def test_float16_matrices_come_with_a_warning() -> None:
    assert any("BF16" in note for note in planned(tiny_config(), file_type="F16").notes)
    assert not planned(tiny_config(), file_type="F16", content="vision").notes


def test_a_tower_is_never_mixed() -> None:
    assert set(types(planned(tiny_config(), content="vision", file_type="Q8_0")).values()) == {"Q8_0", "F32", "F16"}
    with pytest.raises(PlanError, match="mmproj cannot be Q4_K_M"):
        planned(tiny_config(), content="vision", file_type="Q4_K_M")


def test_every_complaint_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        planned(tiny_config(), file_type="Q4_KM", overrides=[Override("mtp.*", "Q9_K"), Override("delta.*", "Q8_0")])
    complaints = [what for what, _ in caught.value.complaints]
    assert complaints[0] == "'Q4_KM' is no GGUF file type (did you mean 'Q4_K_M'?)"
    assert complaints[1].startswith("'Q9_K', meant for mtp.*, is no type of a GGUF tensor (did you mean 'Q")
    assert len(complaints) == 2


def test_overrides_without_effect() -> None:
    with pytest.raises(PlanError) as caught:
        planned(tiny_config(), overrides=[Override("expert.*", "Q8_0"), Override("norm.*", "Q8_0")])
    assert [what for what, _ in caught.value.complaints] == [
        "no tensor of the file has a role like 'expert.*'",
        "norm.* is stored in F32 in every GGUF file",
    ]
