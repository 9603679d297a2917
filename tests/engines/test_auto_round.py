"""auto-round, really run where `make engines` has been: transformers opens our auto-round releases with its layers, dense and experts, at their own bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.engines import ENGINES, Request
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from qwench.steps.checks.verify import verify
from tests.support.releases import rewrite
from tests.support.tiny import write_tiny

ROWS = [[(7 * i + j * j) % 300 + 8 for j in range(19)] for i in range(2)]
EXACT = 1e-6
"""Both sides compute in float32 on the same decoded numbers; auto-round's float16 scales hold our bfloat16 ones."""
RECIPE = """
name: t
steps:
  - quantize:
      rules:
        - {roles: [attention.*], scheme: {kind: int, bits: 8, group: WIDE}}
        - {roles: [delta.qkv, delta.z, delta.out, ROLES], scheme: {kind: int, bits: 4, group: GROUP, full_range: true}}
        - {roles: [KEPT], scheme: keep, layers: "1"}
  - export: {format: auto-round}
"""


def make(model: Path, out: Path, roles: str, kept: str, group: int = 128, wide: int = 64) -> Path:
    text = RECIPE.replace("ROLES", roles).replace("KEPT", kept).replace("GROUP", str(group)).replace("WIDE", str(wide))
    run_recipe(parse_recipe(text, "t"), str(model), out, 1, Report("t", "bytes", None), accept_any=True)
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(checkpoint("dense"), tmp_path_factory.mktemp("auto-round") / "dense", "mlp.*", "mlp.*")


@pytest.mark.engine("auto-round")
def test_every_module_at_its_own_bits(dense: Path) -> None:
    found = verify(dense, "auto-round", threads=1)
    assert found.outcome == "agrees", found.notes
    assert found.mean_kl is not None and abs(found.mean_kl) < EXACT
    assert found.uninitialized == [] and found.consumed == 236
    assert len(found.unconsumed) == 15 and all(name.startswith("mtp.") for name in found.unconsumed)
    assert any("15 tensors are not read by this engine" in note for note in found.notes)
    kinds = "39 INT4 in groups of 128 (qlinear_torch_zp), 8 INT8 in groups of 64 (qlinear_torch_zp)"
    assert f"auto-round built quantized modules: {kinds}" in found.notes
    assert found.image is not None and "changes what it says" in found.image


@pytest.mark.engine("auto-round")
def test_experts_agree(tmp_path: Path) -> None:
    """Those of layer 1 are kept: stored one by one, for fused ones would stay random beside quantized layers."""
    out = make(checkpoint("moe"), tmp_path / "moe", "expert.*, shared.*", "shared.*, expert.*")
    found = verify(out, "auto-round", threads=1)
    assert found.outcome == "agrees", found.notes
    assert found.mean_kl is not None and abs(found.mean_kl) < EXACT
    assert found.uninitialized == [] and all(name.startswith("mtp.") for name in found.unconsumed)
    assert any("126 INT4 in groups of 128" in note and "4 INT8 in groups of 64" in note for note in found.notes)


@pytest.mark.engine("auto-round")
def test_a_text_only_checkpoint_with_experts_one_by_one(tmp_path: Path) -> None:
    """The layout of release 5."""
    model = write_tiny(tmp_path / "m", moe=True, layout="causal", trunk_experts="single", mtp=None)
    out = make(model, tmp_path / "out", "expert.*, shared.*", "shared.*", group=32, wide=32)
    found = verify(out, "auto-round", ROWS, threads=1)
    assert found.outcome == "agrees", found.notes
    assert found.unconsumed == [] and found.uninitialized == [] and found.image is None


@pytest.mark.engine("auto-round")
def test_a_scale_under_another_name_is_found(dense: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(dense, tmp_path / "broken")
    right, wrong = (f"model.language_model.layers.3.self_attn.k_proj.{name}" for name in ("scales", "scale"))
    rewrite(broken, {right: wrong})
    answer = ENGINES["auto-round"](Request(broken, ROWS, generate=1, image=False))
    assert wrong not in answer.consumed and right not in answer.consumed and right in answer.uninitialized


@pytest.mark.engine("auto-round")
def test_an_adapter_is_refused(dense: Path, tmp_path: Path) -> None:
    answer = ENGINES["auto-round"](Request(dense, ROWS, image=False, adapter=tmp_path))
    assert answer.refused is not None and "no way to add an adapter" in answer.refused and answer.logprobs == []
