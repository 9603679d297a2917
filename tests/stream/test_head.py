"""The MTP head as a walk's last layer: it computes what the head computes, fc among its modules, and goes on where it stood."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.modules import lend
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.models.weights import read_slot
from qwench.stream.head import LiveHead
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.observe import observe
from qwench.stream.walk import Rows, Walk, walk
from tests.support.tiny import write_tiny

ROWS, LENGTH = 5, 17


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("head") / "model", moe=request.param))


def ids_of(source: Checkpoint) -> Tensor:
    return torch.randint(map_of(source).other("embed").shape[0], (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def hidden_files(folder: Path, source: Checkpoint) -> HiddenFiles:
    map = map_of(source)
    return HiddenFiles(folder, (ROWS, LENGTH, map.other("embed").shape[1]), torch.float32, len(map.blocks))


def normed_drafts(source: Checkpoint, hidden: Tensor) -> Tensor:
    """What the head's own norm makes of hidden states behind its layer."""
    trunk = Trunk(source, map_of(source))
    weight = read_slot(source, trunk.map.other("mtp.norm.final"), torch.float32)
    return lend(trunk.modules.norm, {"weight": weight}, hidden)


class Seen:
    """Keeps what it was handed at the head, and changes nothing."""

    name = "seen"
    needs_original = True

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.pairs: Tensor | None = None
        self.targets: Tensor | None = None

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        self.labels.append(live.label)
        if live.block.component == "mtp":
            assert rows.original is not None and rows.targets is not None
            self.pairs, self.targets = torch.cat([batch.hidden for batch in rows.batches()]), rows.targets.read(0, ROWS)
            assert torch.equal(self.pairs, rows.original.read(0, ROWS))


def test_the_head_is_the_last_layer_and_puts_out_what_the_head_drafts_from(source: Checkpoint, tmp_path: Path) -> None:
    map, ids, files, change = map_of(source), ids_of(source), hidden_files(tmp_path, source), Seen()
    emitted: list[str] = []
    walk(Walk([change], mtp=True), source, map, ids, files, lambda live: emitted.append(live.label), lambda *_: None)
    assert change.labels == emitted == [*(f"layer {i}" for i in range(len(map.blocks))), "mtp layer 0"]
    trunk, head = Trunk(source, map), MtpHead(source, map)
    embedded, width = trunk.embed(ids), map.other("embed").shape[1]
    (expected,) = head.drafts(trunk.forward(ids), embedded, 1)
    assert expected.shape == (ROWS, LENGTH - 1, width)
    assert change.pairs is not None and change.targets is not None
    assert change.pairs.shape == (ROWS, LENGTH - 1, 2 * width)
    got = files.before("changed", len(map.blocks) + 1).read(0, ROWS)
    assert torch.allclose(normed_drafts(source, got), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(change.targets, got), "nothing was changed: both streams agree"


def test_every_linear_weight_of_the_head_is_a_view_and_reads_one_input(source: Checkpoint) -> None:
    map = map_of(source)
    live = LiveHead(source, map, Trunk(source, map).modules)
    linears = [s for s in map.slots() if s.role.startswith("mtp.") and s.linear]
    assert {s.module for s in linears} == {s.module for slots in live.block.inputs.values() for s in slots}
    for slot in linears:
        assert torch.equal(live.weight(slot), source.read(slot.tensor, slot.part).float()), slot.module
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(2, 7, live.block.inputs["fc"][0].shape[1], generator=generator)
    before = live.run(pairs)
    for slot in (live.block.slot("mtp.fc"), live.block.slot("mtp.attention.o")):
        live.weight(slot).mul_(0.5)
        after = live.run(pairs)
        assert not torch.allclose(before, after, atol=1e-3), f"{slot.module} is what runs"
        before = after


def test_second_moments_of_the_head_are_those_of_what_its_modules_read(source: Checkpoint) -> None:
    map = map_of(source)
    live = LiveHead(source, map, Trunk(source, map).modules)
    pairs = torch.randn(ROWS, 7, live.block.inputs["fc"][0].shape[1], generator=torch.Generator().manual_seed(2))
    moments = observe(live, torch.split(pairs, 2), ["fc", "attention"])
    flat = pairs.flatten(0, 1)
    assert torch.allclose(moments["fc"].second, flat.T @ flat, rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]
    x = flat @ live.weight(live.block.slot("mtp.fc")).T
    normed = lend(live.modules.norm, {"weight": live.weights["input_layernorm.weight"]}, x)
    expected = normed.T @ normed
    assert torch.allclose(moments["attention"].second, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))  # type: ignore[arg-type]


class Halve:
    """Makes fc and the layer's output projection half as large, and every mixer's of the trunk."""

    name = "halve"
    needs_original = True

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        roles = {"mtp.fc", "mtp.attention.o", "attention.o", "delta.out"}
        for slot in (s for s in live.block.slots if s.role in roles):
            live.alter(slot, live.weight(slot) / 2)


def test_a_walk_that_stops_in_the_head_goes_on_there_and_ends_the_same(source: Checkpoint, tmp_path: Path) -> None:
    map, ids = map_of(source), ids_of(source)
    whole, parts = hidden_files(tmp_path / "whole", source), hidden_files(tmp_path / "parts", source)
    walk(Walk([Halve()], mtp=True), source, map, ids, whole, lambda live: None, lambda *_: None)

    class Stop(Exception):
        pass

    def stop_at_head(live: LiveBlock) -> None:
        if live.block.component == "mtp":
            raise Stop

    with pytest.raises(Stop):
        walk(Walk([Halve()], mtp=True), source, map, ids, parts, stop_at_head, lambda *_: None)
    depth = len(map.blocks)
    assert parts.latest(("changed", "original")) == depth
    emitted: list[str] = []
    for expected in (["mtp layer 0"], []):
        emitted.clear()
        walk(Walk([Halve()], mtp=True), source, map, ids, parts, lambda live: emitted.append(live.label), lambda *_: None)
        assert emitted == expected, "a finished walk has nothing left to do"
    for stream in ("changed", "original"):
        a, b = (files.before(stream, depth + 1).path.read_bytes() for files in (whole, parts))
        assert a == b and len(a) == ROWS * (LENGTH - 1) * map.other("embed").shape[1] * 4
    changed, original = (whole.before(stream, depth + 1).read(0, ROWS) for stream in ("changed", "original"))
    assert not torch.allclose(changed, original, atol=1e-2)


def test_a_checkpoint_without_a_head_is_refused_before_any_work(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "model", mtp=None))
    map, files = map_of(source), hidden_files(tmp_path / "walk", source)
    with pytest.raises(CheckpointError, match="no MTP head"):
        walk(Walk([], mtp=True), source, map, ids_of(source), files, lambda live: None, lambda *_: None)
    assert files.latest(("changed",)) is None
