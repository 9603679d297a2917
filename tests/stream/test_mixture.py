"""Moments in bounded memory: the same as those of a plain observation, experts one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.stream import mixture
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.mixture import in_mixture, mixture_of, moments_of
from qwench.stream.observe import observe
from qwench.stream.walk import Rows
from tests.support.tiny import write_tiny

ROWS, LENGTH = 5, 17


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("mixture") / "model", moe=True))


@pytest.fixture
def live(source: Checkpoint) -> LiveBlock:
    return LiveBlock(source, map_of(source), Trunk(source, map_of(source)).modules, 0)


@pytest.fixture
def hidden(source: Checkpoint) -> Tensor:
    ids = torch.randint(map_of(source).other("embed").shape[0], (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return Trunk(source, map_of(source)).embed(ids)


def rows_of(folder: Path, hidden: Tensor) -> Rows:
    files = HiddenFiles(folder, (ROWS, LENGTH, hidden.shape[-1]), torch.float32)
    files.put("changed", 0, iter(torch.split(hidden, 2)))
    return Rows(files.before("changed", 0), None, None, 2, torch.tensor([True, True, False, True, True]), folder)


def test_moments_of_a_mixture_are_those_of_a_plain_observation(
    live: LiveBlock, hidden: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "TOKENS", 7)
    names = [name for name in live.block.inputs if in_mixture(live.block, name)]
    assert {"mlp", "shared.down", "experts.0", "experts.5.down"} <= set(names) and "delta" not in names
    expected = observe(live, [hidden[:2], hidden[2:]], names)
    with mixture_of(live, [hidden[:2], hidden[2:]], tmp_path, torch.float32) as found:
        assert not any(tmp_path.iterdir()), "the file has no name"
        for name in names:
            moment = found.moment(name)
            assert moment.count == expected[name].count
            scale = float(expected[name].second.abs().max())  # type: ignore[union-attr]
            assert torch.allclose(moment.second, expected[name].second, rtol=1e-4, atol=1e-5 * scale)  # type: ignore[arg-type]
            assert torch.allclose(moment.magnitude, expected[name].magnitude, rtol=1e-4, atol=1e-4)
        top_k = found.chosen.shape[1]
        assert sum(len(found.tokens_of(e)) for e in range(6)) == ROWS * LENGTH * top_k
        assert torch.allclose(found.shares.sum(-1), torch.ones(ROWS * LENGTH), atol=1e-5)


def test_sets_come_in_groups_within_the_limit_and_see_what_was_changed_before(
    live: LiveBlock, hidden: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path, hidden)
    groups: list[int] = []

    def counting(*arguments: object) -> object:
        groups.append(len(arguments[2]))  # type: ignore[arg-type]
        return observe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mixture, "observe", counting)
    names = ["delta", "delta.out", "mlp", "experts.1", "experts.1.down"]
    width = live.block.inputs["delta"][0].shape[1]
    up = live.block.slot("expert.up", 1)
    seen = {}
    for name, moment in moments_of(live, rows, names, limit=4 * width * width):
        seen[name] = moment
        if name == "experts.1":
            live.weight(up).zero_()
    assert groups == [1, 1] and list(seen) == names
    assert seen["mlp"].count == 4 * LENGTH, "the row that is out is not counted"
    assert seen["experts.1.down"].count == seen["experts.1"].count > 0
    assert not seen["experts.1.down"].magnitude.any(), "the down projection reads what the changed expert makes"
    plain = observe(live, list(rows.batches()), ["delta", "mlp"])
    for name in plain:
        scale = float(plain[name].second.abs().max())  # type: ignore[union-attr]
        assert torch.allclose(seen[name].second, plain[name].second, rtol=0.02, atol=0.01 * scale)  # type: ignore[arg-type]
