"""How a run ends: what was made, where it lies, how good it is, how to serve it. At most 80 columns wide, and plain lines where nobody looks at a terminal.

    nvfp4a16 of demo:dense

      what      NVFP4 weights by rounding for attention and MLPs (experts too) ...
      size      15.9 MB (15.2 MiB) became 10.4 MB (9.9 MiB), 65%
      where     first
      ...

    serve it
      vllm serve first --dtype bfloat16 ...

Only commands may be wider, where a path is long: they are there to be copied.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from rich.text import Text

from qwench.cli.app import quoted
from qwench.display import out, size
from qwench.errors import UserError
from qwench.models.place import gpu_memory
from qwench.result import AcceptanceCheck, Evaluation, FileFact, PruningFacts, Result
from qwench.steps.publishing.launch import shell
from qwench.steps.publishing.serve import serving

WIDTH = 80
LABEL = 10
Line = tuple[str, str]
"""What it is about, and what is said. Lines of one subject follow each other, and name it once."""


def show_ending(result: Result, folder: Path, model: str) -> None:
    """The short table at the end of a run.

    Args:
        model: the source, as it was named on the command line.
    """
    out.print(Text(f"{result.recipe['name']} of {result.source.name}", style="bold"))
    out.print()
    said = ""
    for subject, text in lines(result, folder, model):
        for number, part in enumerate(_wrapped(text)):
            label = subject if number == 0 and subject != said else ""
            out.print(Text(f"  {label:<{LABEL}}", style="dim").append(Text(part, style="not dim")))
        said = subject
    out.print()
    for line in serving_lines(folder):
        out.print(line)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - LABEL - 2, break_long_words=False, break_on_hyphens=False, drop_whitespace=True)


def lines(result: Result, folder: Path, model: str) -> Iterator[Line]:
    """What there is to say."""
    yield "what", result.recipe.get("about") or "your recipe"
    if result.pruning:
        yield "experts", _pruned(result.pruning)
    became = size(result.bytes) + (f" in {len(result.files)} files" if len(result.files) > 1 else "")
    share = "" if _is_gguf(result) else f", {result.bytes / result.source.bytes:.0%}"
    yield "size", f"{size(result.source.bytes)} became {became}{share}"
    yield "where", str(folder)
    yield from (("files", _file(fact)) for fact in result.files if _is_gguf(result))
    yield from _head(result)
    yield from _quality(result, folder, model)
    yield from _readers(result, folder)
    gpu = f", {size(result.run.peak_vram)} on {result.run.device}" if result.run.peak_vram else ""
    yield "took", f"{result.run.seconds:.1f} s, peak memory {size(result.run.peak_rss)}{gpu}"
    yield "card", f"qwench card {quoted(folder)}"


def _is_gguf(result: Result) -> bool:
    return not result.precision


def _file(fact: FileFact) -> str:
    bits = f", {fact.bits_per_weight:.2f} bits a weight" if fact.bits_per_weight else ""
    return f"{fact.name}: {size(fact.bytes)}{bits}"


def _pruned(facts: PruningFacts) -> str:
    kept = fmean(layer.contribution_kept for layer in facts.layers)
    return f"{facts.before} became {facts.after} in each layer, ranked by {facts.criterion}; those that stay did {kept:.0%} of the work"


def _head(result: Result) -> Iterator[Line]:
    """What became of the MTP head."""
    if graft := result.graft:
        yield "MTP head", f"grafted {' and '.join(graft.components)} from {graft.donor}: {graft.tensors} tensors"
        if graft.acceptance_source:
            own = graft.acceptance_donor
            beside = f", on its own trunk {own.by_position[0].mean:.1%}" if own else ""
            yield (
                "MTP head",
                f"on this trunk {graft.acceptance_source.by_position[0].mean:.1%} of its first drafts are accepted{beside}",
            )
        yield from (("MTP head", f"note: {note}") for note in graft.notes)
    checks = {fact.file_type or fact.name: fact.acceptance for fact in result.files if fact.acceptance}
    if checks:
        yield from (("MTP head", f"{name}: {_accepted(check)}") for name, check in checks.items())
    elif result.acceptance:
        yield "MTP head", _accepted(result.acceptance)
    elif "mtp" in result.recipe["steps"][-1].get("export", {}).get("drop", ()):
        yield "MTP head", "left out, as the recipe says"


def _accepted(check: AcceptanceCheck) -> str:
    if check.source is None:
        return check.not_measured or "not measured"
    before, after = (side.by_position[0].mean if side and side.by_position else 0.0 for side in (check.source, check.release))
    said = f"{after:.1%} of its first drafts accepted, {before:.1%} before"
    return said + (f"; that is under the recipe's floor of {check.floor:.0%}" if check.overridden else "")


def _quality(result: Result, folder: Path, model: str) -> Iterator[Line]:
    """KL where it was measured, else what measures it."""
    by_file = {fact.file_type or fact.name: fact.evaluation for fact in result.files if fact.evaluation}
    if result.evaluation:
        yield "KL", _measured(result.evaluation)
    elif by_file:
        yield from (("KL", f"{name}: {_measured(found)}") for name, found in by_file.items())
    else:
        yield "KL", f"not measured yet: qwench eval {quoted(folder)} --against {quoted(model)}"


def _measured(found: Evaluation) -> str:
    mean = found.divergence.mean
    return f"{mean.mean:.5f} ± {mean.standard_error:.5f} nats a token, top-1 {found.top1_agreement.mean:.1%}"


def _readers(result: Result, folder: Path) -> Iterator[Line]:
    """Who would load it, by the rules of loading; who did not is named with what tells why."""
    if good := [f"{proof.engine} {proof.version}" for proof in result.load_proofs if proof.good]:
        yield "loads in", f"{', '.join(good)}, by their rules"
    if bad := [f"{proof.engine} {proof.version}" for proof in result.load_proofs if not proof.good]:
        yield "loads in", f"not in {', '.join(bad)}: qwench doctor {quoted(folder)} says why"


def serving_lines(folder: Path) -> Iterator[str | Text]:
    """The command for the engine that the release is meant for; why there is none, where there is none."""
    try:
        found = serving(folder, memory=gpu_memory())
    except UserError as error:
        yield f"serve it: {error.what}"
        return
    yield Text("serve it", style="bold")
    yield from (f"  {line}" for line in shell(found.words, WIDTH - 6).splitlines())
