"""The record of a release: `result.json` in its folder. Cards, tables and plots are made from it and from nothing else.

Sizes are bytes, times are seconds. A number is in here only if it was measured on this very release.
"""

from __future__ import annotations

from qwench.result.changed import Distance, GraftFacts, PrunedLayer, PruningFacts
from qwench.result.loaded import LoadFinding, LoadProof, Verification
from qwench.result.made import CalibrationFacts, PrecisionRow, RunFacts, SourceFacts, TensorError
from qwench.result.measured import Acceptance, AcceptanceCheck, Divergence, Evaluation, Speculation, TaskScore
from qwench.result.record import Estimate, Record
from qwench.result.release import FILE_NAME, FileFact, Result, read_result, revise_result, write_result

__all__ = [
    "FILE_NAME",
    "Acceptance",
    "AcceptanceCheck",
    "CalibrationFacts",
    "Distance",
    "Divergence",
    "Estimate",
    "Evaluation",
    "FileFact",
    "GraftFacts",
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
    "read_result",
    "revise_result",
    "write_result",
]
