"""What a card says about running a release: a launch command for each engine that loaded it, an honest line for each that did not or was not asked.

`agrees` and `loads` get a command; `loads` also says that the numbers were not proved. `disagrees` and `failed` get none, nor does an engine that nobody ran.
"""

from __future__ import annotations

from typing import Any

from qwench.formats.adapter import FOLDER
from qwench.result import Result, Verification
from qwench.steps.cards.snippets import auto_round_snippet, gptqmodel_snippet, transformers_snippet
from qwench.steps.planning.readers import trouble_of
from qwench.steps.publishing.launch import Launch, arguments, shell

TITLES = {
    "vllm": "vLLM", "transformers": "Transformers", "gptqmodel": "GPTQModel", "auto-round": "auto-round", "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
}  # fmt: skip
READERS = {"gptq": ("gptqmodel", "vllm", "sglang"), "auto-round": ("auto-round", "vllm", "sglang")}
"""Engines that the card of a release in each container speaks of, in this order; the others are told where they were asked."""
OTHERS = ("vllm", "transformers", "sglang")
"""The same of every other container."""
CORRECTING = ("gptqmodel", "vllm", "sglang")
"""Engines that add low-rank corrections (EoRA)."""

NVFP4_SGLANG = (
    "SGLang has no loader for NVFP4 weight-only (sglang #40022, as of September 2026): this release does not run there."
)
EXPERTS_TRANSFORMERS = (
    "Transformers 5.23 reads such experts wrongly, and says nothing: it drops the global scale of NVFP4 and the zero points of asymmetric integers. "
    "Do not use it for this release."
)


def engine_sections(result: Result, name: str) -> list[dict[str, Any]]:
    """For each engine: title, status, notes, command (None where it gets none), language of the command.

    A release with corrections has two sections for an engine that adds them: without, and with.

    Args:
        result: the record of the release.
        name: what a launch command calls the release.
    """
    latest = {(found.engine, bool(found.adapter)): found for found in result.verifications}
    asked = READERS.get(container(result), OTHERS)
    engines = [*asked, *sorted({engine for engine, _ in latest} - set(asked))]
    ways = {engine: (False, True) if corrections_rank(result) and engine in CORRECTING else (False,) for engine in engines}
    return [_section(engine, latest.get((engine, way)), result, name, way) for engine in engines for way in ways[engine]]


def launch_command(engine: str, result: Result, name: str, corrected: bool = False) -> tuple[str, str] | None:
    """(command, its language) that starts an engine on this release; None for an engine that we know none for.

    Args:
        corrected: with the corrections beside it. vLLM drafts nothing then: 0.32 computes wrong numbers where it drafts and adapters are on.
    """
    rank, vision = corrections_rank(result) if corrected else 0, _has(result, "vision")
    if engine in ("vllm", "sglang"):
        mtp = _has(result, "mtp") and not (rank and engine == "vllm")
        adapter = f"{name}/{FOLDER}" if rank else ""
        return shell(arguments(engine, Launch(name, mtp=mtp, adapter=adapter, rank=rank))), "bash"
    if engine == "transformers":
        return transformers_snippet(name, vision), "python"
    if engine == "auto-round":
        return auto_round_snippet(name, vision), "python"
    if engine == "gptqmodel":
        return gptqmodel_snippet(name, vision, rank), "python"
    return None


def container(result: Result) -> str:
    """What the recipe exports to: `compressed-tensors`, `gptq`, `auto-round`."""
    return next((str(step["export"].get("format", "")) for step in result.recipe.get("steps", []) if "export" in step), "")


def corrections_rank(result: Result) -> int:
    """The rank of the corrections beside the release, as the recipe asks for it; 0 where there are none."""
    return next((int(step["correct"].get("rank", 0)) for step in result.recipe.get("steps", []) if "correct" in step), 0)


def _section(engine: str, verification: Verification | None, result: Result, name: str, corrected: bool) -> dict[str, Any]:
    ways = "" if not corrections_rank(result) else ", with the corrections" if corrected else ", without the corrections"
    section: dict[str, Any] = {"title": TITLES.get(engine, engine) + ways, "command": None, "language": "", "notes": []}
    trouble = known_trouble(engine, result) or proved_trouble(engine, result)
    if verification is None:
        return section | {"status": trouble or "Not verified."}
    section |= {"status": status(verification), "notes": _notes(engine, verification) + [trouble] * bool(trouble)}
    runs = verification.outcome == "agrees" or (verification.outcome == "loads" and not trouble)
    command = launch_command(engine, result, name, corrected) if runs else None
    return section | ({"command": command[0], "language": command[1]} if command else {})


def known_trouble(engine: str, result: Result) -> str:
    """Why an engine cannot run this release rightly, as far as it was known when this version was written; "" where nothing is known."""
    if engine == "sglang" and any(e.scheme.startswith("nvfp4") and not e.scheme.endswith("w4a4") for e in result.errors):
        return NVFP4_SGLANG
    experts = [error for error in result.errors if ".".join(error.role.split(".")[-2:-1]) == "expert"]
    if engine == "transformers" and any(e.scheme.startswith("nvfp4") or e.scheme.endswith("asym") for e in experts):
        return EXPERTS_TRANSFORMERS
    return ""


def proved_trouble(engine: str, result: Result) -> str:
    """What an engine would do wrong with this release by its rules, as far as the record has a proof of it (see `qwench.loading`); "" where it has none, or a good one."""
    return next((trouble_of(proof) + "." for proof in result.load_proofs if proof.engine == engine and not proof.good), "")


def status(verification: Verification) -> str:
    """One line on what an engine did."""
    version, consumed = verification.version, f"{verification.consumed} tensors consumed"
    if verification.outcome == "agrees":
        numbers = [consumed]
        if verification.mean_kl is not None:
            numbers.append(
                f"mean KL to our own reading of the files {verification.mean_kl:.2g} nats over {verification.positions} positions"
            )
        if verification.tolerance_kl is not None:
            numbers.append(f"tolerance {verification.tolerance_kl:.2g}")
        return f"Verified with version {version}: {', '.join(numbers)}."
    if verification.outcome == "loads":
        return f"Version {version} loads the files ({consumed}); **its numbers are not proved**."
    if verification.outcome == "disagrees":
        return (
            f"Version {version} loads the files and **disagrees** with our own reading of them: do not use it for this release."
        )
    return f"Version {version} **failed** on this release."


def _notes(engine: str, verification: Verification) -> list[str]:
    notes = [_sentence(engine, note) for note in verification.notes if note]
    if verification.unconsumed:
        shown = ", ".join(f"`{tensor}`" for tensor in verification.unconsumed[:3])
        more = f" and {len(verification.unconsumed) - 3} more" if len(verification.unconsumed) > 3 else ""
        mtp = all(tensor.startswith("mtp.") for tensor in verification.unconsumed)
        why = " It drops the MTP head: no speculation there." if mtp and engine == "transformers" else ""
        notes.append(f"Not consumed: {shown}{more}.{why}")
    if verification.uninitialized:
        notes.append(f"**Left uninitialized: {len(verification.uninitialized)} parameters.**")
    if verification.speculation:
        notes.append(
            "Speculative decoding: " + ", ".join(f"{key} {value:g}" for key, value in verification.speculation.items()) + "."
        )
    return notes


def _sentence(engine: str, note: str) -> str:
    """A note with the engine's name as it is written, or a capital letter, in front."""
    named = note.startswith(f"{engine} ")
    begun = TITLES.get(engine, engine) + note[len(engine) :] if named else f"{note[:1].upper()}{note[1:]}"
    return f"{begun.rstrip('.')}."


def _has(result: Result, component: str) -> bool:
    return any(row.component == component and row.tensors for row in result.precision)
