"""What the acceptance gate holds while it measures, from names and shapes alone. (The gate itself needs the transformers classes: seconds that a plan need not wait for.)"""

from __future__ import annotations

import math

from qwench.checkpoint.source import TensorSource
from qwench.models.map import ModelMap
from qwench.recipe import AcceptanceGate, Recipe

FLOAT32 = 4
HEAD_ROWS = 16_384
"""Rows of the head that are converted at once: `models.run.VOCABULARY_ROWS`, which a test holds this to."""
SLACK = 1.15
"""What is on its way between two places, and what the allocator keeps: measured on wide random checkpoints (589 MiB where the sum says 560, 849 where it says 770)."""


def gate_memory(recipe: Recipe, source: TensorSource, map: ModelMap, changed: bool) -> int:
    """Bytes above the interpreter's own while the MTP head is measured; 0 where it is not.

    The largest layer in float32, the head as it is stored and a part of it in float32, and the rows before and behind a layer with its widest activation.
    """
    gate = recipe.acceptance
    if not isinstance(gate, AcceptanceGate) or not map.has_mtp or not (changed or recipe.graft):
        return 0
    layer = max(sum(math.prod(slot.shape) for slot in block.slots) for block in (*map.blocks, *map.mtp))
    embed = map.other("embed")
    head = source.tensors[(embed if map.tied else map.other("head")).tensor].nbytes
    wide = max(slot.shape[0] for block in map.blocks for slot in block.slots if slot.linear)
    numbers = (
        layer + min(HEAD_ROWS, embed.shape[0]) * embed.shape[1] + gate.documents * gate.length * 2 * (embed.shape[1] + wide)
    )
    return int(SLACK * (head + FLOAT32 * numbers))
