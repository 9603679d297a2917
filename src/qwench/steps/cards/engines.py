"""What a card says about running a release: a launch command for each engine that loaded it, an honest line for each that did not or was not asked.

`agrees` and `loads` get a command; `loads` also says that the numbers were not proved. `disagrees` and `failed` get none, nor does an engine that nobody ran.
"""

from __future__ import annotations

from typing import Any

from qwench.result import Result, Verification
from qwench.steps.planning.readers import trouble_of
from qwench.steps.publishing.launch import Launch, arguments, shell

TITLES = {"vllm": "vLLM", "transformers": "Transformers", "sglang": "SGLang"}
"""Engines that every card speaks of, in this order."""

NVFP4_SGLANG = (
    "SGLang has no loader for NVFP4 weight-only (sglang #40022, as of September 2026): this release does not run there."
)
EXPERTS_TRANSFORMERS = (
    "Transformers 5.23 reads such experts wrongly, and says nothing: it drops the global scale of NVFP4 and the zero points of asymmetric integers. "
    "Do not use it for this release."
)

TRANSFORMERS = """\
import torch
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", dtype=torch.bfloat16, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
messages = [{{"role": "user", "content": "What does a quantized model trade away?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))"""


def engine_sections(result: Result, name: str) -> list[dict[str, Any]]:
    """For each engine: title, status, notes, command (None where it gets none), language of the command.

    Args:
        result: the record of the release.
        name: what a launch command calls the release.
    """
    latest = {verification.engine: verification for verification in result.verifications}
    engines = [*TITLES, *sorted(set(latest) - set(TITLES))]
    return [_section(engine, latest.get(engine), result, name) for engine in engines]


def launch_command(engine: str, result: Result, name: str) -> tuple[str, str] | None:
    """(command, its language) that starts an engine on this release; None for an engine that we know none for."""
    if engine in ("vllm", "sglang"):
        return shell(arguments(engine, Launch(name, mtp=_has(result, "mtp")))), "bash"
    if engine == "transformers":
        auto = "AutoModelForImageTextToText" if _has(result, "vision") else "AutoModelForCausalLM"
        return TRANSFORMERS.format(auto=auto, name=name), "python"
    return None


def _section(engine: str, verification: Verification | None, result: Result, name: str) -> dict[str, Any]:
    section: dict[str, Any] = {"title": TITLES.get(engine, engine), "command": None, "language": "", "notes": []}
    trouble = known_trouble(engine, result) or proved_trouble(engine, result)
    if verification is None:
        return section | {"status": trouble or "Not verified."}
    section |= {"status": status(verification), "notes": _notes(engine, verification) + [trouble] * bool(trouble)}
    runs = verification.outcome == "agrees" or (verification.outcome == "loads" and not trouble)
    command = launch_command(engine, result, name) if runs else None
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
    notes = [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in verification.notes if note]
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


def _has(result: Result, component: str) -> bool:
    return any(row.component == component and row.tensors for row in result.precision)
