"""The page: whole, self-contained, well-formed, and its marks where the numbers of the record say."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qwench.display import Report
from qwench.errors import OutputError
from qwench.recipe import parse_recipe
from qwench.result import (
    Acceptance,
    AcceptanceCheck,
    CalibrationFacts,
    Divergence,
    Figures,
    LayerDivergence,
    LoadFinding,
    LoadProof,
    Result,
    read_result,
    write_result,
)
from qwench.run import run_recipe
from qwench.steps.cards import svg as svg
from qwench.steps.cards.card import write_card
from qwench.steps.cards.report import acceptance_drawing, report_text, tail_drawing, weight_map, weight_scale
from tests.steps.cards.test_heads import graft
from tests.steps.cards.test_pruning import facts
from tests.steps.releases import estimate, evaluation, release, verification, weight
from tests.support.tiny import tiny_config, write_tiny

QUIET = Report("test", "bytes", None)
MIXED = """
name: mixed
steps:
  - quantize: {rules: [{roles: [mlp.*], scheme: int4}, {roles: [attention.*], scheme: int8, layers: "3"}, {roles: [delta.out], scheme: keep}]}
  - export: {}
acceptance: off
"""
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.classes: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"{self.open[-1]} is never closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data"):
                self.links.append(value or "")
            for kind in (value or "").split() if name == "class" else ():
                self.classes[kind] = self.classes.get(kind, 0) + 1

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def drawings(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.S)]


def marks(drawing: ElementTree.Element, tag: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in drawing.iter() if e.tag.endswith(tag) and e.get("class", "").startswith(kind)]


def title_of(mark: ElementTree.Element) -> str:
    return next(e.text or "" for e in mark if e.tag.endswith("title"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    run_recipe(parse_recipe(MIXED, "t"), str(write_tiny(place / "tiny")), place / "out", 1, QUIET, accept_any=True)
    return place / "out"


def test_the_card_writes_both_and_the_page_needs_nobody(made: Path) -> None:
    result = read_result(made)
    result.evaluation = evaluation()
    result.calibration = CalibrationFacts(
        text="a <b>text</b>", text_sha256="1", ids_sha256="2", rows=7, length=97, reports={"m.0": "fell back"}
    )
    result.verifications = [verification("vllm", "agrees")]
    write_result(made, result)
    write_card(made)
    text = (made / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert needs_nobody(text)
    assert not any("{{" in t or "{%" in t for t in page.texts)
    assert "a <b>text</b>" in " ".join(page.texts), "what comes from outside is text, not markup"
    for part in ("precision", "quality", "weights", "calibration", "engines", "run"):
        assert f'<section id="{part}">' in text
    assert "fell back" in text and "name: mixed" in text and "0.0213 ± 0.0011" in text
    assert len(drawings(text)) == 7


def needs_nobody(text: str) -> bool:
    """Whether a page asks nobody for anything: no link, script, style or picture from elsewhere."""
    loud = [word for word in ("<script", "@import", "url(", "<iframe", "<object", "<base") if word in text.lower()]
    return not Page(text).links and not loud and "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")


def crowded() -> Result:
    """A record with everything that a page can show."""
    without = Figures.model_validate(evaluation().model_dump(include=set(Figures.model_fields)))
    apart = LayerDivergence(positions=97, by_layer=[estimate(mean, 0.01) for mean in (0.1, 0.3, 0.2, 0.4)])
    found = evaluation(own_error_by_layer=[0.01, 0.02, 0.05, 0.03], divergence_by_layer=apart, without_corrections=without)
    read = CalibrationFacts(
        text="t",
        text_sha256="a" * 64,
        ids_sha256="b" * 64,
        rows=7,
        length=97,
        reports={"model.layers.0.mlp." + "x" * 60: "said " * 30},
    )
    return release(
        evaluation=found,
        calibration=read,
        pruning=facts(),
        graft=graft(),
        verifications=[verification("vllm", "agrees", notes=["y" * 90])],
    )


def ladder_release() -> Result:
    """A record of GGUF files."""
    base = release(evaluation=None, errors=[])
    files = [
        base.files[0].model_copy(update={"name": f"a-rather-long-name-{kind}.gguf", "content": "model", "file_type": kind, "precision": base.precision, "evaluation": evaluation()})
        for kind in ("BF16", "Q8_0", "Q6_K", "Q4_K_M")
    ]  # fmt: skip
    return base.model_copy(update={"files": files, "precision": []})


def test_no_page_needs_anybody() -> None:
    for result in (crowded(), ladder_release(), release(evaluation=None)):
        assert needs_nobody(report_text(result, tiny_config(moe=True), "r"))
    assert not needs_nobody('<p><a href="x">y</a></p>') and not needs_nobody("<p>http://elsewhere</p>")


TOO_WIDE = """
<script>
document.body.style.width = "390px";
const odd = [...document.querySelectorAll("main *")].filter(e => !e.closest("pre, .wide, svg") && e.getBoundingClientRect().right > 390.5 && e.getBoundingClientRect().width > 0);
document.title = "too wide: " + odd.map(e => e.tagName + " " + e.textContent.slice(0, 30)).join("; ") + "|" + document.querySelectorAll("main svg").length;
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed: nothing lays the page out")
@pytest.mark.parametrize("make", [crowded, ladder_release])
def test_a_browser_lays_the_page_out_on_a_phone(make: Callable[[], Result], tmp_path: Path) -> None:
    """At 390 pixels nothing hangs out of the page but what scrolls by itself."""
    text = report_text(make(), tiny_config(moe=True), "a-release-with-a-rather-long-name-that-goes-on-NVFP4A16")
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", TOO_WIDE + "</body>"), encoding="utf-8")
    words = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>(.*?)\|(\d+)</title>", shown, re.S)
    assert found is not None and int(found[2]) == len(drawings(text)) > 3
    assert found[1].strip() == "too wide:", found[1]


def test_the_map_shows_every_linear_weight_in_its_format(made: Path) -> None:
    text = report_text(read_result(made), json.loads((made / "config.json").read_text()), "r")
    drawing = drawings(text)[0]
    int4, int8, kept = (marks(drawing, "rect", kind) for kind in ("scheme0", "scheme1", "kept"))
    assert len(int4) == 4 * 3 and {title_of(m).split(": ")[1].split(",")[0] for m in int4} == {"int4 g128"}
    assert len(int8) == 4 and all("layer 3, attention." in title_of(m) and "int8" in title_of(m) for m in int8)
    assert len(kept) == 3 * 5 + 7, "Gated DeltaNet of three layers, and the head's seven"
    assert sum("mtp" in title_of(m) for m in kept) == 7
    assert sorted({float(m.get("y", 0)) for m in int4}) == sorted({float(m.get("y", 0)) for m in int4 + int8}), (
        "one line a layer"
    )


def test_the_scale_of_the_weights_says_from_where_each_colour_is_used() -> None:
    errors = [weight("mlp.up", i, relative=0.02 * (i + 1)) for i in range(5)]
    assert weight_scale(errors) == [
        ("shade0", "2%"),
        ("shade1", "3.6%"),
        ("shade2", "5.2%"),
        ("shade3", "6.8%"),
        ("shade4", "8.4%"),
    ]
    drawing = ElementTree.fromstring(weight_map(errors) or "")
    steps = [re.sub(r"\D", "", m.get("class", "")) for m in marks(drawing, "rect", "shade")]
    assert steps == ["0", "1", "2", "3", "4"] and weight_scale([]) == []
    assert weight_map([weight("mlp.up", 0, relative=0.0)]), "a weight without any error"


def test_pruned_experts_are_all_there() -> None:
    text = report_text(release(pruning=facts()), tiny_config(moe=True), "r")
    Page(text)
    strip = next(d for d in drawings(text) if "saliency" in d.get("aria-label", ""))
    stayed, went = marks(strip, "path", "dots stayed"), marks(strip, "path", "dots went")
    assert (len(stayed), len(went)) == (4, 4), "a path for each kind and layer"
    assert [m.get("d", "").count("M") for m in stayed + went] == [3] * 4 + [2] * 4
    assert "layer 1: few" in text


def test_what_was_not_measured_is_said_so() -> None:
    text = report_text(release(evaluation=None, verifications=[], errors=[], precision=[]), tiny_config(), "r")
    page = Page(text)
    assert "qwench eval" in page.texts and "qwench verify" in page.texts
    assert drawings(text) == []


def test_files_of_a_gguf_release_stand_one_by_one() -> None:
    base = release()
    files = [
        base.files[0].model_copy(update={"name": f"m-{kind}.gguf", "content": "model", "file_type": kind, "precision": base.precision,
                                         "evaluation": evaluation(divergence=evaluation().divergence.model_copy(update={"mean": estimate(mean, 0.001)}))})
        for kind, mean in (("Q8_0", 0.0004), ("Q4_K_M", 0.021))
    ]  # fmt: skip
    text = report_text(
        base.model_copy(update={"files": files, "evaluation": None, "precision": [], "errors": []}), tiny_config(), "r"
    )
    page = Page(text)
    assert {"m-Q8_0.gguf", "m-Q4_K_M.gguf"} <= set(page.texts)
    assert "0.0004 to 0.021" in page.texts
    sizes = next(d for d in drawings(text) if "size and divergence" in d.get("aria-label", ""))
    points = marks(sizes, "circle", "after")
    assert [title_of(p).split(":")[0] for p in points] == ["Q8_0", "Q4_K_M"]
    assert float(points[0].get("cy", 0)) > float(points[1].get("cy", 0)), "what diverges more stands higher"
    types = re.findall(r"<tr><td>attention</td>(.*?)</tr>", text)
    assert types == ["<td>3 nvfp4 g16, 3 BF16</td><td>3 nvfp4 g16, 3 BF16</td>"]
    assert text.count("<summary><h3>m-Q") == 2


def test_layers_stand_at_their_heights_and_the_costliest_is_marked() -> None:
    apart = LayerDivergence(positions=97, by_layer=[estimate(mean, 0.01) for mean in (0.1, 0.3, 0.2, 0.4)])
    without = Figures.model_validate(
        evaluation().model_dump(include=set(Figures.model_fields)) | {"hidden_error_by_layer": [0.06, 0.08, 0.1, 0.12]}
    )
    found = evaluation(own_error_by_layer=[0.01, 0.02, 0.05, 0.03], divergence_by_layer=apart, without_corrections=without)
    text = report_text(release(evaluation=found), tiny_config(), "r")
    Page(text)
    hidden, kl = (
        next(d for d in drawings(text) if d.get("aria-label") == label)
        for label in ("difference of hidden states by layer", "KL by layer")
    )
    heights = [float(m.get("cy", 0)) for m in marks(hidden, "circle", "after") + marks(hidden, "circle", "without")]
    scale = (heights[0] - heights[3]) / (5.9 - 3.1)
    assert [heights[0] - (value - 3.1) * scale for value in (3.1, 4.2, 4.7, 5.9, 6, 8, 10, 12)] == pytest.approx(
        heights, abs=0.2
    )
    assert [title_of(m) for m in marks(hidden, "rect", "mark")] == ["layer 2 by itself: 5%"] and len(
        marks(hidden, "rect", "under")
    ) == 3
    assert [title_of(m) for m in marks(kl, "circle", "after")] == [
        "after layer 0: 0.1",
        "after layer 1: 0.3",
        "after layer 2: 0.2",
        "after layer 3: 0.4",
    ]
    assert len([m for m in marks(kl, "line", "after") if "thin" in m.get("class", "")]) == 4, "a standard error each"
    assert "By itself layer 2 (5%) adds most" in text and "without corrections 0.0213" in text


def test_a_release_that_equals_its_source_has_no_empty_axes() -> None:
    zero = evaluation(hidden_error_by_layer=[0.0, 0.0], own_error_by_layer=[0.0, 0.0])
    text = report_text(release(evaluation=zero), tiny_config(), "r")
    assert not any(d.get("aria-label") == "difference of hidden states by layer" for d in drawings(text))


def test_what_the_run_measured_of_the_head_and_what_it_was_calibrated_on_are_told() -> None:
    check = AcceptanceCheck(
        floor=0.5,
        source=Acceptance(by_position=[estimate(0.61, 0.02)]),
        release=Acceptance(by_position=[estimate(0.43, 0.03)]),
        documents=8,
        length=256,
        overridden=True,
    )
    read = CalibrationFacts(
        text="t", text_sha256="1", ids_sha256="2", rows=7, length=97, images=5, left_out={"too short": 3}, lost_rows=[(1, 2)]
    )
    proof = LoadProof(
        engine="sglang", version="0.5", good=False, findings=[LoadFinding(level="lost", what="mtp.fc.weight", mend="rename it")]
    )
    text = report_text(release(acceptance=check, calibration=read, graft=graft(), load_proofs=[proof]), tiny_config(), "r")
    said = " ".join(Page(text).texts)
    for words in (
        "61.0% ± 2.0% in the source, 43.0% ± 3.0% here",
        "finished all the same",
        "With 5 images",
        "3 (too short)",
        "1 rows were left out",
        "does not load right",
        "rename it",
    ):
        assert words in said, words


def test_acceptance_stands_at_its_height() -> None:
    two = [Acceptance(by_position=[estimate(0.8, 0.05), estimate(0.5, 0.05)]), Acceptance(by_position=[estimate(0.7, 0.05)])]
    markup = acceptance_drawing(evaluation(acceptance_source=two[0], acceptance_release=two[1]))
    assert markup is not None and acceptance_drawing(evaluation(acceptance_source=None, acceptance_release=None)) is None
    drawing = ElementTree.fromstring(markup)
    before, after = marks(drawing, "circle", "before"), marks(drawing, "circle", "after")
    assert (len(before), len(after)) == (2, 1)
    heights = [float(m.get("cy", 0)) for m in (*before, *after)]
    assert (heights[1] - heights[0]) / (heights[2] - heights[0]) == pytest.approx(3, rel=0.02)


def test_the_tail_ends_at_the_largest_and_falls() -> None:
    divergence = Divergence(
        mean=estimate(0.02, 0.001), p99=0.5, p999=2.0, max=3.0, histogram_edges=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0],
        histogram_counts=[0, 3000, 6500, 480, 20],
    )  # fmt: skip
    drawing = ElementTree.fromstring(tail_drawing(divergence))
    line = next(e for e in drawing.iter() if e.tag.endswith("polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
    assert len(points) == 4 + 3
    assert points == sorted(points) and [y for _, y in points] == sorted(y for _, y in points)
    assert [title_of(m) for m in marks(drawing, "circle", "mark")] == ["p99: 0.5 nats", "p99.9: 2 nats", "max: 3 nats"]
    few = divergence.model_copy(
        update={"p999": 3.0, "histogram_counts": [0, 30, 65, 5, 1]}
    )  # too few tokens for a p99.9 of its own
    drawing = ElementTree.fromstring(tail_drawing(few))
    assert [title_of(m)[:3] for m in marks(drawing, "circle", "mark")] == ["p99", "max"]
    line = next(e for e in drawing.iter() if e.tag.endswith("polyline"))
    assert len({pair.split(",")[0] for pair in line.get("points", "").split()}) == len(line.get("points", "").split()), (
        "it never falls straight down"
    )


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 8.7), (0, 0.0031), (0, 263), (0, 97)])
def test_round_numbers_of_an_axis(low: float, high: float) -> None:
    ticks = svg.nice(low, high)
    assert 3 <= len(ticks) <= 7 and ticks[0] == 0 and ticks[-1] <= high
    steps = {round(b - a, 10) for a, b in pairwise(ticks)}
    assert len(steps) == 1
    leading = steps.pop() / 10 ** math.floor(math.log10(ticks[1]) + 1e-9)
    assert round(leading, 6) in (1, 2, 5)


def test_scales_and_decades() -> None:
    place = svg.logarithmic(1e-4, 1.0, 0.0, 400.0)
    assert [round(place(v)) for v in (1e-4, 1e-3, 1.0)] == [0, 100, 400]
    assert svg.decades(1e-4, 0.5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert len(svg.decades(1e-9, 1.0)) == 5
    assert svg.whole(3) == [0, 1, 2, 3]
    assert svg.linear(0, 2, 10, 20)(1) == 15


def test_text_in_a_drawing_is_harmless() -> None:
    drawn = svg.bars([("<script>", None, 3.0)], lambda v: f"{v:g} & more", 'a "label"')
    assert "<script>" not in drawn
    found: Any = ElementTree.fromstring(drawn)
    assert "<script>" in [e.text for e in found.iter()]


def test_a_folder_that_cannot_be_written_is_told(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        write_card(made)
