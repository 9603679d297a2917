"""Does llama.cpp load each GGUF file of a release, all of it, and mean the same by it as we do?

Asked of every file that is a language model, in a process of its own:

1. Does it load, and is there no tensor that is unknown, missing, or of no use? (llama.cpp refuses the first two by itself.)
2. Do its log-probabilities agree with our own reading of the very file, decoded to float32? What is left then is how llama.cpp computes: it rounds activations
   to BF16 before BF16 matrices and to 8 bits before quantized ones.
3. Where the source is at hand and the file is unquantized: do they agree with those of transformers on the source? Nothing of ours is in that comparison.
4. Do its counters of drafts equal what our reading of the MTP head says it must draft for the text that llama.cpp wrote (see `evaluation.rounds`)? A file without a head
   is asked to draft with the draft file beside it, where there is one.
5. Does it write the same without speculation, and does an image through mmproj change what it says?

The tower's own numbers are not compared: nothing of ours runs a tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qwench.checkpoint.folder import read_config
from qwench.engines import ENGINES, Answer, Request
from qwench.errors import EngineError, suggestion, suggestion_beside
from qwench.evaluation.rounds import Counters, expected_counters
from qwench.formats.gguf_source import GgufSource
from qwench.formats.gguf_types import UNQUANTIZED
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.result import Verification
from qwench.steps.checks.verify import DOCUMENTS, FLOAT32_PARAMETERS, LENGTH, TOLERANCES, Comparison, compare, row_divergence
from qwench.steps.gguf.plan import IMPORTANCE
from qwench.stream.rows import held_out_rows, load_tokenizer

ENGINE = "llama.cpp"
GENERATED = 32
"""Tokens that are written after each row."""
DRAFTS = 2
ORIGINAL_TOLERANCES = {("float32", False): 1e-4, ("float32", True): 1e-3, ("bfloat16", False): 1e-3, ("bfloat16", True): 5e-3}
"""Mean KL in nats of llama.cpp on a BF16 file from transformers on the source, by what transformers computes in and whether there are experts."""
STRAY_DRAFTS = 0.05
"""Share of drafts by which counters may differ: near ties fall to either side, and quantized files round activations."""
BINDING = "log-probabilities of the rows come through llama.cpp's C interface: the package's own calls give those of generated tokens alone"


@dataclass(frozen=True)
class Original:
    """Transformers on the source: what it computed in, and what it answered."""

    dtype: str
    answer: Answer


def is_gguf(place: Path) -> bool:
    """Whether a release is made of GGUF files."""
    return place.suffix == ".gguf" or (place.is_dir() and any(place.glob("*.gguf")))


def verify_gguf(
    release: Path, only: str | None = None, source: Path | None = None, *, threads: int = 0, timeout: float = 3600.0
) -> list[Verification]:
    """Every language model of a release, or one file.

    Args:
        release: its folder, with config.json and the tokenizer; or one file in such a folder.
        only: the name of one file.
        source: the checkpoint that it was made from: unquantized files are held against transformers on it.
        threads: CPU threads of the engine; 0 for as many as torch uses here.
        timeout: seconds until the engine is given up, for each file.

    Raises:
        EngineError: llama.cpp is not installed, or died without an answer; no such file.
        CheckpointError: we cannot read a file ourselves.
    """
    files = files_to_verify(release, only)
    folder, threads = files[0].parent, threads or torch.get_num_threads()
    config = read_config(folder)
    rows = [[int(i) for i in row] for row in held_out_rows(folder, documents=DOCUMENTS, length=LENGTH).ids]
    sources = [GgufSource(file, config) for file in files]
    unquantized = any(set(opened.types.values()) <= set(UNQUANTIZED) for opened in sources)
    original = _original(source, rows, threads, timeout) if source is not None and unquantized else None
    return [_verify(opened, rows, original, threads, timeout) for opened in sources]


def files_to_verify(release: Path, only: str | None = None) -> list[Path]:
    """The language models of a release. Raises EngineError where there are none, or none of that name."""
    if release.suffix == ".gguf":
        if not release.is_file():
            raise EngineError(
                f"there is no file {release}{suggestion_beside(release)}", "give a GGUF file, or the folder of a release"
            )
        return [release]
    every = sorted(release.glob("*.gguf"))
    models = [p for p in every if not p.name.startswith(("mmproj", "mtp-")) and p.name != IMPORTANCE]
    if not models:
        raise EngineError(
            f"{release} holds no GGUF file of a language model, which is all that llama.cpp reads",
            "verify it with --engine transformers or vllm, or make GGUF files of its source: qwench run gguf",
        )
    if only is None:
        return models
    if chosen := [p for p in models if p.name == only]:
        return chosen
    raise EngineError(
        f"{release} holds no language model {only!r}{suggestion(only, [p.name for p in models])}",
        f"use one of {', '.join(p.name for p in models)}; mmproj and mtp- files are verified together with these",
    )


def refuse_other_engines(release: Path, engine: str) -> None:
    """Raise EngineError where a GGUF release meets an engine of safetensors folders."""
    if engine != ENGINE:
        raise EngineError(
            f"{release} is a GGUF release, and {engine} is asked to read it", f"leave --engine out, or give --engine {ENGINE}"
        )


def refuse_gguf_questions(release: Path, engine: str | None, file: str | None, against: str | None) -> None:
    """Raise EngineError where a folder of safetensors is asked what only GGUF releases can answer."""
    if engine == ENGINE:
        files_to_verify(release)
    for option, given in (("--file", file), ("--against", against)):
        if given is not None:
            raise EngineError(f"{option} {given} is for GGUF releases, and {release} is none", f"leave {option} out")


def _original(source: Path, rows: list[list[int]], threads: int, timeout: float) -> Original:
    """Transformers on the source, in float32 where that is feasible. Raises EngineError where it refuses."""
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    dtype = "float32" if size <= 2 * FLOAT32_PARAMETERS else "bfloat16"
    request = Request(source.resolve(), rows, generate=1, dtype=dtype, image=False, threads=threads, timeout=timeout)
    answer = ENGINES["transformers"](request)
    if answer.refused:
        raise EngineError(f"transformers refused {source}: {answer.refused}", "leave --against out, or mend the source")
    return Original(dtype, answer)


def _verify(source: GgufSource, rows: list[list[int]], original: Original | None, threads: int, timeout: float) -> Verification:
    tower = any(source.folder.glob("mmproj*.gguf"))
    request = Request(
        source.file.resolve(), rows, generate=GENERATED, image=tower, speculate=DRAFTS, threads=threads, timeout=timeout
    )
    answer = ENGINES[ENGINE](request)
    if answer.refused:
        return _failed(source, answer)
    trunk = Trunk(source, source.map)
    compared = compare(trunk, rows, answer)
    expected = _expected(source, trunk, rows, answer)
    trunk.free()
    return _judged(source, answer, compared, expected, original if _unquantized(source) else None)


def _unquantized(source: GgufSource) -> bool:
    return set(source.types.values()) <= set(UNQUANTIZED)


def _expected(source: GgufSource, trunk: Trunk, rows: list[list[int]], answer: Answer) -> Counters | None:
    """What our reading says of the drafts; None where there were none."""
    if answer.speculation is None:
        return None
    head = source if source.map.has_mtp else None
    if head is None:
        beside = source.file.with_name(f"mtp-{source.file.name.replace('-trunk-', '-')}")
        head = GgufSource(beside, read_config(source.folder), content="mtp")
    return expected_counters(trunk, MtpHead(head, head.map), rows, answer.speculation["written"], DRAFTS)


def _failed(source: GgufSource, answer: Answer) -> Verification:
    return Verification(
        engine=ENGINE, file=source.file.name, version=answer.version, outcome="failed", consumed=len(answer.consumed),
        notes=[f"llama.cpp refused: {answer.refused}"],
    )  # fmt: skip


def _judged(
    source: GgufSource, answer: Answer, compared: Comparison, expected: Counters | None, original: Original | None
) -> Verification:
    experts = any(slot.expert is not None for slot in source.map.slots())
    wide = set(source.types.values()) == {"F32"}
    tolerance = TOLERANCES["float32" if wide else "bfloat16", experts]
    from_original = _from_original(original, answer) if original else None
    limit = ORIGINAL_TOLERANCES[original.dtype, experts] if original else None
    agree = [
        compared.mean_kl <= tolerance,  # NaN is not agreement
        from_original is None or limit is None or from_original <= limit,
        expected is None or answer.speculation is None or counters_agree(expected, answer.speculation),
        answer.image is None or bool(answer.image["differs"]),
    ]
    return Verification(
        engine=ENGINE,
        file=source.file.name,
        version=answer.version,
        outcome="failed" if answer.ignored else "agrees" if all(agree) else "disagrees",
        consumed=len(answer.consumed),
        unconsumed=list(answer.ignored),
        positions=compared.positions,
        mean_kl=compared.mean_kl,
        max_abs_logprob=compared.max_abs_logprob,
        tolerance_kl=tolerance,
        original_kl=from_original,
        original_tolerance_kl=limit,
        generated=str(load_tokenizer(source.folder).decode(answer.generated)),
        image=_image(answer),
        speculation=_counted(answer, expected),
        notes=_notes(source, answer, expected, original),
    )


def _from_original(original: Original, answer: Answer) -> float:
    """Mean KL(transformers on the source || llama.cpp) over all positions."""
    pairs = zip(original.answer.logprobs, answer.logprobs, strict=True)
    found = [row_divergence(torch.from_numpy(theirs), tokens, ours)[0] for (_, theirs), (tokens, ours) in pairs]
    return float(np.concatenate(found).mean())


def counters_agree(expected: Counters, counted: dict[str, object]) -> bool:
    """Whether an engine's counters are those that our reading of the head predicts."""
    stray = max(2, round(STRAY_DRAFTS * expected.drafted))
    return all(
        abs(int(str(counted[name])) - ours) <= stray
        for name, ours in (("drafted", expected.drafted), ("accepted", expected.accepted))
    )


def _image(answer: Answer) -> str | None:
    if answer.image is None:
        return None
    what = "changes what it says" if answer.image["differs"] else "changes NOTHING: the tower is not heard"
    return f"an image is {answer.image['tokens']} tokens through mmproj; another image {what}"


def _counted(answer: Answer, expected: Counters | None) -> dict[str, float] | None:
    if answer.speculation is None:
        return None
    counted = answer.speculation
    found = {name: float(counted[name]) for name in ("drafts", "drafted", "accepted")}
    found |= {f"accepted at {i}": float(n) for i, n in enumerate(counted["accepted_by_position"], start=1)}
    if expected is not None:
        found |= {
            "ours drafts": float(expected.rounds),
            "ours drafted": float(expected.drafted),
            "ours accepted": float(expected.accepted),
        }
        found |= {f"ours accepted at {i}": float(n) for i, n in enumerate(expected.by_position, start=1)}
    return found


def _notes(source: GgufSource, answer: Answer, expected: Counters | None, original: Original | None) -> list[str]:
    notes = []
    if answer.ignored:
        notes.append(f"{len(answer.ignored)} tensors are of no use to llama.cpp: {', '.join(list(answer.ignored)[:4])}")
    if answer.speculation is not None:
        same = answer.speculation["written"][0] == answer.generated
        notes.append(
            f"without speculation it writes {'the same' if same else 'ANOTHER text (rounding decides near ties: see the KL)'}"
        )
        if not source.map.has_mtp:
            notes.append("drafted with the draft file beside it")
    elif source.map.has_mtp:
        notes.append("it has a head and llama.cpp did not draft")
    if expected is not None and answer.speculation is not None and not counters_agree(expected, answer.speculation):
        notes.append("its counters of drafts are not those that our reading of the head predicts for the same text")
    if original is not None:
        notes.append(f"transformers computed the source in {original.dtype}")
    return [*notes, *answer.notes, BINDING]
