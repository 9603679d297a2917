"""What a card says of experts that went."""

from __future__ import annotations

from pathlib import Path

from qwench.result import PrunedLayer, PruningFacts
from qwench.steps.cards.card import card_text
from qwench.steps.cards.plots import draw_plots
from qwench.steps.cards.pruning import NAMED, pruning_figure, pruning_values
from tests.steps.releases import release


def layer(number: int, component: str = "text", work: float = 0.7) -> PrunedLayer:
    return PrunedLayer(
        component=component, layer=number, kept=[0, 2, 3], tokens=[50, 3, 70, 61, 44], saliency=[2.5, 0.1, 1.5, 3.0, 0.4],
        saliency_kept=0.91, contribution_kept=work,
    )  # fmt: skip


def facts(**changes: object) -> PruningFacts:
    layers = [layer(0), layer(1, work=0.6125), layer(2), layer(0, "mtp", work=0.9)]
    values: dict[str, object] = dict(criterion="reap", before=5, after=3, top_k=2, layers=layers, warnings=["layer 1: few"])
    return PruningFacts.model_validate(values | changes)


def test_the_section_has_the_numbers_of_the_record() -> None:
    text = card_text(release(pruning=facts()), {}, "T", {"experts.png": "Experts"})
    section = text.partition("## Experts that went")[2].partition("\n## ")[0]
    assert "2 of the 5 routed experts of each of the 3 decoder layers, and of the MTP head's layer," in section
    assert "3 stay" in section and "goes to 2 of them" in section and "REAP" in section
    assert "91.0% of the saliency and made 72.8% of what experts add" in section
    assert "least: layer 1, 61.3%" in section or "least: layer 1, 61.2%" in section
    assert "- layer 1: few" in section
    assert "![Experts](card/experts.png)" in section


def test_a_release_with_all_its_experts_has_no_such_section() -> None:
    assert "Experts that went" not in card_text(release(), {}, "T", {})
    assert pruning_values(None) is None


def test_without_a_head_nothing_is_said_of_it() -> None:
    text = card_text(release(pruning=facts(layers=[layer(0), layer(1)])), {}, "T", {})
    section = text.partition("## Experts that went")[2].partition("\n## ")[0]
    assert "MTP" not in section and "each of the 2 decoder layers are left out" in section


def test_a_repair_is_told_with_what_it_gained() -> None:
    layers = [layer(0), layer(1)]
    for one, error in zip(layers, (0.25, 0.5), strict=True):
        one.error, one.error_repaired, one.repaired = 0.5, error, 3
    text = card_text(release(pruning=facts(layers=layers)), {}, "T", {})
    assert "Then 6 down projections" in text and "went from 0.5 to 0.375" in text
    assert "down projections" not in card_text(release(pruning=facts()), {}, "T", {})


def test_many_warnings_are_counted() -> None:
    values = pruning_values(facts(warnings=[f"layer {n}: few" for n in range(NAMED + 4)]))
    assert values is not None
    assert len(values["warnings"]) == NAMED + 1 and values["warnings"][-1] == "and 4 layers more"


def test_the_picture_shows_every_expert_once_where_it_belongs(tmp_path: Path) -> None:
    left, right = pruning_figure(facts().layers).axes
    dots = [[tuple(map(float, point)) for point in group.get_offsets()] for group in left.collections]
    assert len(dots) == 8 and [len(group) for group in dots] == [3, 2] * 4
    mean = (2.5 + 0.1 + 1.5 + 3.0 + 0.4) / 5
    assert sorted(x for x, _ in dots[0]) == sorted(x / mean for x in (2.5, 1.5, 3.0))
    assert {y for group in dots[6:] for _, y in group} == {3.0}
    assert [round(bar.get_width(), 2) for bar in right.patches] == [70.0, 61.25, 70.0, 90.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["0", "1", "2", "mtp layer 0"]
    assert "experts.png" in draw_plots(release(pruning=facts()), tmp_path / "card")
    assert "experts.png" not in draw_plots(release(), tmp_path / "card")
