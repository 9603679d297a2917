"""Recipes calibrated on rows with images, from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import CheckpointError
from qwench.recipe import Recipe, parse_recipe
from qwench.run import run_recipe
from tests.support.pictures import png, write_records
from tests.support.tiny import write_tiny

QUIET = Report("test", "bytes", None)
RULES = {
    "gptq": "  - quantize: {method: gptq, rules: [{roles: [attention.*, mlp.*, delta.qkv, delta.z], scheme: int4, layers: 2..3}, {roles: [mtp.fc], scheme: int8}]}\n",
    "awq": "  - smooth: {folds: [norm.input, norm.post], grid: 3, layers: 3..3}\n  - quantize: {rules: [{roles: [attention.*, mlp.*], scheme: int4, layers: 3..3}]}\n",
    "autoround": "  - quantize: {method: autoround, autoround: {iterations: 2}, rules: [{roles: [attention.*], scheme: int4, layers: 3..3}]}\n",
}


def recipe_of(method: str, path: Path, images: str = "use") -> Recipe:
    packed = "" if images == "use" else ", packed: false"
    calibration = f"calibration: {{text: {path}, samples: 5, length: 120, images: {images}{packed}}}\n"
    return parse_recipe(f"name: t\nacceptance: off\n{calibration}steps:\n{RULES[method]}  - export: {{}}\n", "t")


@pytest.mark.parametrize("method", RULES)
def test_every_method_reads_rows_with_images(method: str, tmp_path: Path) -> None:
    path, source = write_records(tmp_path / "records", images=4, texts=2), str(checkpoint("dense"))
    result = run_recipe(recipe_of(method, path), source, tmp_path / "use", 1, QUIET)
    facts = result.calibration
    assert facts is not None and facts.rows == 5 and 3 <= facts.images <= 4 and facts.left_out == {} and not facts.lost_rows
    assert facts.images_sha256 is not None and result.errors
    text = run_recipe(recipe_of(method, path, "text"), source, tmp_path / "text", 1, QUIET).calibration
    assert text is not None and text.images == 0 and text.left_out == {"taken without images": facts.images}
    assert text.ids_sha256 != facts.ids_sha256 and text.reports != facts.reports


def test_images_in_parquet_give_the_bytes_of_images_in_files(tmp_path: Path) -> None:
    """The same records, images in a column of bytes; and the release that comes of them."""
    datasets = pytest.importorskip("datasets")
    path, source = write_records(tmp_path / "records", images=5, texts=0), str(checkpoint("dense"))
    records = []
    for number, line in enumerate(path.read_text().splitlines()):
        messages = json.loads(line)["messages"]
        asked = "<image>" + messages[0]["content"][1]["text"]
        records.append(
            {"images": [{"bytes": png(number), "path": None}], "messages": [messages[0] | {"content": asked}, messages[1]]}
        )
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "t.parquet")
    made = [
        run_recipe(recipe_of("gptq", text), source, tmp_path / name, 1, QUIET)
        for name, text in (("files", path), ("bytes", tmp_path / "t.parquet"))
    ]
    one, other = (result.calibration for result in made)
    assert (
        one is not None and other is not None and (one.ids_sha256, one.images_sha256) == (other.ids_sha256, other.images_sha256)
    )
    for file in sorted((tmp_path / "files").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "bytes" / file.name).read_bytes()


def test_a_checkpoint_without_a_tower_is_refused_before_any_work(tmp_path: Path) -> None:
    from tests.support.oracle import borrow_sidecars

    path = write_records(tmp_path / "records")
    folder = borrow_sidecars(write_tiny(tmp_path / "m", layout="causal"))
    with pytest.raises(CheckpointError, match=r"describes no vision tower, and calibration\.images is `use`"):
        run_recipe(recipe_of("gptq", path), str(folder), tmp_path / "out", 1, QUIET)
    assert not (tmp_path / "out").exists()
