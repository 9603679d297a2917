"""Images in rows: the tower against that of transformers, and positions against its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.grid import Grid, row_positions, tokens_of
from qwench.models.tower import Tower
from tests.support.tiny import write_tiny

GRIDS: list[Grid] = [(1, 14, 22), (1, 6, 4), (1, 2, 10)]


def patches_of(grids: list[Grid]) -> torch.Tensor:
    count = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(count, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_tower_and_its_positions_are_those_of_transformers(moe: bool, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", moe=moe)
    source = Checkpoint.open(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tower, patches = Tower(source, map_of(source)), patches_of(GRIDS)
    with torch.no_grad():
        wanted = model.model.get_image_features(patches, torch.tensor(GRIDS)).pooler_output
    for ours, theirs, grid in zip(tower.embed(patches, GRIDS), wanted, GRIDS, strict=True):
        assert len(ours) == tokens_of(grid, tower.merge)
        assert torch.allclose(ours, theirs, atol=1e-5)
    starts, length = [3, 100, 106], 124  # the second and the third touch
    ids = torch.full((1, length), 9)
    for start, grid in zip(starts, GRIDS, strict=True):
        ids[0, start : start + tokens_of(grid, 2)] = model.config.image_token_id
    kinds = (ids == model.config.image_token_id).int()
    kinds[0, 106:111] = 0  # transformers takes images that touch for one
    expected, _ = model.model.get_rope_index(ids[:, :106], kinds[:, :106], torch.tensor(GRIDS[:2]))
    assert torch.equal(row_positions(106, list(zip(starts, GRIDS, strict=True))[:2], 2), expected[:, 0])


def test_a_row_ends_with_an_image_or_begins_with_one() -> None:
    assert row_positions(4, [(0, (1, 4, 2))], 2).tolist() == [[0, 0, 2, 3], [0, 1, 2, 3], [0, 0, 2, 3]]
    assert row_positions(4, [(2, (1, 2, 4))], 2).tolist() == [[0, 1, 2, 2], [0, 1, 2, 2], [0, 1, 2, 3]]
    assert row_positions(3, [], 2).tolist() == [[0, 1, 2]] * 3


def test_blocks_hold_their_weights_only_while_they_run(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "m"))
    tower, held = Tower(source, map_of(source)), list[int]()
    for block in tower.module.get_submodule("blocks").children():
        block.register_forward_hook(
            lambda *_: held.append(sum(p.numel() for p in tower.module.get_submodule("blocks").parameters() if not p.is_meta))
        )
    tower.embed(patches_of(GRIDS[1:2]), GRIDS[1:2])
    one = sum(p.numel() for p in tower.module.get_submodule("blocks.0").parameters())
    assert len(held) == 2 and max(held) <= one
    assert all(p.is_meta for p in tower.module.parameters())


def test_a_checkpoint_without_a_tower_is_told(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny(tmp_path / "m", layout="causal"))
    with pytest.raises(CheckpointError, match="no vision tower"):
        Tower(source, map_of(source))
    assert map_of(Checkpoint.open(checkpoint("dense"))).has_vision
