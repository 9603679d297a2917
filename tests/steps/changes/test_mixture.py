"""Calibrated methods on a mixture of experts, end to end, in both layouts that checkpoints have: fused experts and single ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.formats.release import open_source
from qwench.models import map_of
from qwench.models.weights import read_slot
from qwench.recipe import parse_recipe
from qwench.result import read_result
from qwench.run import run_recipe

RECIPE = """
name: t
calibration: {{samples: 6, length: 64}}
steps:
  - smooth: {{folds: [norm.post, expert.up, shared.up], layers: "1", grid: 4, clip: true}}
  - quantize:
      method: {method}
      gptq: {{least_tokens: 100}}
      autoround: {{iterations: 4, batch: 3, start: gptq}}
      rules: [{{roles: [expert.*, shared.gate, shared.up, shared.down], scheme: int4, layers: "1"}}]
  - export: {{format: compressed-tensors}}
"""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The carried mixture as it is, and with the experts of its trunk stored one by one."""
    fused = checkpoint("moe")
    single = tmp_path_factory.mktemp("single") / "moe"
    shutil.copytree(fused, single, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor for path in fused.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stem, whole = name.rpartition(".")[0], tensors.pop(name)
        for e, expert in enumerate(whole):
            parts = (
                zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True) if "gate_up" in name else [("down_proj", expert)]
            )
            tensors |= {f"{stem}.{e}.{part}.weight": weight.clone() for part, weight in parts}
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    return fused, single


@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround"])
def test_both_layouts_give_the_same_release(layouts: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    recipe = parse_recipe(RECIPE.format(method=method), "t")
    for name, source in zip(("fused", "single"), layouts, strict=True):
        run_recipe(recipe, str(source), tmp_path / name, 0, Report("test", "bytes", None))
    releases = [open_source(tmp_path / name) for name in ("fused", "single")]
    slots = [{(s.role, s.expert): s for s in map_of(release).blocks[1].slots} for release in releases]
    assert slots[0].keys() == slots[1].keys()
    original, changed = open_source(layouts[0]), 0
    originals = {(s.role, s.expert): s for s in map_of(original).blocks[1].slots}
    for key in slots[0]:
        one, other = (read_slot(r, s[key], torch.float32) for r, s in zip(releases, slots, strict=True))
        assert torch.equal(one, other), key
        changed += not torch.equal(one, read_slot(original, originals[key], torch.float32))
    assert changed >= 3 * 12 + 3, "three matrices for each of twelve experts, and the shared expert"
    records = [read_result(tmp_path / name).calibration for name in ("fused", "single")]
    assert records[0] is not None and records[1] is not None
    assert records[0].reports == records[1].reports
    said = records[0].reports
    assert "of 12 get scales" in said["layer 1 expert.up"]
    assert "of the groups narrowed" in said["layer 1 expert.down clip"]
    fallbacks = [key for key, text in said.items() if "tokens were seen, 100 are wanted" in text]
    assert (0 < len(fallbacks) < 24) == (method != "rtn"), "384 tokens, four experts of twelve each"
    assert ("layer 1 autoround" in said) == (method == "autoround")
