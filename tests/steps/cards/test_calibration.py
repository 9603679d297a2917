"""What a card says of experts that too few tokens reached, from real runs of every method."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.recipe import parse_recipe
from qwench.result import read_result
from qwench.run import run_recipe
from qwench.steps.cards.calibration import NAMED, fallbacks, reach_values
from qwench.steps.cards.card import write_card

RECIPE = """
name: t
acceptance: off
calibration: {samples: 1, length: LENGTH}
steps:
STEPS
  - export: {format: compressed-tensors}
"""
INT4 = "rules: [{roles: [expert.*, mtp.expert.*], scheme: int4, layers: 0..1}]"
STEPS = {
    "gptq": f"  - quantize: {{method: gptq, {INT4}}}",
    "autoround": f"  - quantize: {{method: autoround, autoround: {{iterations: 2, start: rounding}}, {INT4}}}",
    "awq": f"  - smooth: {{folds: [expert.up], grid: 3, layers: 0..1}}\n  - quantize: {{{INT4}}}",
    "w4a4": "  - quantize: {activations: {experts: own}, rules: [{roles: [expert.*], scheme: nvfp4-w4a4, layers: 0..1}]}",
}
SAYS = {
    "gptq": ["- GPTQ: ", "sets of weights rounded to nearest instead, with scales of least squared error: `", "tokens were seen, 128 are wanted)"],
    "autoround": ["- AutoRound: layer 0 autoround: they stay as they started: mlp.experts."],
    "awq": ["- AWQ: layer 0 expert.up: no token reached experts [", "]: 1 is kept"],
    "w4a4": ["- Ranges: layer 0 experts inputs: ", "experts that no token reached (", ") have the largest range"],
}  # fmt: skip


@pytest.mark.parametrize("method", list(STEPS))
def test_experts_that_few_tokens_reached_are_named_with_their_fallback(tmp_path: Path, method: str) -> None:
    """Two tokens go to at most eight of twelve experts of a layer; 100 are fewer than GPTQ wants for any."""
    text = RECIPE.replace("LENGTH", "100" if method == "gptq" else "2").replace("STEPS", STEPS[method])
    run_recipe(parse_recipe(text, "t"), str(checkpoint("moe")), tmp_path / "out", 0, Report("t", "bytes", None))
    assert fallbacks(read_result(tmp_path / "out").calibration.reports)  # type: ignore[union-attr]
    card = write_card(tmp_path / "out").read_text(encoding="utf-8")
    section = card.partition("## What calibration reached\n")[2].partition("\n## ")[0]
    assert "Too few tokens, or none:" in section and "every expert were gathered" not in section
    for words in SAYS[method]:
        assert words in section, section


def test_many_sets_are_counted() -> None:
    reports = {f"layer 0 expert {n}": f"rounded to nearest: {n} tokens were seen, 128 are wanted" for n in range(NAMED + 5)}
    (line,) = fallbacks(reports | {"layer 0 mlp": "loss 0.8 of rounding, damping 0.03, 0 dead columns"})
    assert line.startswith(f"GPTQ: {NAMED + 5} sets of weights") and line.endswith("; and 5 more")
    assert f"`layer 0 expert {NAMED - 1}`" in line and f"`layer 0 expert {NAMED}`" not in line


def test_a_card_says_that_experts_were_shown_all_tokens(tmp_path: Path) -> None:
    text = RECIPE.replace("LENGTH", "200, experts: all").replace("STEPS", STEPS["gptq"])
    run_recipe(parse_recipe(text, "t"), str(checkpoint("moe")), tmp_path / "out", 0, Report("t", "bytes", None))
    card = write_card(tmp_path / "out").read_text(encoding="utf-8")
    assert "The statistics of every expert were gathered on all tokens" in card and "Too few tokens" not in card
    assert reach_values(None, {}) is None
