"""Every error that Qwench raises on purpose, as one tree.

    QwenchError
    |-- UserError            the user can mend it: exit code 2, one message, no traceback
    |   |-- CheckpointError      a file or tensor is missing, corrupt, of the wrong shape or dtype
    |   |-- RecipeError          a recipe says something that cannot be meant
    |   |-- PlanError            recipe and checkpoint do not fit together: carries every complaint at once
    |   |-- TextError            text for evaluation or calibration that is missing, unreadable or too short
    |   |-- OutputError          the output folder or the disk
    |   |-- EngineError          an engine is absent, or refused the file
    |   `-- VerificationError    an engine ran and disagreed, or a gate was missed
    `-- Interrupted          Ctrl-C: what was finished is kept for the next run

Anything else that escapes is our fault (exit code 1). `assert` is for what only we can break.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class QwenchError(Exception):
    """Root of the tree."""


class UserError(QwenchError):
    """Something that the user can mend.

    Args:
        what: what is wrong, naming the tensor, the file and the numbers.
        mend: what to do about it.
    """

    def __init__(self, what: str, mend: str = "") -> None:
        self.what, self.mend = what, mend
        super().__init__(f"{what}\n  mend: {mend}" if mend else what)


class CheckpointError(UserError):
    """A checkpoint that cannot be read as what it claims to be."""


class RecipeError(UserError):
    """A recipe that cannot be understood."""


class PlanError(UserError):
    """Recipe and checkpoint do not fit together.

    Args:
        complaints: every complaint, as (what, mend) pairs, so that one run shows them all.
    """

    def __init__(self, complaints: Sequence[tuple[str, str]]) -> None:
        assert complaints
        self.complaints = list(complaints)
        lines = [f"{what}\n  mend: {mend}" if mend else what for what, mend in complaints]
        super().__init__("\n".join(lines))


class TextError(UserError):
    """Text that rows of tokens should come from."""


class OutputError(UserError):
    """The place where the result should go."""


class EngineError(UserError):
    """An engine that is absent or refuses a file."""


class VerificationError(UserError):
    """An engine that loads a file and disagrees with it, or a gate that a release missed."""


class Interrupted(QwenchError):
    """The user stopped the run."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'X'?)` with the nearest of the known names, whatever the case of its letters; nothing where none is near."""
    by_fold = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), by_fold, n=1)
    return f" (did you mean {by_fold[near[0]]!r}?)" if near else ""


def suggestion_beside(path: Path) -> str:
    """The same for a file or folder that is not there: the nearest name in the folder where it should be."""
    try:
        return suggestion(path.name, [other.name for other in path.expanduser().parent.iterdir()])
    except OSError:
        return ""
