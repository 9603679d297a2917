"""Layers on a device of their own: nothing that meets there comes from elsewhere, and the result is the same.

Recipes run on a device that is pretended (see `tests.support.pretend`), which is as strict as a GPU, and compared with runs on the processor byte for byte. One test wants a real GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.measuring import evaluate_release
from qwench.models.place import Place
from qwench.recipe import parse_recipe
from qwench.result import FILE_NAME, read_result
from qwench.run import run_recipe
from tests.support.pictures import write_records
from tests.support.pretend import NAME

QUIET = Report("test", "bytes", None)
RECORDS = {FILE_NAME, "provenance.json"}
"""What says on which device a release was made."""

ROWS = "calibration: {samples: 3, length: 40}\n"
ROWS_WITH_IMAGES = "calibration: {{text: {}, samples: 3, length: 100, images: use}}\n"
RECIPES = {
    "smoothed": ("dense", """
acceptance: {documents: 2, length: 24}
steps:
  - smooth: {folds: [norm.post, norm.input, mlp.up, attention.v], grid: 2, clip: true, layers: 3..3}
  - quantize:
      method: gptq
      rules:
        - {roles: [attention.*, mlp.*], scheme: int4, layers: 3..3}
        - {roles: [delta.qkv, delta.z], scheme: nvfp4, layers: 2..2}
        - {roles: [mtp.fc], scheme: int8}
  - correct: {rank: 8}
  - export: {}
"""),
    "images": (
        "dense",
        """
acceptance: off
steps:
  - smooth: {folds: [norm.input], grid: 2, layers: 3..3}
  - quantize: {method: gptq, rules: [{roles: [attention.*], scheme: int4, layers: 3..3}, {roles: [mtp.fc], scheme: int8}]}
  - export: {}
""",
    ),
    "tuned": ("dense", """
acceptance: off
steps:
  - quantize:
      method: autoround
      autoround: {iterations: 2}
      rules: [{roles: [attention.*], scheme: int4, layers: 3..3}, {roles: [mlp.*], scheme: nvfp4, layers: 3..3}]
  - export: {}
"""),
    "experts": ("moe", """
acceptance: off
steps:
  - smooth: {folds: [norm.post, expert.up], grid: 2, layers: 3..3}
  - quantize:
      method: gptq
      activations: {range: mse}
      rules:
        - {roles: [expert.*, shared.*], scheme: {kind: nvfp4, bits: 4, group: 16, activations: nvfp4}, layers: 3..3}
        - {roles: [attention.*], scheme: {kind: fp8, bits: 8, activations: fp8}, layers: 0..3}
  - export: {}
"""),
    "started": ("moe", """
acceptance: off
steps:
  - quantize:
      method: autoround
      autoround: {iterations: 2, start: gptq}
      rules: [{roles: [expert.*], scheme: int4-asym, layers: 3..3}]
  - export: {}
"""),
}  # fmt: skip


def text_of(name: str, steps: str, folder: Path) -> str:
    """A recipe; the one with images reads records in a folder."""
    if name != "images":
        return f"name: {name}\n{ROWS}{steps}"
    return f"name: {name}\n{ROWS_WITH_IMAGES.format(write_records(folder / 'records', images=3, texts=0))}{steps}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    for name, (_, steps) in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text_of(name, steps, folder))
    (folder / "jobs.txt").write_text("\n".join(f"{model} {name}" for name, (model, _) in RECIPES.items()))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.device_runs", str(folder)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_on_a_device_makes_the_same_bytes_and_measures_the_same(name: str, made: Path) -> None:
    processor, device = made / name / "processor", made / name / "device"
    files = sorted(p.relative_to(processor) for p in processor.rglob("*") if p.is_file() and p.name not in RECORDS)
    assert any(p.suffix == ".safetensors" for p in files)
    for file in files:
        assert (processor / file).read_bytes() == (device / file).read_bytes(), file
    there, here = read_result(processor), read_result(device)
    assert (here.run.device, here.run.compute) == (f"{NAME}:0", "float32")
    assert here.acceptance == there.acceptance
    assert here.calibration == there.calibration
    if here.evaluation is None or there.evaluation is None:
        assert name != "smoothed"
        return
    assert here.evaluation.divergence == there.evaluation.divergence
    assert here.evaluation.acceptance_release == there.evaluation.acceptance_release
    spoken = [e.speculation_release for e in (here.evaluation, there.evaluation)]
    assert spoken[0] and spoken[1] and spoken[0].accepted == spoken[1].accepted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recipe_on_a_gpu_is_as_good(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Sums in another order, and with bfloat16 other numbers: what must agree is what the release is worth."""
    model, steps = RECIPES[name]
    recipe, source = parse_recipe(text_of(name, steps, tmp_path), name), str(checkpoint(model))
    place, worth = Place(torch.device("cuda", 0), dtype), []
    run_recipe(recipe, source, tmp_path / "processor", 1, QUIET, accept_any=True)
    result = run_recipe(recipe, source, tmp_path / "gpu", 1, QUIET, accept_any=True, place=place)
    assert result.run.peak_vram and result.run.device == "cuda:0"
    for out in ("processor", "gpu"):
        worth.append(evaluate_release(tmp_path / out, source, None, 4, 64, QUIET, place=place.exact).divergence.mean.mean)
    assert worth[1] < 1.15 * worth[0]
