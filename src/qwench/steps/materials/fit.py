"""How well a graft fits where it went: what can be compared without running anything, and the acceptance of the head on its new trunk against that on its own.

A head was trained on its own trunk's hidden states, embedding and lm_head. A fine-tune moves all three a little; how far the matrices moved is stated as the relative root mean
square of the difference, over all rows where that is cheap and over evenly spaced ones where it is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from qwench.checkpoint.hub import Located
from qwench.checkpoint.source import StoredSource, TensorSource
from qwench.errors import CheckpointError, TextError
from qwench.models import survey
from qwench.models.components import component_names
from qwench.models.map import Slot
from qwench.models.weights import read_rows
from qwench.recipe import Graft
from qwench.result import Acceptance, Distance, GraftFacts
from qwench.stream.rows import TOKENIZER_FILES, load_tokenizer

WHOLE_BYTES = 64 * 2**20
"""A matrix of so many bytes is compared whole."""
SAMPLED_ROWS = 4096
SHOWN_IDS = 20

Vocabulary = dict[str, int]


def graft_facts(trunk: StoredSource, donor: StoredSource, located: Located, settings: Graft) -> GraftFacts:
    """Everything about a graft that needs no rows; acceptance is added by whoever measures it.

    Args:
        trunk: the checkpoint before the graft.
        located: what the donor is called.

    Raises:
        CheckpointError: a file changed under us.
    """
    names = [name for component in settings.components for name in component_names(donor.tensors, component)]
    facts = GraftFacts(
        donor=located.name,
        revision=located.revision,
        components=list(settings.components),
        tensors=len(names),
        bytes=sum(donor.tensors[name].nbytes for name in names),
    )
    if "mtp" in settings.components:
        facts.embedding, facts.head = (distance(trunk, donor, role) for role in ("embed", "head"))
        if facts.embedding is None:
            facts.notes.append("the donor's embedding was not at hand: how far the trunk has moved from it is not known")
    _compare_tokens(trunk.folder, donor.folder, facts)
    return facts


def distance(trunk: TensorSource, donor: TensorSource, role: str) -> Distance | None:
    """How far the trunk's matrix of a role (`embed`, `head`) is from the donor's, over the rows that both have; None where either is not at hand."""
    slots = _slot(trunk, role), _slot(donor, role)
    if slots[0] is None or slots[1] is None or slots[0].shape[1] != slots[1].shape[1]:
        return None
    count = min(slots[0].shape[0], slots[1].shape[0])
    whole = trunk.tensors[slots[0].tensor].nbytes <= WHOLE_BYTES
    rows = torch.arange(count) if whole else torch.linspace(0, count - 1, min(count, SAMPLED_ROWS)).long()
    ours, theirs = (read_rows(s, slot, rows, torch.float64) for s, slot in ((trunk, slots[0]), (donor, slots[1])))
    size = float(theirs.square().sum())
    moved = float((ours - theirs).square().sum())
    relative = (moved / size) ** 0.5 if size else (0.0 if not moved else float("inf"))
    return Distance(relative_rms=relative, rows=len(rows), of_rows=count)


def donor_acceptance(donor: StoredSource, facts: GraftFacts, measure: Callable[[], Acceptance | None]) -> Acceptance | None:
    """The head on its own trunk, or a note on why nobody knows. `measure` runs the donor on rows in the trunk's tokens."""
    if survey(donor).complaints:
        facts.notes.append(
            "only the grafted part of the donor was at hand: the head's acceptance on its own trunk was not measured"
        )
        return None
    if facts.differing_tokens:
        facts.notes.append(
            f"acceptance on the donor's trunk is on the source's token ids, of which {facts.differing_tokens} mean something else there"
        )
    try:
        return measure()
    except (CheckpointError, TextError) as error:
        facts.notes.append(f"acceptance on the donor's trunk was not measured: {error.what}")
        return None


def _slot(source: TensorSource, role: str) -> Slot | None:
    try:
        return survey(source).map.other(role)
    except KeyError:
        return None


def _compare_tokens(ours: Path, theirs: Path, facts: GraftFacts) -> None:
    vocabularies = _vocabulary(ours), _vocabulary(theirs)
    if vocabularies[0] is None or vocabularies[1] is None:
        facts.notes.append(
            "the tokenizers were not compared: "
            + ("the source's" if vocabularies[0] is None else "the donor's")
            + " is not at hand"
        )
        return
    changed = set(vocabularies[0].items()) ^ set(vocabularies[1].items())
    facts.vocabulary_sha256 = (_digest(vocabularies[0]), _digest(vocabularies[1]))
    facts.differing_tokens = len({token for token, _ in changed})
    facts.differing_ids = sorted({number for _, number in changed})[:SHOWN_IDS]
    if changed:
        shown = ", ".join(map(str, facts.differing_ids))
        facts.notes.append(f"{facts.differing_tokens} tokens have another id in the donor's tokenizer, or none; ids {shown}")


def _vocabulary(folder: Path) -> Vocabulary | None:
    """All tokens and their ids; None where the folder holds no tokenizer that can be read: it plays no part in the graft itself."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        found: Vocabulary = load_tokenizer(folder).get_vocab()
    except CheckpointError:
        return None
    return found


def _digest(vocabulary: Vocabulary) -> str:
    """SHA-256 of all tokens in order of their ids, each with its id."""
    text = "\n".join(f"{number} {token}" for token, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256(text.encode()).hexdigest()
