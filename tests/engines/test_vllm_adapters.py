"""vLLM serves the corrections of a release as a LoRA: Gated DeltaNet, attention and MLPs, fused sets member by member, over both containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.engines import ENGINES, Request
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from qwench.steps.checks.verify import verify
from tests.engines.adapters import effect, write_adapter

ROWS = [[(11 * i + 5 * j * j) % 1300 + 16 for j in range(33)] for i in range(2)]
RANK = 160
"""More than the smallest weights can have (128), so that ranks differ by module, and none of those that vLLM makes room for."""
RECIPE = """
name: t
steps:
  - quantize:
      rules: [{roles: [attention.*, delta.qkv, delta.z, delta.out, mlp.*], scheme: int4}]
  - export: {format: FORMAT}
"""


@pytest.mark.engine("vllm")
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_corrections_are_served(format: str, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", parse_recipe(RECIPE.replace("FORMAT", format), "t")
    run_recipe(recipe, str(checkpoint("dense")), out, 1, Report("t", "bytes", None), accept_any=True)
    adapter = write_adapter(out, tmp_path / "adapter", RANK)
    found = verify(out, "vllm", ROWS, threads=1, adapter=adapter)
    assert found.outcome in {"agrees", "loads"}, found.notes  # `loads` where a stand-in computes INT4
    assert found.uninitialized == [] and "corrections of 50 modules were added on both sides" in found.notes
    assert found.mean_kl is not None and found.mean_kl < 5e-4
    assert effect(out, adapter, ROWS) > 0.05
    assert found.speculation is None and {n.split(".")[0] for n in found.unconsumed if not n.endswith("g_idx")} == {"mtp"}


@pytest.mark.engine("vllm")
def test_drafts_and_corrections_at_once_are_refused(tmp_path: Path) -> None:
    """vLLM's own numbers are wrong then, also without a correction: see docs/engines.md."""
    answer = ENGINES["vllm"](Request(checkpoint("dense"), ROWS, speculate=2, image=False, adapter=tmp_path))
    assert answer.refused is not None and "ask for one of them" in answer.refused and answer.logprobs == []
