"""What a calibrated walk holds at its worst, above the interpreter and its libraries, from names and shapes alone; `benchmarks.walk_memory` holds it against what runs take.

One decoder layer is in memory, in float32 as a processor computes. Beside it, one after the other: what rows make on their way through it, and what the method holds while it works on the layer.
Rows themselves lie on the disk.

Letters in names: I input channels, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from qwench.checkpoint.source import BYTES_OF, TensorSource
from qwench.models.map import Block, ModelMap, Slot
from qwench.models.pruned import Pruned
from qwench.numerics.scheme import Scheme
from qwench.recipe import Recipe

FLOAT = 4
BATCH = 4
"""Rows that go through a layer at once: `steps.calibrate.calibrate`'s default, which a test holds this to."""
WIDTHS = 5
"""Activations that a pass holds at once, in units of the widest output of a linear module: those of a Gated DeltaNet, worked out in plain PyTorch, decide."""
FACTOR = 20
"""Bytes for each number of a second moment while it is factored: in float64, twice, and once more in float32."""
TUNED = 15
"""Bytes for each weight that AutoRound tunes, beside the layer: the original, the offset and the gradient in float32; codes of the start, of the best, and of a judgement."""
BACKWARD = 2 * 2**30
"""Bytes that may be held for the backward pass: `steps.changes.tuning.ACTIVATIONS`, which a test holds this to."""
KEPT_WIDTHS = 15
"""Of a row that is tuned on, what autograd keeps, in units of the widest output."""
SEARCHED = 16_384
"""Tokens that a search of scales looks at: `steps.changes.judges.SEARCH_TOKENS`, which a test holds this to."""
SEARCH_COPIES = 6
"""Of what a norm's readers read: as it was captured, joined, as the judge's wanted output, its output for one scale, and what becomes of both."""
ADDED = 2 * 2**30
"""Bytes that a repair keeps of what experts read and add: `steps.changes.repair.BYTES`, which a test holds this to; twice while they are joined."""


def walk_memory(recipe: Recipe, map: ModelMap, source: TensorSource, schemes: Mapping[str, Scheme]) -> int:
    """Bytes that the walk of a calibrated recipe holds at most.

    Args:
        map: of the release: where experts are pruned, of what is left.
        source: the same checkpoint; one that is pruned knows the whole one, whose layers are what is read.
        schemes: module -> scheme of every quantized weight.
    """
    assert recipe.calibration is not None
    rows, length = recipe.calibration.samples, recipe.calibration.length
    tokens = min(BATCH, rows) * length
    whole, stored = (source.whole_map, source.whole) if isinstance(source, Pruned) else (map, source)
    read = (weights_of(block) + max(passing(block, tokens), converting(block, stored)) for block in blocks_of(whole))
    repaired = (weights_of(block) + repairing(recipe, block, rows * length) for block in blocks_of(whole))
    changed = (weights_of(block) + changing(recipe, block, rows * length, tokens, schemes) for block in blocks_of(map))
    return max((*read, *repaired, *changed), default=0)


def blocks_of(map: ModelMap) -> Iterator[Block]:
    yield from (*map.blocks, *map.mtp)


def weights_of(block: Block) -> int:
    """A layer while it runs."""
    return FLOAT * numbers_of(block.slots)


def numbers_of(slots: Iterable[Slot]) -> int:
    return sum(math.prod(slot.shape) for slot in slots)


def passing(block: Block, tokens: int) -> int:
    """What a batch of rows makes on its way."""
    return FLOAT * tokens * WIDTHS * widest(block)


def widest(block: Block) -> int:
    """The widest output of a linear module that reads every token."""
    return max(slot.shape[0] for slot in block.slots if slot.linear and slot.expert is None)


def converting(block: Block, source: TensorSource) -> int:
    """The largest tensor of a layer as it is stored, which is there while it is converted."""
    entries = (source.tensors[name] for name in {slot.tensor for slot in block.slots})
    return max(math.prod(entry.shape) * BYTES_OF[entry.dtype] for entry in entries)


def repairing(recipe: Recipe, block: Block, tokens: int) -> int:
    """What a repair of pruned experts keeps of what they read and add."""
    if recipe.prune is None or recipe.prune.repair == "none":
        return 0
    return 2 * min(ADDED, 2 * FLOAT * tokens * block.inputs["mlp"][0].shape[1])


def changing(recipe: Recipe, block: Block, every: int, tokens: int, schemes: Mapping[str, Scheme]) -> int:
    """What the methods of a recipe hold beside a layer, one after the other: of all calibration tokens `every`, in batches of `tokens`."""
    chosen = [slot for slot in block.slots if slot.module in schemes]
    quantize = recipe.quantize
    if not chosen or quantize is None:
        return passing(block, tokens)
    codes = numbers_of(chosen)
    held = [codes + passing(block, tokens)]
    if recipe.smooth:
        held.append(searching(block, chosen, every, schemes))
    if quantize.method == "gptq" or recipe.correct or (quantize.method == "autoround" and quantize.autoround.start == "gptq"):
        held.append(codes + factoring(block, chosen))
    if quantize.method == "autoround":
        row = FLOAT * every // max(1, recipe.calibration.samples if recipe.calibration else 1) * KEPT_WIDTHS * widest(block)
        held.append(TUNED * codes + max(row, min(BACKWARD, quantize.autoround.batch * row)))
    return max(held)


def factoring(block: Block, chosen: Collection[Slot]) -> int:
    """The largest second moment of what a weight of it reads, while it is factored."""
    widths = [slots[0].shape[1] for name, slots in block.inputs.items() if any(slot in chosen for slot in slots)]
    return (FLOAT + FACTOR) * max(widths) ** 2


def searching(block: Block, chosen: Collection[Slot], every: int, schemes: Mapping[str, Scheme]) -> int:
    """What a search of smoothing scales reads and compares, and the moments of groups that clipping is judged by."""
    tokens, width = min(SEARCHED, every), block.inputs["mlp"][0].shape[1] if "mlp" in block.inputs else widest(block)
    sets = [slots for slots in block.inputs.values() if any(slot in chosen for slot in slots)]
    groups = sum(slots[0].shape[1] * (schemes[next(s.module for s in slots if s in chosen)].group or 128) for slots in sets)
    return FLOAT * (tokens * SEARCH_COPIES * width + groups)
