"""The card of a release: README.md in the form that model hubs want, with pictures beside it in `card/`.

Everything on it comes from `result.json` (and the layout from `config.json`): a number that was not measured is not there, and the card says so. Engines
that were not verified get no launch command. The user's own name is left to the user.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from qwench.errors import CheckpointError, OutputError
from qwench.result import Result, read_result
from qwench.steps.cards.calibration import reach_values
from qwench.steps.cards.engines import engine_sections
from qwench.steps.cards.heads import gate_values, graft_values
from qwench.steps.cards.plots import draw_plots, size_text
from qwench.steps.cards.pruning import pruning_values
from qwench.steps.cards.report import write_report
from qwench.steps.cards.speculation import speculation_values
from qwench.steps.cards.values import (
    HUB_ID,
    NOT_MEASURED,
    acceptance_rows,
    base_name,
    count_text,
    duration,
    error_rows,
    evaluation_values,
    family,
    has_component,
    headline,
    memory_text,
    origin_of,
    rendered,
    task_values,
    verified_text,
)

FILE_NAME = "README.md"
PLOTS = "card"


def write_card(folder: Path) -> Path:
    """Write README.md, its pictures and report.html into a release folder; returns the path of the card.

    Raises:
        CheckpointError: no `result.json` or `config.json` there, or one that cannot be read.
        OutputError: the folder cannot be written.
    """
    result, config = read_result(folder), _config(folder)
    title = folder.resolve().name
    try:
        if any(file.file_type for file in result.files):
            from qwench.steps.gguf import card as gguf_card

            text = gguf_card.card_text(result, title)
        else:
            text = card_text(result, config, title, draw_plots(result, folder / PLOTS))
        write_report(folder, result, config)
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
        "schemes": " and ".join(sorted({family(error.scheme).upper() for error in result.errors})) or "unquantized",
        "recipe_name": result.recipe.get("name", "unnamed"),
        "recipe_about": str(result.recipe.get("about", "")).rstrip("."),
        "recipe": yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True, width=120),
        "source_size": size_text(result.source.bytes),
        "release_size": size_text(result.bytes),
        "size_share": f"{100 * result.bytes / result.source.bytes:.1f}%",
        "bits_per_weight": f"{8 * result.bytes / parameters:.2f}" if parameters else NOT_MEASURED,
        "headline": {
            name: f"{found} ({without})" if without else found for name, (found, without) in headline(result.evaluation).items()
        },
        "verified": verified_text(result),
        "precision": [
            row.model_dump() | {"parameters": count_text(row.parameters), "size": size_text(row.bytes)}
            for row in result.precision
        ],
        "evaluation": evaluation_values(result.evaluation) if result.evaluation else None,
        "has_mtp": has_component(result, "mtp"),
        "acceptance": acceptance_rows(result.evaluation),
        "speculation": speculation_values(result.evaluation),
        "graft": graft_values(result.graft),
        "gate": gate_values(result.acceptance),
        "pruning": pruning_values(result.pruning),
        "reach": reach_values(result.calibration, result.recipe),
        "tasks": task_values(result.tasks),
        "errors": error_rows(result.errors),
        "engines": engine_sections(result, title),
        "files": [{"name": file.name, "size": size_text(file.bytes)} for file in result.files],
        "version": result.qwench,
        "seconds": duration(result.run.seconds),
        "threads": f"{result.run.threads} thread{'s' if result.run.threads != 1 else ''}",
        "memory": memory_text(result.run),
        "revision": result.source.revision,
    }


def front_matter(result: Result, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The YAML header that hubs read, and comment lines for what the user must fill in."""
    front, comments = origin_of(result)
    front["library_name"] = "transformers"
    front["pipeline_tag"] = "image-text-to-text" if has_component(result, "vision") else "text-generation"
    method = config.get("quantization_config", {}).get("quant_method")
    schemes = sorted({family(error.scheme) for error in result.errors})
    speculation = ["mtp", "speculative-decoding"] if has_component(result, "mtp") else []
    front["tags"] = [tag for tag in (result.source.model_type, method, *schemes, *speculation, "qwench") if tag]
    return front, comments


def _container(quantization: dict[str, Any]) -> str:
    """`nvfp4-pack-quantized`, `gptq`, `auto_round:auto_gptq`."""
    return str(
        next((quantization[k] for k in ("format", "packing_format", "quant_method") if k in quantization), "safetensors")
    )


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
