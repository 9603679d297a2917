"""The card of a GGUF release: the ladder of its files, each with what was measured on it, and how to run them. From `result.json` alone, as every card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qwench.result import Acceptance, Evaluation, FileFact, Result, Verification
from qwench.steps.cards.heads import graft_values
from qwench.steps.cards.plots import size_text
from qwench.steps.cards.values import (
    HUB_ID,
    NOT_MEASURED,
    base_name,
    duration,
    memory_text,
    origin_of,
    rendered,
    task_values,
    with_error,
)
from qwench.steps.publishing.launch import Launch, arguments, shell

GIB = 2**30
HOLDS = {
    "model": "text with MTP head", "trunk": "text", "mtp": "MTP head, a draft file", "vision": "vision tower (mmproj)",
    "importance": "importance matrix",
}  # fmt: skip
ENGINE = "llama.cpp"


def card_text(result: Result, title: str) -> str:
    """The card as Markdown.

    Args:
        result: the record of the release.
        title: the name of the release.
    """
    return rendered("card_gguf.md.j2", card_values(result, title))


def card_values(result: Result, title: str) -> dict[str, Any]:
    """What the template fills in, as text."""
    base = base_name(result)
    front, comments = front_matter(result)
    measured = next((f.evaluation for f in result.files if f.evaluation), None)
    return {
        "front_matter": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "front_comments": comments,
        "title": title,
        "base": base,
        "base_link": f"https://huggingface.co/{base}" if HUB_ID.fullmatch(base) else "",
        "recipe_name": result.recipe.get("name", "unnamed"),
        "recipe_about": str(result.recipe.get("about", "")).rstrip("."),
        "recipe": yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True, width=120),
        "ladder": ladder(result),
        "files": [file_row(file) for file in result.files],
        "evaluation": _text(measured) if measured else None,
        "has_mtp": has_mtp(result),
        "acceptance": acceptance_table(result),
        "gates": gate_rows(result),
        "graft": graft_values(result.graft),
        "importance": result.calibration,
        "importance_file": _importance_file(result),
        "verified": [verification_row(v) for v in result.verifications if v.engine == ENGINE],
        "commands": commands(result),
        "tasks": task_values(result.tasks),
        "version": result.qwench,
        "seconds": duration(result.run.seconds),
        "threads": f"{result.run.threads} thread{'s' if result.run.threads != 1 else ''}",
        "memory": memory_text(result.run),
        "revision": result.source.revision,
        "notes": [f"`{file.name}`: {note}" for file in result.files for note in file.notes],
    }


def front_matter(result: Result) -> tuple[dict[str, Any], list[str]]:
    """The YAML header that hubs read, and comment lines for what the user must fill in."""
    front, comments = origin_of(result)
    front["library_name"] = "gguf"
    front["pipeline_tag"] = "image-text-to-text" if any(f.content == "vision" for f in result.files) else "text-generation"
    speculation = ["mtp", "speculative-decoding"] if has_mtp(result) else []
    front["tags"] = [result.source.model_type, "gguf", "llama.cpp", *speculation, "qwench"]
    return front, comments


def has_mtp(result: Result) -> bool:
    """Whether any file can draft."""
    return any(row.component == "mtp" for file in result.files for row in file.precision)


def ladder(result: Result) -> list[dict[str, str]]:
    """A rung for each file that is a language model by itself."""
    return [ladder_row(file, _verification(result, file)) for file in networks(result)]


def ladder_row(file: FileFact, verification: Verification | None) -> dict[str, str]:
    """One rung: size and quality of one file."""
    found = file.evaluation
    return {
        "name": file.name,
        "bits": f"{file.bits_per_weight:.2f}" if file.bits_per_weight else NOT_MEASURED,
        "size": f"{file.bytes / GIB:.2f} GiB" if file.bytes >= GIB / 10 else f"{file.bytes / 1e6:.2f} MB",
        "kl": with_error(found.divergence.mean) if found else NOT_MEASURED,
        "kl_p999": f"{found.divergence.p999:.3g}" if found else NOT_MEASURED,
        "agreement": with_error(found.top1_agreement, 100, "%") if found else NOT_MEASURED,
        "acceptance": first_acceptance(found.acceptance_release) if found else NOT_MEASURED,
        "engine": verification.outcome if verification else "not verified",
    }


def file_row(file: FileFact) -> dict[str, str]:
    """Name, content and size; the types are what most of the parameters are stored in, the rest behind them."""
    count: dict[str, int] = {}
    for row in file.precision:
        count[row.stored] = count.get(row.stored, 0) + row.tensors
    types = ", ".join(f"{n} {kind}" for kind, n in sorted(count.items(), key=lambda pair: -pair[1]))
    holds = HOLDS.get(file.content or "", "")
    if file.content == "model" and not any(row.component == "mtp" for row in file.precision):
        holds = HOLDS["trunk"]
    return {"name": file.name, "holds": holds, "types": types, "size": size_text(file.bytes)}


def acceptance_table(result: Result) -> list[dict[str, str]]:
    """Acceptance by position: the source first, then every file that drafts."""
    rows: list[dict[str, str]] = []
    for file in networks(result):
        if file.evaluation is None or file.evaluation.acceptance_release is None:
            continue
        if not rows and file.evaluation.acceptance_source:
            rows.append(_positions("the source", file.evaluation.acceptance_source))
        rows.append(_positions(f"`{file.name}`", file.evaluation.acceptance_release))
    return rows


def gate_rows(result: Result) -> list[dict[str, Any]]:
    """What the run itself measured of each file's head before it finished."""
    checks = [(file.name, file.acceptance) for file in result.files if file.acceptance and file.acceptance.release]
    return [
        {
            "name": name, "source": first_acceptance(check.source), "here": first_acceptance(check.release),
            "floor": f"{check.floor:.0%}", "overridden": check.overridden, "rows": f"{check.documents} rows of {check.length} tokens",
        }
        for name, check in checks
    ]  # fmt: skip


def _positions(name: str, side: Acceptance) -> dict[str, str]:
    return {"name": name, "cells": " | ".join(with_error(estimate, 100, "%") for estimate in side.by_position)}


def first_acceptance(side: Acceptance | None) -> str:
    """At draft position 1."""
    return with_error(side.by_position[0], 100, "%") if side and side.by_position else "no head"


def verification_row(found: Verification) -> dict[str, str]:
    """What llama.cpp did with one file."""
    drafts = found.speculation or {}
    return {
        "file": found.file or "",
        "version": found.version,
        "outcome": found.outcome,
        "kl": f"{found.mean_kl:.2g} (tolerance {found.tolerance_kl:.2g})" if found.mean_kl is not None else NOT_MEASURED,
        "original": f"{found.original_kl:.2g}" if found.original_kl is not None else "",
        "drafts": f"{drafts['accepted']:.0f} of {drafts['drafted']:.0f}" if "drafted" in drafts else "",
        "ours": f"{drafts['ours accepted']:.0f} of {drafts['ours drafted']:.0f}" if "ours drafted" in drafts else "",
        "image": found.image.partition(" through")[0] if found.image else "",
    }


def commands(result: Result) -> str:
    """How to serve the best-known file; "" where no file was verified."""
    good = [v.file for v in result.verifications if v.engine == ENGINE and v.outcome in ("agrees", "loads") and v.file]
    models = [f for f in networks(result) if f.name in good]
    if not models:
        return ""
    chosen = next((f for f in models if f.file_type in ("Q6_K", "Q4_K_M")), models[0])
    tower = next((f.name for f in result.files if f.content == "vision"), "")
    drafting = any(row.component == "mtp" for row in chosen.precision)
    return shell(arguments("llama.cpp", Launch(chosen.name, mtp=drafting, tower=tower)))


def _importance_file(result: Result) -> str:
    """The name of the importance file that the recipe gave; "" where it gave none."""
    exports = [step["export"] for step in result.recipe.get("steps", []) if "export" in step]
    stated = exports[0].get("importance") if exports else None
    return f"`{Path(stated).name}`" if isinstance(stated, str) else ""


def networks(result: Result) -> list[FileFact]:
    """Files that are language models by themselves."""
    return [file for file in result.files if file.content in ("model", "trunk")]


def _verification(result: Result, file: FileFact) -> Verification | None:
    return next((v for v in result.verifications if v.engine == ENGINE and v.file == file.name), None)


def _text(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "text": evaluation.text, "text_sha256": evaluation.text_sha256, "ids_sha256": evaluation.ids_sha256,
        "documents": evaluation.documents, "length": evaluation.length, "tokens": f"{evaluation.tokens:,}", "dtype": evaluation.compute_dtype,
    }  # fmt: skip
