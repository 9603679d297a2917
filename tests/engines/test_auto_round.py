"""auto-round, really run where `make engines` has been: transformers opens our auto-round releases with its layers, dense and experts, at their own bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.engines import ENGINES, Request
from tests.engines.mixed_integers import ROWS, agrees, agrees_on_release_5, make, misses_a_renamed_scale


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(checkpoint("dense"), tmp_path_factory.mktemp("auto-round") / "dense", "auto-round", "mlp.*", "mlp.*")


@pytest.mark.engine("auto-round")
def test_every_module_at_its_own_bits(dense: Path) -> None:
    found = agrees(dense, "auto-round")
    assert found.consumed == 236 and len(found.unconsumed) == 15
    assert any("15 tensors are not read by this engine" in note for note in found.notes)
    kinds = "39 INT4 in groups of 128 (qlinear_torch_zp), 8 INT8 in groups of 64 (qlinear_torch_zp)"
    assert f"auto-round built quantized modules: {kinds}" in found.notes
    assert found.image is not None and "changes what it says" in found.image


@pytest.mark.engine("auto-round")
def test_experts_agree(tmp_path: Path) -> None:
    """Those of layer 1 are kept: stored one by one, for fused ones would stay random beside quantized layers."""
    found = agrees(
        make(checkpoint("moe"), tmp_path / "moe", "auto-round", "expert.*, shared.*", "shared.*, expert.*"), "auto-round"
    )
    assert any("126 INT4 in groups of 128" in note and "4 INT8 in groups of 64" in note for note in found.notes)


@pytest.mark.engine("auto-round")
def test_a_text_only_checkpoint_with_experts_one_by_one(tmp_path: Path) -> None:
    agrees_on_release_5(tmp_path, "auto-round", kept="shared.*")


@pytest.mark.engine("auto-round")
def test_a_scale_under_another_name_is_found(dense: Path, tmp_path: Path) -> None:
    misses_a_renamed_scale(dense, tmp_path, "auto-round")


@pytest.mark.engine("auto-round")
def test_an_adapter_is_refused(dense: Path, tmp_path: Path) -> None:
    answer = ENGINES["auto-round"](Request(dense, ROWS, image=False, adapter=tmp_path))
    assert answer.refused is not None and "no way to add an adapter" in answer.refused and answer.logprobs == []
