"""The file: what was written is read, what is older is read, what is newer or broken is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwench import __version__
from qwench.errors import CheckpointError
from qwench.result import FILE_NAME, FORMAT, read_result, revise_result, write_result
from qwench.steps.provenance import FILE_NAME as PROVENANCE
from qwench.steps.provenance import FORMAT as PROVENANCE_FORMAT
from qwench.steps.provenance import read_provenance
from tests.steps.releases import evaluation, release


def data(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    return found


def put(folder: Path, content: Any) -> Path:
    (folder / FILE_NAME).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = release()
    write_result(tmp_path, written)
    assert read_result(tmp_path) == written and data(tmp_path)["format"] == FORMAT
    revise_result(tmp_path, lambda result: setattr(result, "evaluation", None))
    assert read_result(tmp_path) == release(evaluation=None)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_record_from_before_the_format_was_said_is_read_and_written_as_ours(tmp_path: Path) -> None:
    """Exactly the fields that the first format had to have, and nothing since."""
    estimate = {"mean": 0.5, "standard_error": 0.01}
    first: dict[str, Any] = {
        "qwench": "0.0.9", "recipe": {"name": "int4"}, "files": [{"name": "model.safetensors", "bytes": 7}], "precision": [], "errors": [],
        "source": {"name": "a/b", "model_type": "qwen3_5", "layout": "text only", "parameters": 3, "tensors": 2, "bytes": 11},
        "run": {"seconds": 1.5, "peak_rss": 13, "threads": 1},
        "evaluation": {
            "text": "t", "text_sha256": "aa", "documents": 2, "compute_dtype": "float32", "corrections": 4,
            "divergence": {"mean": estimate, "p99": 1.0, "p999": 2.0, "max": 3.0},
            "perplexity_source": estimate, "perplexity_release": estimate, "top1_agreement": estimate, "hidden_error_by_layer": [0.1],
        },
    }  # fmt: skip
    found = read_result(put(tmp_path, first))
    assert found.qwench == "0.0.9" and found.format == FORMAT and found.run.device == "cpu"
    assert (
        found.evaluation is not None
        and found.evaluation.without_corrections is None
        and found.evaluation.divergence_by_layer is None
    )
    revise_result(tmp_path, lambda result: None)
    assert data(tmp_path)["format"] == FORMAT and read_result(tmp_path) == found
    assert read_result(put(tmp_path, first | {"format": 1})) == found


def test_a_newer_record_is_refused_and_named(tmp_path: Path) -> None:
    write_result(tmp_path, release())
    put(tmp_path, data(tmp_path) | {"format": FORMAT + 1, "a field of then": 1})
    with pytest.raises(
        CheckpointError, match=f"of format {FORMAT + 1}; Qwench {__version__} reads formats up to {FORMAT}"
    ) as caught:
        read_result(tmp_path)
    assert "install a newer Qwench" in caught.value.mend


def test_a_newer_provenance_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_text(json.dumps({"format": PROVENANCE_FORMAT + 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"of format {PROVENANCE_FORMAT + 1}; Qwench") as caught:
        read_provenance(tmp_path)
    assert "install a newer Qwench" in caught.value.mend


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no mapping"),
        ('{"format": "two"}', "is of format 'two'"),
        ('{"format": 0}', "is of format 0"),
        ('{"format": 1, "files": 3}', "recipe: field required"),
        ('{"files": 3, "odd": 1}', "and 4 more"),
    ],
)
def test_what_is_no_record_is_told_by_its_place(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        read_result(tmp_path)


def test_no_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no result\.json"):
        read_result(tmp_path)
    revise_result(tmp_path, lambda result: pytest.fail("there is nothing to change"))


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        evaluation(invented=1)
