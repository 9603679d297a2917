"""Importance files: what is written is read back, also by eyes other than ours; wrong ones are refused; what the quantizer gets."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qwench.errors import CheckpointError
from qwench.formats.gguf import GgufPlan, plan_gguf
from qwench.formats.gguf_importance import Entry, Importance, importance_of, in_file_order, read_importance, write_importance
from qwench.formats.gguf_tensors import GgufTensor
from qwench.formats.gguf_transforms import TileHeads
from qwench.models import map_of, sketch
from tests.support.tiny import tiny_config

ENTRIES = {
    "blk.0.ffn_down_exps.weight": Entry(torch.arange(6 * 256.0).reshape(6, 256), torch.tensor([4.0, 0, 1, 2, 3, 5])),
    "blk.4.attn_q.weight": Entry(torch.arange(128.0)[None], torch.tensor([64.0])),
}


def plan(file_type: str = "Q8_0") -> GgufPlan:
    source = sketch(tiny_config(moe=True))
    return plan_gguf(source, map_of(source), file_type=file_type)


def tensor(plan: GgufPlan, name: str) -> GgufTensor:
    return next(t.tensor for t in plan.tensors if t.tensor.name == name)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = Importance(ENTRIES, ("held", "calibration"), length=128, rows=9)
    write_importance(tmp_path / "i.gguf", written)
    found = read_importance(tmp_path / "i.gguf")
    assert (found.texts, found.length, found.rows) == (("held", "calibration"), 128, 9)
    assert found.entries.keys() == ENTRIES.keys()
    for name, entry in ENTRIES.items():
        assert torch.equal(found.entries[name].squares, entry.squares) and torch.equal(found.entries[name].counts, entry.counts)
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


def test_the_file_has_llama_cpps_layout(tmp_path: Path) -> None:
    """As `IMatrixCollector::save_imatrix` in tools/imatrix/imatrix.cpp writes it."""
    write_importance(tmp_path / "i.gguf", Importance(ENTRIES, ("held",), length=128, rows=9))
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {f.name: (f.types[-1].name, f.contents()) for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    assert fields == {
        "general.type": ("STRING", "imatrix"), "imatrix.datasets": ("STRING", ["held"]),
        "imatrix.chunk_count": ("UINT32", 9), "imatrix.chunk_size": ("UINT32", 128),
    }  # fmt: skip
    shapes = {t.name: (t.tensor_type.name, [int(n) for n in t.shape]) for t in reader.tensors}
    assert shapes == {
        "blk.0.ffn_down_exps.weight.in_sum2": ("F32", [256, 6]), "blk.0.ffn_down_exps.weight.counts": ("F32", [1, 6]),
        "blk.4.attn_q.weight.in_sum2": ("F32", [128, 1]), "blk.4.attn_q.weight.counts": ("F32", [1, 1]),
    }  # fmt: skip


def test_importance_is_a_mean_and_unreached_experts_have_none() -> None:
    experts = tensor(plan(), "blk.0.ffn_down_exps.weight")
    importance = Importance(ENTRIES)
    expected = torch.arange(256.0) / 4
    found = importance.of(experts, 0)
    assert found is not None and torch.equal(found, expected)
    assert importance.of(experts, 1) is None
    assert importance.of(tensor(plan(), "blk.1.attn_qkv.weight"), 0) is None


def test_what_is_lacking_is_said() -> None:
    notes = Importance(ENTRIES).check(plan())
    assert any("no importance for" in n for n in notes)
    assert any(n == "blk.0.ffn_down_exps.weight: 1 experts that no token reached, quantized without importance" for n in notes)


def test_another_models_importance_is_refused() -> None:
    wider = Importance({"blk.4.attn_q.weight": Entry(torch.ones(1, 256), torch.ones(1))})
    with pytest.raises(
        CheckpointError, match=r"\[1, 256\] experts and channels for blk.4.attn_q.weight, the model has \[1, 128\]"
    ):
        wider.check(plan())
    with pytest.raises(CheckpointError, match="names no tensor of this model"):
        Importance({"blk.99.attn_q.weight": Entry(torch.ones(1, 128), torch.ones(1))}).check(plan())
    with pytest.raises(CheckpointError, match="not finite"):
        Importance({"blk.4.attn_q.weight": Entry(torch.full((1, 128), float("nan")), torch.ones(1))}).check(plan())


def test_columns_follow_the_weights() -> None:
    out = tensor(plan(), "blk.0.ssm_out.weight")
    tiling = out.transforms[0]
    assert isinstance(tiling, TileHeads)
    squares = torch.arange(896.0)[None]
    assert torch.equal(in_file_order(out, squares), squares[:, tiling.order()])
    assert torch.equal(in_file_order(tensor(plan(), "blk.0.attn_qkv.weight"), squares), squares)


def test_observations_become_entries() -> None:
    layer = "model.language_model.layers.0."
    observed = {f"{layer}mlp.experts.{e}.down_proj": (torch.full((256,), e + 1.0), 10 + e) for e in (0, 2, 5)}
    observed[f"{layer}linear_attn.out_proj"] = (torch.arange(896.0), 7)
    observed["mtp.layers.0.self_attn.q_proj"] = (torch.arange(128.0), 3)
    observed[f"{layer}mlp.gate"] = (torch.arange(128.0), 7)  # the router is not quantized
    found = importance_of(plan(), observed, texts=["a"], rows=2)
    assert found.entries.keys() == {"blk.0.ffn_down_exps.weight", "blk.0.ssm_out.weight", "blk.4.attn_q.weight"}
    experts = found.entries["blk.0.ffn_down_exps.weight"]
    assert experts.counts.tolist() == [10, 0, 12, 0, 0, 15] and experts.squares[:, 9].tolist() == [1, 0, 3, 0, 0, 6]
    out = tensor(plan(), "blk.0.ssm_out.weight")
    assert torch.equal(found.entries["blk.0.ssm_out.weight"].squares, in_file_order(out, torch.arange(896.0)[None]))
    assert not torch.equal(found.entries["blk.0.ssm_out.weight"].squares[0], torch.arange(896.0))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    with pytest.raises(CheckpointError, match=r"is no importance matrix"):
        read_importance(path)
    path.write_bytes(b"no gguf at all, but long enough to look at")
    with pytest.raises(CheckpointError, match=r"is no importance matrix"):
        read_importance(path)
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_string("general.type", "model")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="GGUF file of type 'model'"):
        read_importance(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_importance(path, Importance(ENTRIES))
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(CheckpointError, match=r"is no importance matrix"):
        read_importance(path)
