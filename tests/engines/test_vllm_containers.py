"""vLLM reads GPTQ and auto-round releases as we do: INT8 attention, INT4 elsewhere with signed scales, a layer kept, experts, the MTP head."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.display import Report
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from qwench.steps.checks.verify import verify
from tests.support.oracle import write_runnable

ROWS = [[(11 * i + 5 * j * j) % 1300 + 16 for j in range(33)] for i in range(2)]
RECIPE = """
name: t
steps:
  - quantize:
      rules:
        - {roles: [attention.*], scheme: {kind: int, bits: 8, group: 32}}
        - {roles: [delta.qkv, delta.z, delta.out, ROLES], scheme: {kind: int, bits: 4, group: 64, full_range: true}}
        - {roles: [MTP], scheme: {kind: int, bits: 4, group: 32}}
        - {roles: [KEPT], scheme: keep, layers: "1"}
  - export: {format: FORMAT}
"""


@pytest.mark.engine("vllm")
@pytest.mark.parametrize("format", ["gptq", "auto-round"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_mixed_integers(moe: bool, format: str, tmp_path: Path) -> None:
    roles, kept, head = ("expert.*, shared.*", "expert.*", "mtp.shared.*") if moe else ("mlp.*", "mlp.*", "mtp.mlp.*")
    text = RECIPE.replace("ROLES", roles).replace("KEPT", kept).replace("MTP", head).replace("FORMAT", format)
    source = write_runnable(tmp_path / "source", moe=moe)
    run_recipe(parse_recipe(text, "t"), str(source), tmp_path / "out", 1, Report("t", "bytes", None), accept_any=True)
    found = verify(tmp_path / "out", "vllm", ROWS, threads=1)
    assert found.outcome == "loads", found.notes  # INT8 has no kernel on a CPU
    assert found.uninitialized == [] and all(name.endswith(".g_idx") for name in found.unconsumed)
    assert any("INT8 linear layers" in note for note in found.notes)
    assert any("integer experts" in note for note in found.notes) == moe
    assert found.mean_kl is not None and found.tolerance_kl is not None and found.mean_kl < found.tolerance_kl
