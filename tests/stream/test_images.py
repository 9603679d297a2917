"""Images of records: where their bytes are, how they are cut, and what rows become of them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwench.demo import checkpoint
from qwench.errors import CheckpointError, RecipeError, TextError
from qwench.recipe import parse_recipe
from qwench.stream.calibration import calibration_rows
from qwench.stream.images import ImageProcessor, image_of
from qwench.stream.rows import Rows, load_tokenizer
from tests.support.pictures import SHAPES, picture, png, words, write_records

DEMO = checkpoint("dense")


def rows_of(path: Path, samples: int, length: int = 130) -> Rows:
    return calibration_rows(DEMO, str(path), samples=samples, length=length, packed=False, images="use")


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def chat(*content: object, answer: int = 60) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": words(3, answer)}]}


TEXT = {"type": "text", "text": "What is it?"}


def test_where_an_image_is(tmp_path: Path) -> None:
    data, here = png(0), Path("/here")
    encoded = "data:image/png;base64," + base64.b64encode(data).decode()
    assert (
        image_of({"bytes": data, "path": "a.png"}, here) == data == image_of(encoded, here) == image_of({"url": encoded}, here)
    )
    assert image_of("a b.png", here) == here / "a b.png" == image_of({"bytes": None, "path": "a b.png"}, here)
    assert image_of("/else/a.png", here) == Path("/else/a.png") == image_of("file:///else/a.png", here)
    assert image_of("file:///else/a%20b.png", here) == Path("/else/a b.png")
    for nothing in ("https://example.org/a.png", "", None, 3, {"bytes": None, "path": None}, "data:image/png;base64,?"):
        assert image_of(nothing, here) is None


@pytest.mark.parametrize("shape", [*SHAPES, (40, 700), (1500, 1100)])
def test_an_image_is_cut_as_the_checkpoints_processor_cuts_it(shape: tuple[int, int]) -> None:
    ours, theirs = ImageProcessor(DEMO), Qwen2VLImageProcessorPil.from_pretrained(DEMO, local_files_only=True)
    seen = theirs(images=[picture(1, shape)], return_tensors="pt")
    image = png(1, shape)
    assert ours.grid(image) == tuple(seen["image_grid_thw"][0].tolist())
    assert torch.equal(ours.patches(image), seen["pixel_values"])


def test_an_image_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    upright, lying = picture(2, (192, 320)), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(lying, "PNG", exif=exif)
    processor, held = ImageProcessor(DEMO), BytesIO()
    upright.save(held, "PNG")
    assert processor.grid(lying.getvalue()) == processor.grid(held.getvalue())
    assert torch.equal(processor.patches(lying.getvalue()), processor.patches(held.getvalue()))


def test_a_row_holds_the_tokens_of_its_images_where_the_template_puts_them(tmp_path: Path) -> None:
    rows, tokenizer = rows_of(write_records(tmp_path / "t", images=4, texts=2), 6), load_tokenizer(DEMO)
    assert rows.pictures is not None and len(rows.pictures.places) == 4 and rows.left_out == {}
    processor = rows.pictures.processor
    for number, ids in enumerate(rows.ids):
        own, shown = rows.pictures.of(number), tokenizer.decode(ids)
        assert int((ids == processor.token_id).sum()) == sum(p.grid[1] * p.grid[2] // 4 for p in own)
        for found in own:
            count = found.grid[1] * found.grid[2] // 4
            assert (ids[found.start : found.start + count] == processor.token_id).all()
            assert [int(ids[found.start - 1]), int(ids[found.start + count])] == [processor.framed[0], processor.framed[2]]
            assert shown.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    again = rows_of(tmp_path / "t" / "chats.jsonl", 6)
    assert again.digest == rows.digest != rows.ids_sha256
    (tmp_path / "t" / "pictures" / "2.png").write_bytes(png(6, SHAPES[2]))
    other = rows_of(tmp_path / "t" / "chats.jsonl", 6)
    assert other.ids_sha256 == rows.ids_sha256 and other.digest != rows.digest, "another image of the same size"


def test_images_in_a_column_stand_at_their_marks_or_before_what_the_user_says_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0, (256, 256)))
    answer = {"from": "gpt", "value": words(1, 60)}
    marked = {"conversations": [{"from": "human", "value": "Look:\n<image>\nWhat?"}, answer], "image": "a.png"}
    plain = {"conversations": [{"from": "human", "value": "What?"}, answer], "image": "a.png"}
    text = {"text": "A caption. " + words(2, 60), "image": "a.png"}
    shown = []
    for name, record in (("m", marked), ("p", plain), ("t", text)):
        rows = rows_of(write(tmp_path / f"{name}.jsonl", record), 1)
        assert rows.pictures is not None and len(rows.pictures.places) == 1
        kept = rows.ids[0][rows.ids[0] != rows.pictures.processor.token_id]
        shown.append(load_tokenizer(DEMO).decode(kept))
    assert shown[0].startswith("<|im_start|>user\nLook:\n<|vision_start|><|vision_end|>What?")
    assert shown[1].startswith("<|im_start|>user\n<|vision_start|><|vision_end|>What?")
    assert shown[2].startswith("<|vision_start|><|vision_end|>A caption. name_")


def test_records_that_give_no_row_are_counted_by_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0, (256, 256)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "wide.png").write_bytes(png(0, (8, 4000)))
    image = {"type": "image", "image": "a.png"}
    path = write(
        tmp_path / "t.jsonl",
        chat(image, TEXT), chat(image, TEXT), chat(TEXT, {"type": "image", "image": "broken.png"}),
        chat({"type": "image", "image": "gone.png"}, TEXT), chat({"type": "image", "image": "wide.png"}, TEXT),
        chat({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, TEXT),
        chat({"type": "video", "video": "a.mp4"}, TEXT), chat(image, image, TEXT, answer=90), chat(image, TEXT, answer=1),
        chat(image, {"type": "text", "text": "<|image_pad|>"}),
        {"messages": [{"role": "user", "content": "<image> <image>"}, {"role": "assistant", "content": words(1, 60)}], "image": "a.png"},
    )  # fmt: skip
    with pytest.raises(TextError) as found:
        rows_of(path, 3, 100)
    for reason in (
        "2 documents of at least 100 tokens", "3 with images that cannot be read", "1 with images that are not on this machine",
        "1 with video or sound", "1 with images that the end of a row would cut", "1 too short", "1 with text that names image tokens",
        "1 refused conversations", "1 images for 2 places",
    ):  # fmt: skip
        assert reason in found.value.what
    assert "pack" not in found.value.mend


def test_an_image_behind_the_end_of_a_row_is_cut_off_with_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0, (256, 256)))
    image = {"type": "image", "image": "a.png"}
    rows = rows_of(write(tmp_path / "t.jsonl", chat({"type": "text", "text": words(4, 60)}, image)), 1, 70)
    assert rows.pictures is None and rows.ids.shape == (1, 70)


def test_parquet_holds_the_bytes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [
        {"images": [{"bytes": png(n), "path": None}], "messages": chat({"type": "image"}, TEXT)["messages"]} for n in (0, 1)
    ]
    for record in records:  # one type in a column: both messages hold parts
        record["messages"][1]["content"] = [{"type": "text", "text": record["messages"][1]["content"]}]  # type: ignore[index]
        record["messages"][0]["content"][0]["text"] = None  # type: ignore[index]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "t.parquet")
    rows = rows_of(tmp_path / "t.parquet", 2)
    assert rows.pictures is not None and {p.image for p in rows.pictures.places} == {png(0), png(1)}


def test_a_processor_that_does_not_go_with_the_tower_is_refused(tmp_path: Path) -> None:
    folder = tmp_path
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(DEMO / name, folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"patch_size": 14}))
    with pytest.raises(CheckpointError, match=r"patch_size is 14 .* is 16"):
        ImageProcessor(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no preprocessor_config\.json"):
        ImageProcessor(folder)
    whole = json.loads((folder / "config.json").read_text())
    del whole["vision_config"]
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="no vision tower"):
        ImageProcessor(folder)


def test_rows_with_images_are_not_packed() -> None:
    recipe = "name: t\ncalibration: {{text: a.jsonl, images: use{}}}\nsteps:\n  - quantize: {{method: gptq, rules: [{{roles: [mlp.*], scheme: int4}}]}}\n  - export: {{}}\n"
    calibration = parse_recipe(recipe.format(""), "t").calibration
    assert calibration is not None and not calibration.packed
    with pytest.raises(RecipeError, match="rows with images are not packed"):
        parse_recipe(recipe.format(", packed: true"), "t")


def test_text_alone_imports_no_image_processor(tmp_path: Path) -> None:
    some, none = write_records(tmp_path / "some", images=1, texts=2), write_records(tmp_path / "none", images=0, texts=2)
    code = f"""
import sys
from pathlib import Path
from qwench.stream.calibration import calibration_rows
cases = ({str(some)!r}, "skip", True, 1), ({str(some)!r}, "text", False, 3), ({str(none)!r}, "use", False, 2), ({str(some)!r}, "use", False, 3)
for path, images, packed, count in cases:
    rows = calibration_rows(Path({str(DEMO)!r}), path, samples=count, length=100, packed=packed, images=images)
    print(any("image_processing" in name for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["False", "False", "False", "True"]
