"""The MTP head on checkpoints whose right drafts are known by construction: all are accepted, and none where a piece is out of its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.evaluation.acceptance import accepted
from qwench.models import map_of
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from tests.support.oracle import cycle_row, write_oracle
from tests.support.releases import rewrite


def acceptance(folder: Path) -> list[float]:
    """Share of drafts accepted at positions 1 to 3, along the cycle."""
    source = Checkpoint.open(folder)
    trunk, head = Trunk(source, map_of(source)), MtpHead(source, map_of(source))
    ids = torch.tensor([cycle_row(41)])
    hidden = trunk.forward(ids)
    chosen = trunk.greedy(hidden[0])[None]
    assert torch.equal(chosen[:, :-1], ids[:, 1:]), "the trunk walks along the cycle"
    drafts = [trunk.greedy(step[0])[None] for step in head.drafts(hidden, trunk.embed(ids), 3)]
    return [float(share) for share in accepted(chosen, drafts).double().mean((0, 1))]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_every_draft_of_a_right_head_is_accepted(moe: bool, tmp_path: Path) -> None:
    assert acceptance(write_oracle(tmp_path / "m", moe)) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_no_draft_of_swapped_halves_is(moe: bool, tmp_path: Path) -> None:
    assert max(acceptance(write_oracle(tmp_path / "m", moe, swap_halves=True))) < 0.1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"),
        ("mtp.norm", "model.language_model.norm"),
        ("mtp.norm", "mtp.pre_fc_norm_hidden"),
    ],
)
def test_nor_with_two_norms_exchanged(one: str, other: str, tmp_path: Path) -> None:
    """The oracle sees norms in each other's place: what a reader that mixes them up would make of it."""
    folder = write_oracle(tmp_path / "m")
    rewrite(folder, {f"{one}.weight": "kept"})
    rewrite(folder, {f"{other}.weight": f"{one}.weight"})
    rewrite(folder, {"kept": f"{other}.weight"})
    source = Checkpoint.open(folder)
    trunk, head = Trunk(source, map_of(source)), MtpHead(source, map_of(source))
    ids = torch.tensor([cycle_row(41)])
    draft = trunk.greedy(head.drafts(trunk.forward(ids), trunk.embed(ids), 1)[0][0])
    assert (draft == ids[0, 1:] + 1).double().mean() < 0.1


def test_a_norm_without_its_one_is_seen(tmp_path: Path) -> None:
    """Weights moved by one stand for a reader that applies w where 1 + w is meant."""
    from safetensors.torch import load_file, save_file

    folder = write_oracle(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.pre_fc_norm_hidden.weight"] = tensors["mtp.pre_fc_norm_hidden.weight"] - 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert acceptance(folder)[0] < 0.5
