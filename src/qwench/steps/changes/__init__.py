"""The calibrated steps as changes of a walk: what a step of a recipe does to one layer in memory.

Each is handed the layer and the rows before it (`stream.walk.Change`), calls a method that knows nothing of either, and puts down what it found.
"""

from qwench.steps.changes.activations import ActivationRanges
from qwench.steps.changes.pruning import Pruning
from qwench.steps.changes.rounding import Rounding
from qwench.steps.changes.smoothing import Smoothing
from qwench.steps.changes.tuning import Tuning

__all__ = ["ActivationRanges", "Pruning", "Rounding", "Smoothing", "Tuning"]
