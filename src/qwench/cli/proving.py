"""What follows a run where the whole job is wanted (`qwench run --measure`, `qwench demo`): verify in an engine, measure against the source, write the card."""

from __future__ import annotations

from pathlib import Path

from qwench import display
from qwench.errors import EngineError, VerificationError
from qwench.measuring import evaluate_gguf_release, evaluate_release, verify_gguf_release, verify_release
from qwench.models.place import CPU, Place, memory_is_told
from qwench.result import Verification
from qwench.steps.cards.card import write_card
from qwench.steps.checks.natural import natural_engine
from qwench.steps.gguf.verify import is_gguf


def measure_and_card(release: Path, model: str, place: Place = CPU, show: bool = True) -> None:
    """All three, shown as they come if they are to be. An engine that is not installed is told and leaves the card without its line; what was measured stays in any case.

    Raises:
        VerificationError: at the end, where the engine did not read the release as we do.
    """
    every = _verified(release)
    for found in every if show else ():
        display.show_verification(found)
    _evaluate(release, model, place, show)
    card = write_card(release)
    if show:
        display.out.print(f"card: {card}\n", markup=False)
    for found in (found for found in every if found.outcome not in {"agrees", "loads"}):
        raise VerificationError(
            f"{found.engine} {found.outcome} on {found.file or release}", "; ".join(found.notes) or "see the table above"
        )


def _verified(release: Path) -> list[Verification]:
    engine = natural_engine(release)
    try:
        return verify_gguf_release(release, engine, None, None) if is_gguf(release) else [verify_release(release, engine)]
    except EngineError as error:
        display.err.print(f"note: not verified: {error}", markup=False)
        return []


def _evaluate(release: Path, model: str, place: Place, show: bool) -> None:
    with display.progress("evaluation", unit="blocks") as report, memory_is_told(place):
        if is_gguf(release):
            by_file = evaluate_gguf_release(release, model, report=report, place=place)
        else:
            measured = evaluate_release(release, model, report=report, place=place)
    if show:
        display.show_ladder(by_file) if is_gguf(release) else display.show_evaluation(measured)
