"""Rows with images in a walk: what transformers makes of the whole model, in the trunk, under every kind of change, and in the MTP head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.models.tower import Tower
from qwench.stream.calibration import calibration_rows
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.row_inputs import RowInputs, grouped
from qwench.stream.rows import Rows
from qwench.stream.walk import Rows as LayerRows
from qwench.stream.walk import Walk, walk
from tests.support.oracle import write_runnable
from tests.support.pictures import write_records

ROWS, LENGTH = 5, 120
BIAS = "model.visual.merger.linear_fc2.bias"


def folder_of(model: str, tmp_path: Path) -> Path:
    return (
        checkpoint(model.removeprefix("demo ")) if "demo" in model else write_runnable(tmp_path / "m", moe=model == "tiny moe")
    )


def rows_of(folder: Path, tmp_path: Path) -> Rows:
    path = write_records(tmp_path / "records", images=3, texts=2)
    return calibration_rows(folder, str(path), samples=ROWS, length=LENGTH, packed=False, images="use")


def whole_model(folder: Path, rows: Rows) -> Tensor:
    """Hidden states of transformers after its final norm, images handed over as pixels."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor, found = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True), list[Tensor]()
    for number, ids in enumerate(rows.ids):
        assert rows.pictures is not None
        pictures = [Image.open(p.image) for p in rows.pictures.of(number)]  # type: ignore[arg-type]
        seen = dict(processor(images=pictures, return_tensors="pt")) if pictures else {}
        kinds = (ids[None] == model.config.image_token_id).int()
        with torch.no_grad():
            found.append(model.model(input_ids=ids[None], mm_token_type_ids=kinds, **seen).last_hidden_state[0])
    return torch.stack(found)


class Listening:
    """A change that changes nothing, and looks at what the layer makes of what it reads."""

    name = "listening"

    def __init__(self, needs_original: bool) -> None:
        self.needs_original = needs_original
        self.pairs, self.outputs = Tensor(), list[Tensor]()

    def __call__(self, live: LiveBlock, rows: LayerRows) -> None:
        batches = list(rows.batches())
        if live.block.component == "mtp":
            self.pairs = torch.cat([batch.hidden for batch in batches])
        self.outputs.append(torch.cat([live.run(batch) for batch in batches]))


@pytest.mark.parametrize("model", ["demo dense", "demo moe", "tiny dense", "tiny moe"])
def test_rows_with_images_and_without_are_the_whole_models(model: str, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path)
    source, rows = Checkpoint.open(folder), rows_of(folder, tmp_path)
    assert rows.pictures is not None and 0 < len({p.row for p in rows.pictures.places}) < ROWS, "some with, some without"
    map, change = map_of(source), Listening(needs_original=True)
    depth = len(map.blocks)
    files = HiddenFiles(tmp_path / "walk", (ROWS, LENGTH, map.other("embed").shape[1]), torch.float32, depth)
    walk(Walk([change], mtp=True, batch=2), source, map, rows.ids, files, lambda _: None, lambda *_: None, rows.pictures)
    expected, trunk = whole_model(folder, rows), Trunk(source, map)
    for stream in ("changed", "original"):
        assert torch.allclose(trunk.norm(files.before(stream, depth).read(0, ROWS)), expected, atol=2e-4)
    inputs = RowInputs(trunk, rows.ids, rows.pictures)
    every = torch.arange(ROWS)
    embedded, positions = inputs.embed(every), inputs.positions(every)
    assert positions is not None and not torch.allclose(trunk.forward(rows.ids), expected, atol=1e-2), "images matter"
    assert torch.allclose(trunk.forward(rows.ids, positions, embedded), expected, atol=2e-4)
    head = MtpHead(source, map)
    drafts = head.drafts(expected, embedded, 1, positions)[0]
    behind = files.before("changed", depth + 1).read(0, ROWS)
    own = torch.stack([head._norm("final", row) for row in behind])
    assert torch.allclose(own, drafts, atol=2e-3)
    for number, output in enumerate(change.outputs[:depth]):
        states = files.before("changed", number + 1)
        assert number < depth - 1 or torch.allclose(output, states.read(0, ROWS), atol=1e-4), "a change sees what the walk does"


def test_images_go_through_the_tower_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("dense")
    rows = rows_of(folder, tmp_path)
    assert rows.pictures is not None
    trunk = Trunk(Checkpoint.open(folder), map_of(Checkpoint.open(folder)))
    inputs, every = RowInputs(trunk, rows.ids, rows.pictures), torch.arange(ROWS)
    expected = inputs.embed(every)
    monkeypatch.setattr("qwench.stream.row_inputs.PATCHES", 300)
    assert [len(group) for group in grouped(rows.pictures.places)] == [1, 1, 1]
    monkeypatch.setattr("qwench.stream.row_inputs.PATCHES", 700)
    assert [len(group) for group in grouped(rows.pictures.places)] == [2, 1]
    with monkeypatch.context() as watched:
        runs = list[int]()
        embed = Tower.embed
        watched.setattr(Tower, "embed", lambda tower, patches, grids: runs.append(len(grids)) or embed(tower, patches, grids))
        inputs = RowInputs(trunk, rows.ids, rows.pictures, tmp_path)
        assert torch.equal(inputs.embed(every), expected)
        assert inputs.embed(torch.tensor([4, 1])).equal(expected[[4, 1]])
    assert runs == [2, 1], "the tower runs once over every image, however often rows are embedded"


def test_an_image_that_changes_under_us_and_a_tower_that_overflows_are_told(tmp_path: Path) -> None:
    folder = write_runnable(tmp_path / "m")
    rows = rows_of(folder, tmp_path)
    assert rows.pictures is not None
    source = Checkpoint.open(folder)
    (tmp_path / "records" / "pictures" / "1.png").write_bytes((tmp_path / "records" / "pictures" / "0.png").read_bytes())
    with pytest.raises(CheckpointError, match=r"1\.png has changed"):
        RowInputs(Trunk(source, map_of(source)), rows.ids, rows.pictures).embed(torch.arange(ROWS))
    path = str(tmp_path / "records" / "chats.jsonl")
    rows = calibration_rows(folder, path, samples=ROWS, length=LENGTH, packed=False, images="use")
    file = next(f for f in folder.glob("*.safetensors") if BIAS in load_file(f))
    save_file(load_file(file) | {BIAS: torch.full((128,), float("inf"), dtype=torch.bfloat16)}, file)
    source = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="the vision tower makes NaN or infinity of an image in calibration row"):
        RowInputs(Trunk(source, map_of(source)), rows.ids, rows.pictures).embed(torch.arange(ROWS))
