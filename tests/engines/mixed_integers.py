"""Release 4 in small, for the two tools that read integers under torch: INT8 attention, INT4 elsewhere, one layer kept in part. GPTQModel and auto-round are asked the same of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwench.display import Report
from qwench.engines import ENGINES, Answer, Request
from qwench.recipe import parse_recipe
from qwench.result import Verification
from qwench.run import run_recipe
from qwench.steps.checks.verify import verify
from tests.support.releases import rewrite
from tests.support.tiny import write_tiny

ROWS = [[(7 * i + j * j) % 300 + 8 for j in range(19)] for i in range(2)]
EXACT = 1e-6
"""Both sides compute in float32 on the same decoded numbers: nothing but the order of sums is left. (auto-round's float16 scales hold our bfloat16 ones.)"""
RECIPE = """
name: t
steps:
  - quantize:
      rules:
        - {roles: [attention.*], scheme: {kind: int, bits: 8, group: WIDE}}
        - {roles: [delta.qkv, delta.z, delta.out, ROLES], scheme: {kind: int, bits: 4, group: GROUP, full_range: true}}
        - {roles: [KEPT], scheme: keep, layers: "1"}
  - export: {format: FORMAT}
"""


def make(model: Path, out: Path, container: str, roles: str, kept: str = "", group: int = 128, wide: int = 64) -> Path:
    """A release in a container. `kept`: roles that layer 1 keeps; none where it is empty."""
    lines = [line for line in RECIPE.splitlines() if kept or "KEPT" not in line]
    text = "\n".join(lines).replace("ROLES", roles).replace("KEPT", kept).replace("FORMAT", container)
    text = text.replace("GROUP", str(group)).replace("WIDE", str(wide))
    run_recipe(parse_recipe(text, "t"), str(model), out, 1, Report("t", "bytes", None), accept_any=True)
    return out


def agrees(folder: Path, engine: str, rows: list[list[int]] | None = None) -> Verification:
    """That an engine's numbers for a folder are ours and that nothing was left uninitialized; only the head may be left out."""
    found = verify(folder, engine, rows, threads=1)
    assert found.outcome == "agrees", found.notes
    assert found.mean_kl is not None and abs(found.mean_kl) < EXACT
    assert found.uninitialized == [] and all(name.startswith("mtp.") for name in found.unconsumed)
    return found


def agrees_on_release_5(tmp_path: Path, engine: str, kept: str = "") -> None:
    """The layout of release 5: text only, experts one by one."""
    model = write_tiny(tmp_path / "m", moe=True, layout="causal", trunk_experts="single", mtp=None)
    container = "gptq" if engine == "gptqmodel" else engine
    found = agrees(make(model, tmp_path / "out", container, "expert.*, shared.*", kept, group=32, wide=32), engine, ROWS)
    assert found.unconsumed == [] and found.image is None


def misses_a_renamed_scale(folder: Path, tmp_path: Path, engine: str) -> None:
    """That a scale under another name is found on both sides."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    right, wrong = (f"model.language_model.layers.3.self_attn.k_proj.{name}" for name in ("scales", "scale"))
    rewrite(broken, {right: wrong})
    answer: Answer = ENGINES[engine](Request(broken, ROWS, generate=1, image=False))
    assert wrong not in answer.consumed and right not in answer.consumed and right in answer.uninitialized
