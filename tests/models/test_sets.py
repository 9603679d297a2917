"""What belongs together in a layer: what engines fuse, what reads one input, where scales may move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwench.models import map_of
from qwench.models.map import Block, Fold
from qwench.models.run import Trunk
from tests.support.memory import MemorySource, tiny_source


def members(sets: dict[str, Any]) -> dict[str, list[tuple[str, int | None]]]:
    return {name: [(s.role, s.expert) for s in slots] for name, slots in sets.items()}


def test_fused_sets_of_a_dense_model() -> None:
    map = map_of(tiny_source())
    assert members(map.blocks[0].fused) == {
        "in_proj_qkvz": [("delta.qkv", None), ("delta.z", None)],
        "in_proj_ba": [("delta.b", None), ("delta.a", None)],
        "gate_up_proj": [("mlp.gate", None), ("mlp.up", None)],
    }
    assert members(map.mtp[0].fused) == {
        "qkv_proj": [("mtp.attention.q", None), ("mtp.attention.k", None), ("mtp.attention.v", None)],
        "gate_up_proj": [("mtp.mlp.gate", None), ("mtp.mlp.up", None)],
    }


@pytest.mark.parametrize("experts", ["fused", "single"])
def test_fused_sets_of_a_moe(experts: Any) -> None:
    fused = members(map_of(tiny_source(moe=True, trunk_experts=experts)).blocks[3].fused)
    assert list(fused) == [
        "qkv_proj",
        "shared_expert.gate_up_proj",
        *(f"experts.{e}.gate_up_proj" for e in range(6)),
        "experts",
    ]
    assert fused["experts.4.gate_up_proj"] == [("expert.gate", 4), ("expert.up", 4)]
    assert sorted(fused["experts"], key=str) == sorted(
        ((f"expert.{p}", e) for p in ("gate", "up", "down") for e in range(6)), key=str
    )


@pytest.mark.parametrize("moe", [False, True])
def test_every_linear_reads_exactly_one_input(moe: bool) -> None:
    map = map_of(tiny_source(moe=moe))
    for block in (*map.blocks, *map.mtp):
        readers = [s.module for slots in block.inputs.values() for s in slots]
        assert sorted(readers) == sorted(s.module for s in block.slots if s.linear)
        for slots in block.inputs.values():
            assert len({s.shape[1] for s in slots}) == 1


def scaled(source: MemorySource, block: Block, fold: Fold) -> MemorySource:
    """The checkpoint with one fold applied: source divided, readers' columns multiplied."""
    values = {n: t.float() for n, t in source.values.items()}

    def weight(tensor: str, part: Any) -> Tensor:
        return values[tensor][part]

    for origin in (s for s in block.slots if s.role == fold.source):
        w = weight(origin.tensor, origin.part)
        scale = torch.rand(w.shape[0], generator=torch.Generator().manual_seed(1)) + 0.5
        w.copy_((1 + w) / scale - 1 if fold.zero_centred else w / (scale if w.dim() == 1 else scale[:, None]))
        for reader in block.slots:
            if reader.role in fold.readers and (origin.expert is None or reader.expert == origin.expert):
                r = weight(reader.tensor, reader.part)
                times = r.shape[1] // len(scale)
                r.copy_(r * (scale if fold.head is None else scale.view(-1, fold.head).repeat_interleave(times, 0).flatten()))
    return MemorySource(source.config, values)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_folds_leave_the_function_as_it_is(moe: bool, layer: int) -> None:
    source = tiny_source(moe=moe)
    map = map_of(source)
    block = map.blocks[layer]
    hidden = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(7))
    before = Trunk(source, map).run_block(layer, hidden)
    assert len(block.folds) == (4 if moe else 3) + (layer == 3)
    for fold in block.folds:
        changed = scaled(source, block, fold)
        touched = [n for n in source.values if not torch.equal(changed.values[n], source.values[n].float())]
        assert len(touched) > 1
        assert torch.allclose(Trunk(changed, map).run_block(layer, hidden), before, atol=1e-4), fold


@torch.no_grad()
def test_a_fold_that_forgets_the_one_is_noticed() -> None:
    source = tiny_source()
    map = map_of(source)
    hidden = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(7))
    fold = map.blocks[0].folds[1]
    wrong = scaled(source, map.blocks[0], replace(fold, zero_centred=False))
    assert fold.zero_centred
    assert not torch.allclose(Trunk(wrong, map).run_block(0, hidden), Trunk(source, map).run_block(0, hidden), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("moe", [False, True])
def test_values_that_are_scaled_head_by_head_in_the_wrong_order_are_noticed(moe: bool) -> None:
    source = tiny_source(moe=moe)
    map = map_of(source)
    hidden = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(7))
    (fold,) = (f for f in map.blocks[3].folds if f.source == "attention.v")
    heads = map.blocks[3].slot("attention.v").shape[0]
    assert fold.head == (96 if moe else 64) < heads
    wrong = scaled(source, map.blocks[3], replace(fold, head=heads))
    assert not torch.allclose(Trunk(wrong, map).run_block(3, hidden), Trunk(source, map).run_block(3, hidden), atol=1e-2)
