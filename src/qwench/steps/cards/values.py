"""Values of a record as text: what the card and the report both show."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qwench.models.facts import component_of
from qwench.result import Acceptance, Estimate, Evaluation, Figures, Result, RunFacts, TaskScore, TensorError
from qwench.steps.cards.layers import layer_words, sides
from qwench.steps.cards.plots import size_text

NOT_MEASURED = "not measured"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def rendered(template: str, values: dict[str, Any], *, escape: bool = False) -> str:
    """One of the files in `templates`, filled in; a name that has no value is an error. `escape`: for HTML, what is no markup is made harmless."""
    environment = Environment(
        loader=PackageLoader("qwench.steps.cards", "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=escape,
    )  # fmt: skip
    return environment.get_template(template).render(values)


def memory_text(run: RunFacts) -> str:
    """What the run held at most, of GPU memory too where it used a GPU."""
    gpu = f", {size_text(run.peak_vram)} on the GPU, in {run.compute}" if run.peak_vram else ""
    return f"{size_text(run.peak_rss)} of memory at most{gpu}"


def error_rows(errors: list[TensorError]) -> list[dict[str, Any]]:
    """Round-trip errors by component and scheme, in the order in which they first occur."""
    groups: dict[tuple[str, str], list[TensorError]] = defaultdict(list)
    for error in errors:
        groups[component_of(error.role), error.scheme].append(error)
    return [
        {
            "component": component,
            "scheme": scheme,
            "tensors": len(group),
            "mean_abs": f"{sum(e.mean_abs for e in group) / len(group):.2g}",
            "max_abs": f"{max(e.max_abs for e in group):.2g}",
            "relative": f"{100 * sum(e.relative_rms for e in group) / len(group):.2f}%",
        }
        for (component, scheme), group in groups.items()
    ]


def has_component(result: Result, component: str) -> bool:
    """Whether any tensor of a component is in the release."""
    return any(row.component == component and row.tensors for row in result.precision)


def with_error(estimate: Estimate, factor: float = 1.0, unit: str = "") -> str:
    """A mean with as many digits as two digits of its standard error: `0.0213 ± 0.0011`."""
    mean, error = estimate.mean * factor, estimate.standard_error * factor
    if error <= 0:
        return f"{mean:.4g}{unit} ± 0{unit}"
    digits = min(max(1 - _exponent(error), 0), 12)
    return f"{mean:.{digits}f}{unit} ± {error:.{digits}f}{unit}"


def _perplexity(estimate: Estimate) -> str:
    """With three decimals whatever its standard error: documents differ far more than the two models, which read the same ones."""
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"


def _exponent(value: float) -> int:
    """The power of ten of the first digit, after rounding to two."""
    return int(f"{value:.1e}".partition("e")[2])


def headline(evaluation: Evaluation | None) -> dict[str, tuple[str, str]]:
    """What stands at the top: divergence, perplexity, agreement, acceptance at position 1; each with what it is without corrections, "" where there are none."""
    if evaluation is None:
        return dict.fromkeys(("divergence", "perplexity", "agreement", "acceptance"), (NOT_MEASURED, ""))
    drafts = acceptance_rows(evaluation)[:1]
    cells = drafts[0]["cells"] if drafts else []
    return {
        "divergence": _both(evaluation, lambda found: f"{with_error(found.divergence.mean)} nats"),
        "perplexity": _both(
            evaluation, lambda found: _perplexity(found.perplexity_release), f"{_perplexity(evaluation.perplexity_source)} / "
        ),
        "agreement": _both(evaluation, lambda found: with_error(found.top1_agreement, 100, "%")),
        "acceptance": (" / ".join(cells[:2]) or NOT_MEASURED, f"without corrections {cells[2]}" if len(cells) > 2 else ""),
    }


def _both(evaluation: Evaluation, text: Callable[[Figures], str], before: str = "") -> tuple[str, str]:
    without = evaluation.without_corrections
    return before + text(evaluation), f"without corrections {text(without)}" if without else ""


def verified_text(result: Result) -> str:
    """Engines that agree with our reading of the files, and whether with corrections: `vllm 0.32, gptqmodel 7.7.0 (alone, with corrections)`."""
    how: dict[str, list[str]] = defaultdict(list)
    for found in result.verifications:
        if found.outcome == "agrees":
            how[f"{found.engine} {found.version.partition(',')[0]}"].append("with corrections" if found.adapter else "alone")
    corrected = any("with corrections" in said for said in how.values())
    names = [f"{name} ({', '.join(sorted(set(said)))})" if corrected else name for name, said in how.items()]
    return ", ".join(names) or "no engine yet"


def evaluation_values(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as text: what it was measured on, the `columns` of its table, and the `rows` of it."""
    return {
        "text": evaluation.text,
        "text_sha256": evaluation.text_sha256,
        "ids_sha256": evaluation.ids_sha256,
        "corrections": evaluation.corrections,
        "documents": evaluation.documents,
        "length": evaluation.length or NOT_MEASURED,
        "tokens": f"{evaluation.tokens:,}",
        "dtype": evaluation.compute_dtype,
        "mean": with_error(evaluation.divergence.mean),
        "layers": layer_words(evaluation),
        "layer_positions": evaluation.divergence_by_layer.positions if evaluation.divergence_by_layer else 0,
        "columns": columns(evaluation),
        "rows": figure_rows(evaluation),
    }


def columns(evaluation: Evaluation) -> list[str]:
    """What stands side by side in tables: the source and each reading of the release."""
    return ["source", *(["with corrections", "without"] if evaluation.without_corrections else ["release"])]


def figure_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What was measured, and its value in each of `columns`; "" where the source has none."""
    found = [figures for _, figures in sides(evaluation)]

    def row(what: str, text: Callable[[Figures], str], source: str = "") -> dict[str, Any]:
        return {"what": what, "cells": [source, *(text(figures) for figures in found)]}

    return [
        row("KL, mean", lambda f: with_error(f.divergence.mean)),
        row("KL, 99% of tokens at most", lambda f: f"{f.divergence.p99:.3g}"),
        row("KL, 99.9% of tokens at most", lambda f: f"{f.divergence.p999:.3g}"),
        row("KL, largest", lambda f: f"{f.divergence.max:.3g}"),
        row("perplexity", lambda f: _perplexity(f.perplexity_release), _perplexity(evaluation.perplexity_source)),
        row(
            "negative log-likelihood, release minus source (nats)",
            lambda f: with_error(f.loss_increase) if f.loss_increase else NOT_MEASURED,
        ),
        row("same most likely token", lambda f: with_error(f.top1_agreement, 100, "%")),
    ]


def acceptance_rows(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Drafts accepted by position, in each of `columns`."""
    if evaluation is None:
        return []
    found = [evaluation.acceptance_source, *(figures.acceptance_release for _, figures in sides(evaluation))]
    positions = max((len(side.by_position) for side in found if side), default=0)
    return [{"position": i + 1, "cells": [_at(side, i) for side in found]} for i in range(positions)]


def _at(side: Acceptance | None, position: int) -> str:
    return with_error(side.by_position[position], 100, "%") if side and position < len(side.by_position) else NOT_MEASURED


def base_name(result: Result) -> str:
    """The source's hub id, or the last part of its path: a card tells nobody where a folder lay."""
    name = result.source.name
    return name if HUB_ID.fullmatch(name) else Path(name).name or "unknown"


def family(label: str) -> str:
    """`nvfp4` of `nvfp4 g16`."""
    return label.partition(" ")[0]


def count_text(parameters: int) -> str:
    """Parameters for a reader: `4.68B`."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return str(parameters)


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def task_values(scores: list[TaskScore]) -> dict[str, Any] | None:
    """Benchmarks: `how` they were run, and a row for each metric; None where none was."""
    if not scores:
        return None
    how = dict.fromkeys(f"{score.version} on {score.engine}" for score in scores)
    return {"how": " and ".join(how), "rows": task_rows(scores)}


def task_rows(scores: Sequence[TaskScore]) -> list[tuple[str, ...]]:
    """Task, metric, documents, source, release, difference, recovery."""

    def both(estimate: Estimate | None, factor: float = 1.0, unit: str = "") -> str:
        return f"{estimate.mean * factor:.4g}{unit} ± {estimate.standard_error * factor:.2g}{unit}" if estimate else "-"

    return [
        (
            f"{s.task} ({s.file})" if s.file else s.task, s.metric, str(s.samples), both(s.source), both(s.release), both(s.difference),
            both(s.recovery, 100, "%"),
        )
        for s in scores
    ]  # fmt: skip


def origin_of(result: Result) -> tuple[dict[str, Any], list[str]]:
    """What the YAML header says about where a release comes from, and comment lines for what it does not know."""
    base, comments = base_name(result), []
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"}
    if not HUB_ID.fullmatch(base):
        comments.append("# base_model: the source was a local folder; put the hub id of the base model here")
    if result.source.license:
        front["license"] = result.source.license
    else:
        comments.append("# license: the source names none; put the license of the base model here")
    return front, comments
