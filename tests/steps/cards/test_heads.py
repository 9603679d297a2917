"""What a card says of grafts and of the gate, from records that are made up."""

from __future__ import annotations

from typing import Any

from qwench.result import Acceptance, AcceptanceCheck, Distance, GraftFacts
from qwench.steps.cards.card import card_text
from tests.steps.releases import estimate, release

CONFIG: dict[str, Any] = {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}


def graft(**changes: Any) -> GraftFacts:
    values: dict[str, Any] = dict(
        donor="Qwen/Base-9B", revision="77aa", components=["mtp"], tensors=15, bytes=30,
        embedding=Distance(relative_rms=0.0123, rows=4096, of_rows=248320), head=Distance(relative_rms=0.2, rows=352, of_rows=352),
        vocabulary_sha256=("a", "b"), differing_tokens=0,
        acceptance_donor=Acceptance(by_position=[estimate(0.8811, 0.01), estimate(0.7, 0.02)]),
        acceptance_source=Acceptance(by_position=[estimate(0.5333, 0.02), estimate(0.31, 0.03)]),
        notes=["something else differs"],
    )  # fmt: skip
    return GraftFacts(**values | changes)


def text(**changes: Any) -> str:
    return card_text(release(**changes), CONFIG, "T", {})


def test_a_graft_is_told_with_its_distances_and_both_acceptances() -> None:
    card = text(graft=graft())
    assert "The MTP head (15 tensors) of `Qwen/Base-9B@77aa`" in card and "Tokenizers: the same." in card
    assert "embedding has moved from the donor's by 1.23% (relative rms, 4,096 of 248,320 rows)" in card
    assert "lm_head has moved from the donor's by 20% (relative rms, all rows)" in card
    assert "| 1 | 88.1% ± 1.0% | 53.3% ± 2.0% |" in card and "| 2 | 70.0% ± 2.0% | 31.0% ± 3.0% |" in card
    assert "Something else differs." in card


def test_what_is_not_known_of_a_graft_is_not_on_the_card() -> None:
    card = text(graft=graft(embedding=None, head=None, differing_tokens=None, acceptance_donor=None, revision=None))
    assert "has moved" not in card and "Tokenizers: not compared." in card
    assert "| 1 | not measured | 53.3% ± 2.0% |" in card
    assert "### The graft" not in text()


def test_the_gate_is_told_and_so_is_a_release_below_it() -> None:
    check = AcceptanceCheck(
        floor=0.5, source=Acceptance(by_position=[estimate(0.6123, 0.01)]), release=Acceptance(by_position=[estimate(0.2, 0.01)]),
        documents=8, length=256,
    )  # fmt: skip
    card = text(acceptance=check, evaluation=None)
    assert "8 documents of 256 tokens of held-out text: position 1 61.2% ± 1.0% in the source, 20.0% ± 1.0% here" in card
    assert "(the recipe asks for 50% of the source's)" in card and "Its acceptance was not measured" not in card
    assert "finished all the same" in text(acceptance=check.model_copy(update={"overridden": True}))
    silent = text(acceptance=AcceptanceCheck(floor=0.5, not_measured="there is no tokenizer"), evaluation=None)
    assert "did not measure it: there is no tokenizer." in silent and "Its acceptance was not measured." in silent
