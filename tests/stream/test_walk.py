"""The walk: it runs what transformers runs, shows what modules read, and goes on where it stood."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.modules import Modules
from qwench.models.run import Trunk
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.observe import observe
from qwench.stream.walk import Rows, Walk, walk
from tests.support.tiny import write_tiny

ROWS, LENGTH = 5, 17


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("walk") / "model", moe=request.param)


def ids_of(source: Checkpoint) -> Tensor:
    vocabulary = map_of(source).other("embed").shape[0]
    return torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


class Halve:
    """Makes the mixer's output projection half as large in layers 1 and up."""

    name = "halve"

    def __init__(self, needs_original: bool = False) -> None:
        self.needs_original = needs_original
        self.seen: list[tuple[int, Tensor, Tensor | None]] = []

    def __call__(self, live: LiveBlock, rows: Rows) -> None:
        original = rows.original.read(0, ROWS) if rows.original else None
        self.seen.append((live.block.index, torch.cat([batch.hidden for batch in rows.batches()]), original))
        role = "attention.o" if live.block.kind == "full_attention" else "delta.out"
        if live.block.index >= 1:
            live.alter(live.block.slot(role), live.weight(live.block.slot(role)) / 2)


def hidden_files(folder: Path, source: Checkpoint) -> HiddenFiles:
    return HiddenFiles(folder, (ROWS, LENGTH, map_of(source).other("embed").shape[1]), torch.float32)


def nothing(*_: object) -> None:
    """Neither emits nor tells."""


def test_a_walk_without_changes_is_the_models_own_forward(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    map, ids, files = map_of(source), ids_of(source), hidden_files(tmp_path, source)
    walk(Walk([]), source, map, ids, files, nothing, nothing)
    trunk = Trunk(source, map)
    expected = trunk.forward(ids)
    got = trunk.norm(files.before("changed", len(map.blocks)).read(0, ROWS))
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_the_next_layer_sees_the_changed_one_and_both_streams_are_kept_apart(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    map, ids = map_of(source), ids_of(source)
    change = Halve(needs_original=True)
    walk(Walk([change]), source, map, ids, hidden_files(tmp_path, source), nothing, nothing)
    assert [index for index, _, _ in change.seen] == list(range(len(map.blocks)))
    trunk, hidden = Trunk(source, map), Trunk(source, map).embed(ids)
    for index, changed, original in change.seen:
        assert original is not None
        assert torch.allclose(original, hidden, atol=2e-4, rtol=1e-4)
        assert torch.equal(changed, original) == (index < 2), "layers before the first changed output agree, later ones do not"
        hidden = trunk.run_block(index, hidden)


def test_onward_original_ignores_changes(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    map, ids, change = map_of(source), ids_of(source), Halve()
    walk(Walk([change], onward="original"), source, map, ids, hidden_files(tmp_path, source), nothing, nothing)
    trunk, hidden = Trunk(source, map), Trunk(source, map).embed(ids)
    for index, seen, _ in change.seen:
        assert torch.allclose(seen, hidden, atol=2e-4, rtol=1e-4)
        hidden = trunk.run_block(index, hidden)


def test_a_stopped_walk_goes_on_and_ends_the_same(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    map, ids = map_of(source), ids_of(source)
    whole, parts = hidden_files(tmp_path / "whole", source), hidden_files(tmp_path / "parts", source)
    walk(Walk([Halve(True)]), source, map, ids, whole, nothing, nothing)

    class Stop(Exception):
        pass

    emitted: list[int] = []

    def stop_at_two(live: LiveBlock) -> None:
        if live.block.index == 2:
            raise Stop
        emitted.append(live.block.index)

    with pytest.raises(Stop):
        walk(Walk([Halve(True)]), source, map, ids, parts, stop_at_two, nothing)
    assert parts.latest(("changed", "original")) == 2
    walk(Walk([Halve(True)]), source, map, ids, parts, lambda live: emitted.append(live.block.index), nothing)
    assert emitted == list(range(len(map.blocks)))
    for stream in ("changed", "original"):
        last = len(map.blocks)
        assert whole.before(stream, last).path.read_bytes() == parts.before(stream, last).path.read_bytes()


def test_second_moments_are_those_of_what_the_modules_read(model: Path) -> None:
    """Against hooks on every linear module of transformers' own layer, in one batch."""
    source = Checkpoint.open(model)
    map, ids = map_of(source), ids_of(source)
    hidden = Trunk(source, map).embed(ids)
    for index in (0, 3):
        live = LiveBlock(source, map, Modules(source.config, map), index)
        names = [name for name, slots in live.block.inputs.items() if slots[0].expert is None]
        moments = observe(live, hidden.split(2), names)  # type: ignore[no-untyped-call]
        for name in names:
            read: list[Tensor] = []
            module = live.submodule(live.block.inputs[name][-1])
            handle = module.register_forward_pre_hook(lambda _m, inputs, read=read: read.append(inputs[0].flatten(0, -2)))
            live.run(hidden)
            handle.remove()
            assert moments[name].count == ROWS * LENGTH
            expected = read[0].double().T @ read[0].double()
            assert torch.allclose(moments[name].second.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))  # type: ignore[union-attr]
            assert torch.allclose(moments[name].magnitude, read[0].abs().sum(0), rtol=1e-3)


def test_each_expert_is_seen_with_its_own_tokens(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "model", moe=True))
    map, ids = map_of(source), ids_of(source)
    live = LiveBlock(source, map, Modules(source.config, map), 0)
    hidden = Trunk(source, map).embed(ids)
    names = [name for name in live.block.inputs if name.startswith("experts.")]
    moments = observe(live, [hidden], names)
    experts = {int(name.split(".")[1]) for name in names}
    top_k = source.config["text_config"]["num_experts_per_tok"]
    assert sum(moments[f"experts.{e}"].count for e in experts) == ROWS * LENGTH * top_k
    assert all(moments[f"experts.{e}"].count == moments[f"experts.{e}.down"].count for e in experts)
    taken: dict[str, Tensor] = {}
    experts_module = live.submodule(live.block.slot("expert.gate", 0))
    handle = experts_module.register_forward_pre_hook(lambda _m, inputs: taken.update(hidden=inputs[0], chosen=inputs[1]))
    live.run(hidden)
    handle.remove()
    for e in experts:
        tokens = torch.stack([h for h, c in zip(taken["hidden"], taken["chosen"], strict=True) if e in c.tolist()])
        gate, up = live.weight(live.block.slot("expert.gate", e)), live.weight(live.block.slot("expert.up", e))
        inner = torch.nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)
        assert torch.allclose(moments[f"experts.{e}"].second, tokens.T @ tokens, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]
        assert torch.allclose(moments[f"experts.{e}.down"].second, inner.T @ inner, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


def test_rows_that_overflow_are_left_out_openly_and_too_many_stop_the_walk(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model)
    map, ids = map_of(source), ids_of(source)
    files = hidden_files(tmp_path, source)
    hidden = Trunk(source, map).embed(ids)
    hidden[2, 4, 1] = float("inf")

    def batches() -> Iterator[Tensor]:
        yield hidden

    files.put("changed", 0, batches())
    with pytest.raises(CheckpointError, match="row 2 in layer 0"):
        walk(Walk([]), source, map, ids, files, nothing, nothing)
