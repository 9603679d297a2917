"""GPTQModel, really run where `make engines` has been: it reads every module of a mixed release at its own bits, experts too, and adds an adapter's corrections."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.engines import ENGINES, Request
from qwench.formats.release import Release, open_source
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from qwench.steps.checks.verify import verify
from tests.engines.adapters import effect, write_adapter
from tests.engines.mixed_integers import EXACT, ROWS, agrees, agrees_on_release_5, make, misses_a_renamed_scale
from tests.support.oracle import write_runnable


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(checkpoint("dense"), tmp_path_factory.mktemp("gptqmodel") / "dense", "gptq", "mlp.*", "mlp.*")


@pytest.mark.engine("gptqmodel")
def test_every_module_at_its_own_bits(dense: Path) -> None:
    found = agrees(dense, "gptqmodel")
    assert found.consumed == 283 and len(found.unconsumed) == 15
    assert any("15 tensors are not read by this engine: Qwen3_5QModel leaves them out" in note for note in found.notes)
    # 2 x q k v o; 6 x (qkv z out) and 7 x (gate up down): a, b, the tower, the head and the kept MLP are none of them
    assert "GPTQModel built quantized modules: 39 INT4 in groups of 128, 8 INT8 in groups of 64" in found.notes
    assert found.image is not None and "changes what it says" in found.image


@pytest.mark.engine("gptqmodel")
def test_experts_agree(tmp_path: Path) -> None:
    found = agrees(make(checkpoint("moe"), tmp_path / "moe", "gptq", "expert.*, shared.*"), "gptqmodel")
    # 4 x 12 experts and 4 shared ones in three matrices, 3 mixers of three; routers and gates are kept
    assert "GPTQModel built quantized modules: 165 INT4 in groups of 128, 4 INT8 in groups of 64" in found.notes


@pytest.mark.engine("gptqmodel")
def test_a_text_only_checkpoint_with_experts_one_by_one(tmp_path: Path) -> None:
    agrees_on_release_5(tmp_path, "gptqmodel")


ORDERED = """
name: t
calibration: {samples: 4, length: 40}
steps:
  - quantize:
      method: gptq
      gptq: {order: dynamic}
      rules:
        - {roles: [attention.*], scheme: {kind: int, bits: 8, group: 32}}
        - {roles: [delta.qkv, delta.z, delta.out, mlp.*], scheme: {kind: int, bits: 4, group: 32}}
  - export: {format: gptq}
"""


@pytest.mark.engine("gptqmodel")
def test_the_order_of_columns_is_read(tmp_path: Path) -> None:
    """desc_act: groups of columns by what they see, which vLLM refuses; GPTQModel is told by `g_idx`."""
    model = write_runnable(tmp_path / "m")
    run_recipe(parse_recipe(ORDERED, "t"), str(model), tmp_path / "out", 1, Report("t", "bytes", None), accept_any=True)
    source = open_source(tmp_path / "out")
    assert isinstance(source, Release)
    read = [source.quantized(name) for name in source.stored]
    assert sum(weight is not None and weight.group_of_column is not None for weight in read) > len(read) // 2
    agrees(tmp_path / "out", "gptqmodel", ROWS)


@pytest.mark.engine("gptqmodel")
def test_corrections_are_added(dense: Path, tmp_path: Path) -> None:
    """With the adapter on both sides the numbers are the same; without it they would be far from it."""
    adapter = write_adapter(dense, tmp_path / "adapter")
    found = verify(dense, "gptqmodel", ROWS, threads=1, adapter=adapter)
    assert found.outcome == "agrees", found.notes
    assert found.mean_kl is not None and abs(found.mean_kl) < EXACT
    assert "corrections of 47 modules were added on both sides" in found.notes
    assert effect(dense, adapter, ROWS) > 0.05


@pytest.mark.engine("gptqmodel")
def test_an_adapter_that_corrects_too_little_is_refused(dense: Path, tmp_path: Path) -> None:
    adapter = write_adapter(dense, tmp_path / "adapter", wanted=lambda module: not module.endswith("layers.3.self_attn.k_proj"))
    answer = ENGINES["gptqmodel"](Request(dense, ROWS, generate=1, image=False, adapter=adapter))
    assert answer.refused is not None and "lora_A" in answer.refused


@pytest.mark.engine("gptqmodel")
def test_a_scale_under_another_name_is_found(dense: Path, tmp_path: Path) -> None:
    misses_a_renamed_scale(dense, tmp_path, "gptqmodel")


@pytest.mark.engine("gptqmodel")
def test_its_logs_go_with_it(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQModel writes `logs/gptq_log_*.log` into the folder that it runs in."""
    monkeypatch.chdir(tmp_path)
    assert ENGINES["gptqmodel"](Request(dense, ROWS, generate=1, image=False)).refused is None
    assert not list(tmp_path.iterdir())


@pytest.mark.engine("gptqmodel")
def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    answer = ENGINES["gptqmodel"](Request(checkpoint("dense"), ROWS, generate=1, image=False))
    assert answer.refused is not None and answer.logprobs == []
