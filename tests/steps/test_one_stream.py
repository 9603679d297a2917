"""How often the rows go through a layer: once where nothing reads what the changed layers put out, and the release is the same as if they had gone twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from qwench.steps import calibrate
from qwench.stream.live import Batch, LiveBlock
from tests.steps.materials.test_prune import INT4, ROWS, plan_of, released
from tests.support.tiny import write_tiny

GPTQ = "  - quantize: {method: gptq, rules: [{roles: [shared.down], scheme: int4}]}\n"
W4A4 = "  - quantize: {rules: [{roles: [shared.down], scheme: nvfp4-w4a4}]}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("stream") / "m", moe=True)


def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that went through each layer, by its label."""
    seen, real = Counter[str](), LiveBlock.run

    def run(self: LiveBlock, batch: Batch | Tensor) -> Tensor:
        seen[self.label] += batch.shape[0]
        return real(self, batch)

    monkeypatch.setattr(LiveBlock, "run", run)
    return seen


@pytest.mark.parametrize(
    ("prune", "others", "times"),
    [("{ratio: 0.5}", "", 1), ("{ratio: 0.5}", INT4, 1), ("{ratio: 0.5, repair: least-squares}", "", 3), ("{ratio: 0.5}", GPTQ, 3), ("{ratio: 0.5}", W4A4, 3)],
    ids=["prune", "rounded", "repaired", "gptq", "w4a4"],
)  # fmt: skip
def test_rows_go_through_a_layer_as_often_as_somebody_looks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prune: str, others: str, times: int
) -> None:
    seen = passes(monkeypatch)
    released(plan_of(model, prune, others), tmp_path / "out")
    assert seen["layer 1"] == times * ROWS, seen


@pytest.mark.parametrize("others", ["", INT4], ids=["prune", "rounded"])
def test_one_stream_gives_the_bytes_of_two(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str) -> None:
    one = released(plan_of(model, others=others), tmp_path / "one")
    monkeypatch.setattr(calibrate, "onward_of", lambda recipe: "changed")
    seen = passes(monkeypatch)
    assert released(plan_of(model, others=others), tmp_path / "two") == one
    assert seen["layer 1"] == 2 * ROWS
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
