"""The card of a release: README.md in the form that model hubs want, with pictures beside it in `card/`.

Everything on it comes from `result.json` (and the layout from `config.json`): a number that was not measured is not there, and the card says so. Engines
that were not verified get no launch command. The user's own name is left to the user.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from qwench.errors import CheckpointError, OutputError
from qwench.models.facts import component_of
from qwench.result import Acceptance, Estimate, Evaluation, Result, RunFacts, TensorError, read_result
from qwench.steps.card_engines import engine_sections
from qwench.steps.card_heads import gate_values, graft_values
from qwench.steps.card_plots import draw_plots, size_text
from qwench.steps.card_pruning import pruning_values
from qwench.steps.card_speculation import speculation_values

FILE_NAME = "README.md"
PLOTS = "card"
NOT_MEASURED = "not measured"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(folder: Path) -> Path:
    """Write README.md and its pictures into a release folder; returns the path of the card.

    Raises:
        CheckpointError: no `result.json` or `config.json` there, or one that cannot be read.
        OutputError: the folder cannot be written.
    """
    result, config = read_result(folder), _config(folder)
    title = folder.resolve().name
    try:
        if any(file.file_type for file in result.files):
            from qwench.steps import gguf_card

            text = gguf_card.card_text(result, title)
        else:
            text = card_text(result, config, title, draw_plots(result, folder / PLOTS))
        beside = folder / (FILE_NAME + ".new")
        beside.write_text(text, encoding="utf-8")
        return beside.replace(folder / FILE_NAME)
    except OSError as error:
        raise OutputError(
            f"the card cannot be written into {folder}: {error}", "make room, or make the folder writable"
        ) from None


def card_text(result: Result, config: dict[str, Any], title: str, plots: dict[str, str]) -> str:
    """The card as Markdown.

    Args:
        result: the record of the release.
        config: its config.json.
        title: the name of the release.
        plots: pictures that exist in `card/`: file name -> caption.
    """
    return rendered("card.md.j2", card_values(result, config, title) | {"plots": plots})


def rendered(template: str, values: dict[str, Any]) -> str:
    """One of the files in `templates`, filled in; a name that has no value is an error."""
    environment = Environment(
        loader=PackageLoader("qwench.steps", "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(template).render(values)


def card_values(result: Result, config: dict[str, Any], title: str) -> dict[str, Any]:
    """What the template fills in, as text."""
    base = base_name(result)
    front, comments = front_matter(result, config)
    parameters = sum(row.parameters for row in result.precision)
    return {
        "front_matter": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "front_comments": comments,
        "title": title,
        "base": base,
        "base_link": f"https://huggingface.co/{base}" if HUB_ID.fullmatch(base) else "",
        "container": _container(config.get("quantization_config", {})),
        "schemes": " and ".join(sorted({_family(error.scheme).upper() for error in result.errors})) or "unquantized",
        "recipe_name": result.recipe.get("name", "unnamed"),
        "recipe_about": str(result.recipe.get("about", "")).rstrip("."),
        "recipe": yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True, width=120),
        "source_size": size_text(result.source.bytes),
        "release_size": size_text(result.bytes),
        "size_share": f"{100 * result.bytes / result.source.bytes:.1f}%",
        "bits_per_weight": f"{8 * result.bytes / parameters:.2f}" if parameters else NOT_MEASURED,
        "headline": _headline(result),
        "precision": [
            row.model_dump() | {"parameters": _count(row.parameters), "size": size_text(row.bytes)} for row in result.precision
        ],
        "evaluation": _evaluation(result.evaluation) if result.evaluation else None,
        "has_mtp": has_component(result, "mtp"),
        "acceptance": _acceptance_rows(result.evaluation),
        "speculation": speculation_values(result.evaluation),
        "graft": graft_values(result.graft),
        "gate": gate_values(result.acceptance),
        "pruning": pruning_values(result.pruning),
        "errors": error_rows(result.errors),
        "engines": engine_sections(result, title),
        "files": [{"name": file.name, "size": size_text(file.bytes)} for file in result.files],
        "version": result.qwench,
        "seconds": duration(result.run.seconds),
        "threads": f"{result.run.threads} thread{'s' if result.run.threads != 1 else ''}",
        "memory": memory_text(result.run),
        "revision": result.source.revision,
    }


def memory_text(run: RunFacts) -> str:
    """What the run held at most, of GPU memory too where it used a GPU."""
    gpu = f", {size_text(run.peak_vram)} on the GPU, in {run.compute}" if run.peak_vram else ""
    return f"{size_text(run.peak_rss)} of memory at most{gpu}"


def front_matter(result: Result, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The YAML header that hubs read, and comment lines for what the user must fill in."""
    base, comments = base_name(result), []
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"}
    if not HUB_ID.fullmatch(base):
        comments.append("# base_model: the source was a local folder; put the hub id of the base model here")
    if result.source.license:
        front["license"] = result.source.license
    else:
        comments.append("# license: the source names none; put the license of the base model here")
    front["library_name"] = "transformers"
    front["pipeline_tag"] = "image-text-to-text" if has_component(result, "vision") else "text-generation"
    method = config.get("quantization_config", {}).get("quant_method")
    schemes = sorted({_family(error.scheme) for error in result.errors})
    speculation = ["mtp", "speculative-decoding"] if has_component(result, "mtp") else []
    front["tags"] = [tag for tag in (result.source.model_type, method, *schemes, *speculation, "qwench") if tag]
    return front, comments


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


def _headline(result: Result) -> dict[str, str]:
    evaluation = result.evaluation
    verified = [f"{v.engine} {v.version}" for v in result.verifications if v.outcome == "agrees"]
    rows = _acceptance_rows(evaluation)
    return {
        "divergence": f"{with_error(evaluation.divergence.mean)} nats" if evaluation else NOT_MEASURED,
        "perplexity": f"{_perplexity(evaluation.perplexity_source)} / {_perplexity(evaluation.perplexity_release)}"
        if evaluation
        else NOT_MEASURED,
        "agreement": with_error(evaluation.top1_agreement, 100, "%") if evaluation else NOT_MEASURED,
        "acceptance": f"{rows[0]['source']} / {rows[0]['release']}" if rows else NOT_MEASURED,
        "verified": ", ".join(verified) or "no engine yet",
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    divergence = evaluation.divergence
    return {
        "text": evaluation.text,
        "text_sha256": evaluation.text_sha256,
        "ids_sha256": evaluation.ids_sha256,
        "documents": evaluation.documents,
        "length": evaluation.length or NOT_MEASURED,
        "tokens": f"{evaluation.tokens:,}",
        "dtype": evaluation.compute_dtype,
        "mean": with_error(divergence.mean),
        "p99": f"{divergence.p99:.3g}",
        "p999": f"{divergence.p999:.3g}",
        "max": f"{divergence.max:.3g}",
        "perplexity_source": _perplexity(evaluation.perplexity_source),
        "perplexity_release": _perplexity(evaluation.perplexity_release),
        "loss_increase": with_error(evaluation.loss_increase) if evaluation.loss_increase else NOT_MEASURED,
        "agreement": with_error(evaluation.top1_agreement, 100, "%"),
    }


def _acceptance_rows(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Source and release side by side, by draft position."""
    if evaluation is None:
        return []
    sides = {"source": evaluation.acceptance_source, "release": evaluation.acceptance_release}
    positions = max((len(side.by_position) for side in sides.values() if side), default=0)
    return [{"position": i + 1} | {name: _at(side, i) for name, side in sides.items()} for i in range(positions)]


def _at(side: Acceptance | None, position: int) -> str:
    return with_error(side.by_position[position], 100, "%") if side and position < len(side.by_position) else NOT_MEASURED


def base_name(result: Result) -> str:
    """The source's hub id, or the last part of its path: a card tells nobody where a folder lay."""
    name = result.source.name
    return name if HUB_ID.fullmatch(name) else Path(name).name or "unknown"


def _container(quantization: dict[str, Any]) -> str:
    """`nvfp4-pack-quantized`, `gptq`, `auto_round:auto_gptq`."""
    return str(
        next((quantization[k] for k in ("format", "packing_format", "quant_method") if k in quantization), "safetensors")
    )


def _family(label: str) -> str:
    """`nvfp4` of `nvfp4 g16`."""
    return label.partition(" ")[0]


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return str(parameters)


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no config.json", "give the folder of a release that `qwench run` made") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "make the release again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no mapping", "make the release again")
    return data
