"""The acceptance gate: a run does not finish a release whose MTP head died on the way.

Heads die unnoticed: a norm without its offset, a tensor that a loader skips, a head that another trunk was trained with. Nothing fails, text comes out as before, and every draft is
rejected. So the finished bytes are read back as a reader would, and the share of drafts that the trunk accepts at position 1 is held against that of the checkpoint that they were made from, on the
same held-out rows, before the folder gets its name.

It costs one pass of some rows (8 of 256 tokens) through each network, block by block, in float32: one decoder layer and the head are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from qwench.checkpoint.folder import take_inventory
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import TensorSource
from qwench.checkpoint.writer import CheckpointWriter
from qwench.errors import CheckpointError, TextError, VerificationError
from qwench.evaluation.lockstep import check_finite
from qwench.formats.release import Release
from qwench.models import ModelMap, map_of
from qwench.models.place import CPU, Place
from qwench.models.run import Trunk
from qwench.recipe import AcceptanceGate
from qwench.result import Acceptance, AcceptanceCheck
from qwench.steps.measures.evaluate import measured_acceptance
from qwench.stream.rows import Rows, held_out_rows

Tell = Callable[[int, int, str], None]
"""Progress: layers done, layers, what."""


class Memory(Protocol):
    """What outlives a stopped run: a writer's remarks."""

    @property
    def remarks(self) -> Mapping[str, dict[str, Any]]: ...

    def remark(self, key: str, data: dict[str, Any]) -> None: ...


MEASURED = "acceptance "
"""What the keys of remarks about acceptance begin with."""


def gate_rows(gate: AcceptanceGate, folder: Path, map: ModelMap) -> Rows | str:
    """Held-out rows in the tokens of the checkpoint in `folder`, or why there are none."""
    if len(map.mtp) != 1:
        return f"the MTP head has {len(map.mtp)} layers, one can be run"
    try:
        rows = held_out_rows(folder, gate.documents, gate.length)
    except (CheckpointError, TextError) as error:
        return error.what
    vocabulary = map.other("embed").shape[0]
    if int(rows.ids.max()) >= vocabulary:
        return f"the tokenizer knows token {int(rows.ids.max())}, the embedding has {vocabulary} rows"
    return rows


@torch.no_grad()
def acceptance_of(source: TensorSource, rows: Rows, tell: Tell | None = None, place: Place = CPU) -> Acceptance | None:
    """What its own trunk accepts of a checkpoint's MTP head, teacher-forced (see `evaluation.acceptance`); None where it has no head.

    Args:
        source: a checkpoint, a release, a GGUF file.
        rows: in its tokens.
        tell: called after every decoder layer.
        place: where it is run; in float32 there, whatever it says.

    Raises:
        CheckpointError: the source cannot be read, or its hidden states are not finite.
        TextError: fewer than 2 rows.
    """
    map = map_of(source)
    if not map.has_mtp:
        return None
    trunk, name, layers = Trunk(source, map, place.exact.dtype, place.device), str(source.folder), len(map.blocks)
    hidden = trunk.embed(rows.ids)
    for index in range(layers):
        hidden = trunk.run_block(index, hidden)
        check_finite(hidden, name, f"decoder layer {index}")
        if tell:
            tell(index + 1, layers, "acceptance")
    normed = trunk.norm(hidden)
    greedy = torch.stack([trunk.greedy(row) for row in normed])
    return measured_acceptance(trunk, normed, greedy, rows.ids)


def measure_acceptance(
    source: TensorSource | Acceptance, release: TensorSource, rows: Rows, floor: float, tell: Tell | None = None
) -> AcceptanceCheck:
    """Source and release on the same rows; hand it to `check_gate`.

    Args:
        source: what the release was made from, or what was measured of it already.

    Raises: as `acceptance_of`.
    """
    before = source if isinstance(source, Acceptance) else acceptance_of(source, rows, tell)
    return measured_check(floor, rows, before, acceptance_of(release, rows, tell))


def measured_check(floor: float, rows: Rows, source: Acceptance | None, release: Acceptance | None) -> AcceptanceCheck:
    """The record of what was measured."""
    return AcceptanceCheck(
        floor=floor,
        source=source,
        release=release,
        text=rows.text,
        ids_sha256=rows.ids_sha256,
        documents=len(rows.ids),
        length=rows.length,
    )


def check_gate(
    check: AcceptanceCheck, accept_any: bool = False, sides: tuple[str, str] = ("the source", "the release")
) -> AcceptanceCheck:
    """The same, marked where it fell under the floor and that was allowed; `sides` is what the two are called in the error.

    Raises:
        VerificationError: it fell under the floor, and that was not allowed.
    """
    if not fell(check):
        return check
    if accept_any:
        return check.model_copy(update={"overridden": True})
    assert check.source
    before, after = first_position(check.source), first_position(check.release)
    raise VerificationError(
        f"at draft position 1 {sides[1]} accepts {after:.1%} of the MTP head's drafts, {sides[0]} {before:.1%}, on the same {check.documents} rows of "
        f"{check.length} tokens; the recipe asks for {check.floor:.0%} of that, {check.floor * before:.1%}",
        "change the recipe (leave mtp.* unquantized, quantize less of the trunk, take another donor), or finish it as it is with --accept-any: "
        "what is written is kept for that",
    )


def fell(check: AcceptanceCheck) -> bool:
    """Whether the release is under the floor. A release without a head is, where its source has one."""
    return check.source is not None and not first_position(check.release) >= check.floor * first_position(check.source)


def first_position(found: Acceptance | None) -> float:
    """Acceptance at draft position 1."""
    return found.by_position[0].mean if found else 0.0


def remembered(memory: Memory, key: str, measure: Callable[[], Acceptance | None]) -> Acceptance | None:
    """What an earlier, unfinished run of the same release measured, or what is measured now."""
    if (data := memory.remarks.get(MEASURED + key)) is None:
        found = measure()
        data = {"measured": found.model_dump() if found else None}
        memory.remark(MEASURED + key, data)
    return Acceptance.model_validate(data["measured"]) if data["measured"] else None


def unfinished_release(writer: CheckpointWriter, config: dict[str, Any]) -> TensorSource:
    """The finished bytes of a release that has no name yet, as a reader will see them. Raises CheckpointError."""
    stored = Checkpoint(writer.staged, config, take_inventory(writer.staged))
    return Release(stored) if config.get("quantization_config") else stored
