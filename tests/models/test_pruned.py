"""The view of a checkpoint without some of its experts, in every layout that experts are stored in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import Part
from qwench.models import map_of
from qwench.models.pruned import Pruned, config_with_experts
from tests.support.files import bits, same_bits
from tests.support.tiny import Experts, Head, Layout, write_tiny

KEPT = {"layer 0": (1, 2, 4), "layer 1": (0, 1, 2), "layer 2": (3, 4, 5), "layer 3": (0, 2, 5), "mtp layer 0": (1, 3, 4)}
LAYOUTS = [("conditional", "fused", "published"), ("causal", "single", "fused"), ("causal", "fused", "single")]


@pytest.fixture(params=LAYOUTS, ids=["-".join(layout) for layout in LAYOUTS])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    layout: Layout
    trunk: Experts
    head: Head
    layout, trunk, head = request.param
    return Checkpoint.open(
        write_tiny(tmp_path / "m", moe=True, layout=layout, trunk_experts=trunk, mtp=head, vision=layout == "conditional")
    )


def settled(model: Checkpoint) -> Pruned:
    target = Pruned(model, map_of(model), 3)
    for layer, kept in KEPT.items():
        target.settle(layer, kept)
    return target


def test_it_is_a_whole_checkpoint_of_the_smaller_shape(model: Checkpoint) -> None:
    target = Pruned(model, map_of(model), 3)
    map = map_of(target)
    assert (target.before, target.count) == (6, 3)
    for block in (*map.blocks, *map.mtp):
        assert {slot.expert for slot in block.slots} == {None, 0, 1, 2}
        assert block.slot(("mtp." if block.component == "mtp" else "") + "router").shape == (3, 128)
    assert not any(".experts.3." in name for name in target.tensors)
    assert target.stamp() == model.stamp()


def test_every_weight_is_that_of_the_expert_it_was(model: Checkpoint) -> None:
    target, old, seen = settled(model), {slot.module: slot for slot in map_of(model).slots()}, 0
    for block in (*(map := map_of(target)).blocks, *map.mtp):
        for slot in block.slots:
            if slot.expert is None:
                continue
            was = KEPT[block.label][slot.expert]
            source = old[slot.module.replace(f"experts.{slot.expert}.", f"experts.{was}.")]
            assert same_bits(target.read(slot.tensor, slot.part), model.read(source.tensor, source.part)), slot.module
            seen += 1
        router = block.slot(("mtp." if block.component == "mtp" else "") + "router")
        assert same_bits(target.read(router.tensor), model.read(router.tensor)[list(KEPT[block.label])])
    assert seen == 5 * 3 * 3


def test_all_else_is_as_it_was(model: Checkpoint) -> None:
    target = settled(model)
    same = [name for name in model.tensors if ".experts." not in name and not name.endswith("mlp.gate.weight")]
    assert len(same) > 50
    for name in same:
        assert target.tensors[name] == model.tensors[name]
        assert b"".join(map(bytes, target.chunks(name))) == bits(model.read(name))


@pytest.mark.parametrize(
    "part", [(), (1,), (-1,), (slice(1, 3),), (2, slice(0, 40)), (slice(0, 2), slice(7, 9)), (slice(None),)], ids=str
)
def test_parts_and_bytes_of_stacked_experts(tmp_path: Path, part: Part) -> None:
    model = Checkpoint.open(write_tiny(tmp_path / "m", moe=True))
    target, name = settled(model), "model.language_model.layers.2.mlp.experts.down_proj"
    expected: Tensor = model.read(name)[[3, 4, 5]][part] if part else model.read(name)[[3, 4, 5]]
    assert same_bits(target.read(name, part), expected)
    assert b"".join(map(bytes, target.chunks(name, part))) == bits(expected)


def test_what_is_left_of_each_tensor(model: Checkpoint) -> None:
    target = Pruned(model, map_of(model), 3)
    for name in target.tensors:
        assert target.share(name) == (0.5 if ".experts." in name or name.endswith("mlp.gate.weight") else 1), name


def test_the_config_says_so_wherever_it_speaks_of_experts(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = config_with_experts(config, 3)
    assert changed["text_config"]["num_experts"] == 3 and "num_experts" not in changed
    assert changed["text_config"]["num_experts_per_tok"] == 2
    assert config["text_config"]["num_experts"] == 6, "the source's own is left alone"
    assert config_with_experts({"num_experts": 9, "hidden_size": 5}, 4) == {"num_experts": 4, "hidden_size": 5}


def test_nobody_reads_experts_before_they_are_chosen(tmp_path: Path) -> None:
    model = Checkpoint.open(write_tiny(tmp_path / "m", moe=True))
    target = Pruned(model, map_of(model), 3)
    with pytest.raises(AssertionError, match="nobody said which experts of mtp layer 0 stay"):
        target.read("mtp.layers.0.mlp.experts.0.up_proj.weight")
    assert torch.equal(target.read("mtp.fc.weight"), model.read("mtp.fc.weight"))
