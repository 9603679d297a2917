"""The second half of a layer alone: the same numbers as the whole layer, and never those of a mixer that has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.models import map_of
from qwench.models.modules import Modules
from qwench.numerics import SCHEMES, encode
from qwench.stream.live import Batch, LiveBlock
from qwench.stream.middle import Middle
from qwench.stream.observe import observe
from tests.support.tiny import write_tiny

ROWS, LENGTH = 5, 11


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("middle") / "model", moe=request.param))


def layer(source: Checkpoint, index: int, folder: Path | None) -> LiveBlock:
    map = map_of(source)
    live = LiveBlock(source, map, Modules(source.config, map), index)
    if folder is not None:
        live.middle = Middle(folder, (ROWS, LENGTH, map.other("embed").shape[1]), torch.float32)
    return live


def hidden(source: Checkpoint) -> Tensor:
    return torch.randn(ROWS, LENGTH, map_of(source).other("embed").shape[1], generator=torch.Generator().manual_seed(3))


def whole_passes(live: LiveBlock) -> list[int]:
    """How often the whole layer runs from now on."""
    calls = [0]
    run_with = live.run_with

    def counting(weights: Mapping[str, Tensor], batch: Batch | Tensor) -> Tensor:
        calls[0] += 1
        return run_with(weights, batch)

    live.run_with = counting  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("index", [0, 3], ids=["delta", "attention"])
def test_the_second_half_gives_the_same_numbers(source: Checkpoint, index: int, tmp_path: Path) -> None:
    live, x = layer(source, index, tmp_path), hidden(source)
    expected, calls = layer(source, index, None).run(x), whole_passes(live)
    picked = torch.tensor([3, 0, 4])
    for _ in range(2):
        assert torch.equal(live.run(Batch(x, rows=torch.arange(ROWS))), expected)
    assert calls == [1], "the second pass began in the middle"
    assert torch.allclose(live.run(Batch(x[:2], rows=torch.arange(2))), live.run(x[:2]), atol=1e-5)
    assert torch.allclose(live.run(Batch(x[picked], rows=picked)), expected[picked], atol=1e-5)


def test_rows_that_did_not_go_through_yet_run_the_whole_layer(source: Checkpoint, tmp_path: Path) -> None:
    live, x = layer(source, 0, tmp_path), hidden(source)
    live.run(Batch(x[:3], rows=torch.arange(3)))
    calls = whole_passes(live)
    live.run(Batch(x[2:4], rows=torch.tensor([2, 3])))
    assert calls == [1]


@pytest.mark.parametrize("role", ["delta.qkv", "delta.out", "norm.input"])
def test_a_changed_mixer_is_run_again(source: Checkpoint, role: str, tmp_path: Path) -> None:
    live, other, x = layer(source, 0, tmp_path), layer(source, 0, None), hidden(source)
    live.run(Batch(x, rows=torch.arange(ROWS)))
    for one in (live, other):
        slot = one.block.slot(role)
        changed = one.weight(slot) * 1.5 + 0.1
        if slot.linear:
            one.store(slot, encode(changed, SCHEMES["int8"].__class__("int", 8, slot.shape[1])))
        else:
            one.alter(slot, changed)
    assert torch.equal(live.run(Batch(x, rows=torch.arange(ROWS))), other.run(x))


def test_a_changed_mlp_is_seen(source: Checkpoint, tmp_path: Path) -> None:
    live, other, x = layer(source, 0, tmp_path), layer(source, 0, None), hidden(source)
    live.run(Batch(x, rows=torch.arange(ROWS)))
    calls = whole_passes(live)
    for one in (live, other):
        slot = next(s for s in one.block.slots if s.role in ("mlp.up", "shared.up"))
        one.alter(slot, one.weight(slot) * 1.5)
    assert torch.equal(live.run(Batch(x, rows=torch.arange(ROWS))), other.run(x))
    assert calls == [0], "the mixer is as it was"


def test_whoever_looks_at_the_mixer_sees_it_run(source: Checkpoint, tmp_path: Path) -> None:
    live, x = layer(source, 0, tmp_path), hidden(source)
    batch = Batch(x, rows=torch.arange(ROWS))
    live.run(batch)
    names = list(live.block.inputs)
    expected = observe(layer(source, 0, None), [x], names)
    for one in names:
        found = observe(live, [batch], [one])[one]
        assert found.count == expected[one].count > 0 or one.startswith("experts.")
        assert found.second is not None and expected[one].second is not None
        assert torch.allclose(found.second, expected[one].second, rtol=1e-5, atol=1e-6), one
