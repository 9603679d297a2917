"""The acceptance gate, on a trained head: a dead one is not published, and what was measured outlives the refusal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.staging import staging_of
from qwench.checkpoint.writer import CheckpointWriter
from qwench.demo import checkpoint
from qwench.errors import VerificationError
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.recipe import AcceptanceGate, Recipe, parse_recipe
from qwench.result import Acceptance, AcceptanceCheck, Estimate, Result, read_result
from qwench.run import run_recipe
from qwench.steps.heads import gate
from qwench.steps.heads import watch as heads
from qwench.steps.heads.gate import acceptance_of, check_gate, fell, gate_rows, measure_acceptance
from qwench.steps.measures.evaluate import evaluate
from qwench.stream import walk
from qwench.stream.rows import Rows, held_out_rows
from tests.support.finetunes import demo_config, demo_tensors, write_beside, write_finetune
from tests.support.tiny import write_tiny
from tests.test_run import QUIET

GATE = AcceptanceGate(documents=3, length=48)
FEW = "acceptance: {documents: 3, length: 48}\n"
QUANTIZE = "  - quantize: {rules: [{roles: [mlp.*], scheme: int4}]}\n"


def recipe(steps: str = QUANTIZE, acceptance: str = FEW, export: str = "{}") -> Recipe:
    return parse_recipe(f"name: t\n{acceptance}steps:\n{steps}  - export: {export}\n", "t")


def make(out: Path, recipe: Recipe, model: Path | None = None, **options: object) -> Result:
    return run_recipe(recipe, str(model or checkpoint("dense")), out, 1, QUIET, **options)  # type: ignore[arg-type]


def found(first: float, *others: float) -> Acceptance:
    return Acceptance(by_position=[Estimate(mean=mean, standard_error=0.01) for mean in (first, *others)])


@pytest.fixture(scope="module")
def rows() -> Rows:
    return held_out_rows(checkpoint("dense"), GATE.documents, GATE.length)


@pytest.fixture
def ruined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that loses mtp.fc: zeros go to the disk in its place."""
    put = CheckpointWriter.put

    def losing(self: CheckpointWriter, name: str, chunks: Iterable[memoryview]) -> None:
        put(self, name, (memoryview(bytes(len(c))) for c in chunks) if name == "mtp.fc.weight" else chunks)

    monkeypatch.setattr(CheckpointWriter, "put", losing)


def test_a_dead_head_is_not_published_and_can_be_finished_by_saying_so(
    ruined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VerificationError) as caught:
        make(tmp_path / "out", recipe())
    said = str(caught.value)
    assert re.search(
        r"at draft position 1 the release accepts [0-4]\.\d% of the MTP head's drafts, the source [3-9]\d\.\d%", said
    )
    assert "on the same 3 rows of 48 tokens" in said and "asks for 50% of that" in said and "--accept-any" in said
    assert not (tmp_path / "out").exists()
    assert (staging_of(tmp_path / "out") / "files" / "model.safetensors").is_file()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(heads, "acceptance_of", never)
    result = make(tmp_path / "out", recipe(), accept_any=True)
    assert result.run.resumed_tensors == len(Checkpoint.open(tmp_path / "out").tensors)
    check = read_result(tmp_path / "out").acceptance
    assert check is not None and check.overridden
    assert gate.first_position(check.release) < 0.05 < 0.3 < gate.first_position(check.source)
    assert float(load_file(tmp_path / "out" / "model.safetensors")["mtp.fc.weight"].abs().max()) == 0


def test_a_refused_release_goes_on_with_another_floor(ruined: None, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        make(tmp_path / "out", recipe())
    result = make(tmp_path / "out", recipe(acceptance="acceptance: {documents: 3, length: 48, floor: 0}\n"))
    assert result.run.resumed_tensors > 0
    assert result.acceptance is not None and not result.acceptance.overridden


def test_a_sound_release_passes_and_the_numbers_are_those_of_an_evaluation(tmp_path: Path, rows: Rows) -> None:
    """The gate reads unfinished files; `eval` reads the finished folder: the same bytes, the same numbers."""
    result = make(tmp_path / "out", recipe())
    check = result.acceptance
    assert check is not None and not check.overridden and not check.not_measured
    assert (check.documents, check.length, check.ids_sha256, check.floor) == (3, 48, rows.ids_sha256, 0.5)
    measured = evaluate(tmp_path / "out", checkpoint("dense"), rows)
    for mine, theirs in ((check.source, measured.acceptance_source), (check.release, measured.acceptance_release)):
        assert mine is not None and theirs is not None
        assert [e.mean for e in mine.by_position] == pytest.approx([e.mean for e in theirs.by_position])
    assert check.source != check.release
    assert read_result(tmp_path / "out") == result


def test_a_walk_is_not_walked_again_after_a_refusal(ruined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "  - quantize: {method: gptq, rules: [{roles: [mlp.*], scheme: int4, layers: 1..2}]}\n"
    walked = recipe(steps, FEW + "calibration: {samples: 4, length: 32}\n")
    with pytest.raises(VerificationError):
        make(tmp_path / "out", walked)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("walked again")

    monkeypatch.setattr(walk, "LiveBlock", never)
    assert make(tmp_path / "out", walked, accept_any=True).acceptance is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [("acceptance: off\n", "off"), (FEW, "unchanged")],
)
def test_nothing_is_measured_where_nobody_asks_or_nothing_changed(text: str, why: str, tmp_path: Path) -> None:
    made = recipe(QUANTIZE if why == "off" else "", text, "{layout: text}")
    assert make(tmp_path / "out", made).acceptance is None


def test_without_a_tokenizer_the_record_says_that_nothing_was_measured(tmp_path: Path) -> None:
    result = make(tmp_path / "out", recipe(), write_tiny(tmp_path / "tiny"))
    assert result.acceptance is not None
    assert "holds no tokenizer" in result.acceptance.not_measured
    assert result.acceptance.source is None and result.acceptance.release is None


def test_a_dropped_head_is_no_dead_head(tmp_path: Path) -> None:
    assert make(tmp_path / "out", recipe(export="{drop: [mtp]}")).acceptance is None


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).write_bytes((checkpoint("dense") / name).read_bytes())
    reason = gate_rows(GATE, tiny, map_of(Checkpoint.open(tiny)))
    assert isinstance(reason, str) and "the embedding has 352 rows" in reason


def test_a_release_without_its_head_is_under_any_floor_but_nothing(rows: Rows) -> None:
    check = AcceptanceCheck(floor=0.01, source=found(0.6, 0.4))
    assert fell(check)
    assert not fell(check.model_copy(update={"floor": 0.0}))
    assert acceptance_of(Checkpoint.open(checkpoint("dense")), rows) is not None


@pytest.mark.parametrize(("release", "refused"), [(0.299, True), (0.3, False), (0.7, False)])
def test_the_floor_is_a_share_of_position_1_of_the_source(release: float, refused: bool) -> None:
    check = AcceptanceCheck(floor=0.5, source=found(0.6, 0.4), release=found(release, 0.0), documents=3, length=48)
    if not refused:
        assert check_gate(check) == check
        return
    with pytest.raises(VerificationError, match=r"the release accepts 29\.9% .*, the source 60\.0%.* 50% of that, 30\.0%"):
        check_gate(check)
    assert check_gate(check, accept_any=True).overridden


def test_source_and_release_are_measured_by_hand_too(tmp_path: Path, rows: Rows) -> None:
    tensors = demo_tensors() | {"mtp.fc.weight": torch.zeros(256, 512, dtype=torch.bfloat16)}
    dead = Checkpoint.open(write_beside(tmp_path / "dead", demo_config(), tensors))
    sound = Checkpoint.open(checkpoint("dense"))
    seen: list[tuple[int, int, str]] = []
    check = measure_acceptance(sound, dead, rows, 0.5, lambda *at: seen.append(at))
    assert fell(check) and len(seen) == 16 and seen[-1] == (8, 8, "acceptance")
    assert check.source is not None
    assert measure_acceptance(check.source, dead, rows, 0.5) == check


def test_a_graft_is_measured_on_both_trunks(tmp_path: Path, rows: Rows) -> None:
    tuned = write_finetune(tmp_path / "tuned")
    result = make(tmp_path / "out", recipe("  - graft: {}\n" + QUANTIZE), tuned, donor="demo:dense")
    facts, check = result.graft, result.acceptance
    assert facts is not None and check is not None
    assert (facts.donor, facts.tensors, facts.differing_tokens) == ("demo:dense", 15, 0)
    assert facts.embedding is not None and facts.embedding.relative_rms == pytest.approx(0.02, rel=0.02)
    assert facts.acceptance_donor == acceptance_of(Checkpoint.open(checkpoint("dense")), rows)
    assert facts.acceptance_source == check.source != facts.acceptance_donor
    assert gate.first_position(facts.acceptance_source) > 0.9 * gate.first_position(facts.acceptance_donor)
    stored, donor = Checkpoint.open(tmp_path / "out"), Checkpoint.open(checkpoint("dense"))
    assert torch.equal(stored.read("mtp.fc.weight"), donor.read("mtp.fc.weight"))
    assert result.source.tensors == len(Checkpoint.open(tuned).tensors), "the source is the checkpoint before the graft"


def reordered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network with its channels in another order."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    writes = ("layernorm.weight", "language_model.norm.weight", "o_proj.weight", "out_proj.weight", "down_proj.weight")

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "visual" in name or (tensor.dim() != 2 and not name.endswith(writes)):
            return tensor
        return (tensor[order] if name.endswith(writes) else tensor[:, order]).contiguous()

    return {name: moved(name, tensor) for name, tensor in tensors.items()}


def test_a_head_that_does_not_fit_its_new_trunk_stops_the_run_before_the_work(tmp_path: Path, rows: Rows) -> None:
    """A trunk whose channels are in another order: every shape fits, and the head reads noise."""
    strange = write_beside(
        tmp_path / "strange", demo_config(), reordered({n: t for n, t in demo_tensors().items() if not n.startswith("mtp.")})
    )
    logits = [Trunk(source, map_of(source)) for source in (Checkpoint.open(strange), Checkpoint.open(checkpoint("dense")))]
    ours, theirs = (trunk.logits(trunk.forward(rows.ids)) for trunk in logits)
    assert torch.allclose(ours, theirs, atol=1e-3), "the trunk itself is as good as it was"
    with pytest.raises(VerificationError, match="the trunk that it was grafted on accepts") as caught:
        make(tmp_path / "out", recipe("  - graft: {}\n" + QUANTIZE), strange, donor="demo:dense")
    assert "its own trunk, the donor's, " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_only_the_head_of_the_donor_is_at_hand_the_record_says_so(tmp_path: Path) -> None:
    part = tmp_path / "part"
    heads_only = {name: tensor for name, tensor in demo_tensors().items() if name.startswith("mtp.")}
    write_beside(part, demo_config(), heads_only)
    result = make(tmp_path / "out", recipe("  - graft: {}\n"), write_finetune(tmp_path / "tuned"), donor=str(part))
    assert result.graft is not None
    assert result.graft.acceptance_donor is None and result.graft.acceptance_source is not None
    assert any("only the grafted part of the donor was at hand" in note for note in result.graft.notes)
    assert any("embedding was not at hand" in note for note in result.graft.notes)
