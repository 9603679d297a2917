"""vLLM, really run where `make engines` has been: names, numbers, images, drafts; each process takes 15 s and more, so each test asks for much."""

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
from tests.support.oracle import cycle_row, write_oracle, write_runnable
from tests.support.releases import release, rewrite

ROWS = [[(11 * i + 5 * j * j) % 1300 + 16 for j in range(33)] for i in range(2)]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("vllm") / "moe", moe=True)


@pytest.mark.engine("vllm")
def test_int4_dense_agrees_hears_images_and_drafts(tmp_path: Path) -> None:
    found = verify(release(checkpoint("dense"), "int4", tmp_path / "int4"), "vllm", threads=1)
    assert found.outcome in {"agrees", "loads"}, (
        found.notes
    )  # `loads` on machines without AVX512: a stand-in for the INT4 kernel
    assert found.unconsumed == [] and found.uninitialized == [] and found.consumed == 221
    assert found.mean_kl is not None and found.mean_kl < 2e-4
    assert found.image is not None and "changes what it says" in found.image
    assert found.speculation is not None and found.speculation["accepted"] > 0


@pytest.mark.engine("vllm")
def test_bf16_experts_agree(moe: Path) -> None:
    found = verify(moe, "vllm", ROWS, threads=1)
    assert found.outcome == "agrees", found.notes
    assert found.unconsumed == [] and found.uninitialized == []


@pytest.mark.engine("vllm")
def test_nvfp4_dense_loads_and_its_numbers_are_not_called_proved(tmp_path: Path) -> None:
    found = verify(release(checkpoint("dense"), "nvfp4a16-gdn", tmp_path / "out"), "vllm", threads=1)
    assert found.outcome == "loads" and found.unconsumed == [] and found.uninitialized == []
    assert any("not proved" in note and "NVFP4 linear layers" in note for note in found.notes)
    assert found.mean_kl is not None and found.mean_kl < 2e-4


@pytest.mark.engine("vllm")
@pytest.mark.parametrize(("recipe", "kernel"), [("nvfp4a16", "NVFP4 experts"), ("int4", "integer experts")])
def test_quantized_experts_load(recipe: str, kernel: str, moe: Path, tmp_path: Path) -> None:
    found = verify(release(moe, recipe, tmp_path / "out"), "vllm", ROWS, threads=1)
    assert found.outcome == "loads" and found.unconsumed == [] and found.uninitialized == []
    assert any(kernel in note for note in found.notes)
    assert found.mean_kl is not None and found.tolerance_kl is not None and found.mean_kl < found.tolerance_kl


@pytest.mark.engine("vllm")
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_every_draft_of_a_right_head_is_accepted(moe: bool, tmp_path: Path) -> None:
    row = cycle_row(32)
    answer = ENGINES["vllm"](Request(write_oracle(tmp_path / "m", moe), [row], generate=40, top_k=5, image=False, speculate=2))
    assert answer.refused is None and answer.generated == cycle_row(72)[32:]
    assert answer.speculation is not None and answer.speculation["drafted"] >= 24
    assert answer.speculation["accepted"] == answer.speculation["drafted"]


@pytest.mark.engine("vllm")
def test_a_scale_that_is_missing_is_found(tmp_path: Path) -> None:
    """vLLM itself says nothing: it takes the largest of the three outer scales of q, k and v, and one of them is whatever memory held."""
    broken = release(checkpoint("dense"), "nvfp4a16", tmp_path / "out")
    rewrite(broken, {"model.language_model.layers.3.self_attn.k_proj.weight_global_scale": None})
    answer = ENGINES["vllm"](Request(broken, ROWS[:1], generate=1, top_k=5, image=False))
    assert any(name.endswith("layers.3.self_attn.qkv_proj.weight_global_scale") for name in answer.uninitialized)


@pytest.mark.engine("vllm")
def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint("dense"), tmp_path / "m")
    rewrite(broken, {"model.language_model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.upward.weight"})
    answer = ENGINES["vllm"](Request(broken, ROWS[:1], generate=1, top_k=5, image=False))
    assert answer.refused is not None and any("layers.1.mlp.gate_up_proj" in name for name in answer.uninitialized)
    assert "model.language_model.layers.1.mlp.upward.weight" not in answer.consumed


FOUR_BITS = """
name: t
calibration: {samples: 4, length: 48}
steps:
  - quantize:
      rules:
        - {roles: [mlp.*, expert.*, shared.*], scheme: nvfp4-w4a4}
        - {roles: [attention.*, delta.qkv, delta.z, delta.out], scheme: fp8-w8a8}
  - export: {format: compressed-tensors}
"""


@pytest.mark.engine("vllm")
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_rounded_inputs_are_loaded_and_rounded(model: str, tmp_path: Path) -> None:
    """NVFP4 with 4-bit inputs, experts too, beside FP8 with 8-bit inputs, in one file."""
    run_recipe(parse_recipe(FOUR_BITS, "t"), str(checkpoint(model)), tmp_path / "out", 0, Report("t", "bytes", None))
    found = verify(tmp_path / "out", "vllm", threads=1)
    assert found.outcome == "loads" and found.unconsumed == [] and found.uninitialized == [], found.notes
    assert any("NVFP4 linear layers with 4-bit inputs" in note for note in found.notes)
    assert any("4-bit inputs of experts" in note for note in found.notes) == (model == "moe")
    assert any("our own reading in bfloat16" in note for note in found.notes)
    assert found.mean_kl is not None and found.tolerance_kl is not None and found.mean_kl < found.tolerance_kl < 0.02
