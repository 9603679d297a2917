"""The record of a release: `result.json` in its folder. Cards, tables and plots are made from it and from nothing else.

What each field means stands under the field, what its numbers count beside it; docs/result.md and docs/result.schema.json are made from these texts.
"""

from __future__ import annotations

from qwench.result.changed import Distance, GraftFacts, PrunedLayer, PruningFacts
from qwench.result.loaded import LoadFinding, LoadProof, Verification
from qwench.result.made import CalibrationFacts, PrecisionRow, RunFacts, SourceFacts, TensorError
from qwench.result.measured import (
    Acceptance,
    AcceptanceCheck,
    Divergence,
    Evaluation,
    Figures,
    LayerDivergence,
    Speculation,
    TaskScore,
)
from qwench.result.record import Estimate, Record
from qwench.result.release import FILE_NAME, FORMAT, FileFact, Result, check_format, read_result, revise_result, write_result

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "Acceptance",
    "AcceptanceCheck",
    "CalibrationFacts",
    "Distance",
    "Divergence",
    "Estimate",
    "Evaluation",
    "Figures",
    "FileFact",
    "GraftFacts",
    "LayerDivergence",
    "LoadFinding",
    "LoadProof",
    "PrecisionRow",
    "PrunedLayer",
    "PruningFacts",
    "Record",
    "Result",
    "RunFacts",
    "SourceFacts",
    "Speculation",
    "TaskScore",
    "TensorError",
    "Verification",
    "check_format",
    "read_result",
    "revise_result",
    "write_result",
]
