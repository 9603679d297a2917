"""How large the inputs of every linear module are on some rows of text: sums of squares by channel, over the trunk and the MTP head.

They say how much each column of a matrix counts, which is what GGUF's importance matrices hold. One pass of the rows through each layer, nothing is changed. Experts
are counted with the tokens that the router sends to them, and no others: an expert that no token reached has the count 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from qwench.checkpoint.source import TensorSource
from qwench.models.map import ModelMap
from qwench.models.place import CPU, Place
from qwench.models.run import Trunk
from qwench.stream.hidden import Hidden, HiddenFiles
from qwench.stream.images import Pictures
from qwench.stream.live import LiveBlock
from qwench.stream.observe import Take
from qwench.stream.walk import Tell, Walk, walk

Squares = dict[str, tuple[Tensor, int]]
"""By `Slot.module`: the sum of x_j^2 for each input channel, float32 [I], and the number of tokens."""


class SquareSums:
    """An observer of a walk (see `stream.walk.Observer`) that sums up squares. Sums are kept in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.modules: dict[str, str] = {}

    def takers(self, live: LiveBlock) -> dict[str, Take]:
        """Every input set of the layer; what a former attempt at it summed up is dropped."""
        found: dict[str, Take] = {}
        for name, slots in live.block.inputs.items():
            key = f"{live.label} {name}"
            self.begin(key, slots[0].shape[1])
            self.modules |= {slot.module: key for slot in slots}
            found[name] = self.adder(key)
        return found

    def begin(self, key: str, width: int) -> None:
        self.sums[key], self.counts[key] = torch.zeros(width, dtype=torch.float64), 0

    def adder(self, key: str) -> Take:
        """What takes inputs [N, I] in."""

        def add(inputs_NI: Tensor) -> None:
            self.sums[key] += inputs_NI.float().square().sum(0, dtype=torch.float64).cpu()
            self.counts[key] += len(inputs_NI)

        return add

    @property
    def squares(self) -> Squares:
        """What was summed up, by module; modules that read the same input share a tensor."""
        sums = {key: total.float() for key, total in self.sums.items()}
        return {module: (sums[key], self.counts[key]) for module, key in self.modules.items()}


def importance_walk(
    source: TensorSource,
    map: ModelMap,
    ids_NT: Tensor,
    *,
    folder: Path | None = None,
    tell: Tell = lambda done, layers, what: None,
    batch: int = 4,
    place: Place = CPU,
    stored: torch.dtype = torch.bfloat16,
    lost: Callable[[int, int], None] = lambda layer, row: None,
    pictures: Pictures | None = None,
) -> Squares:
    """Sums of squared inputs of all linear modules of trunk, MTP head (where there is one) and lm_head (where it is not the embedding).

    Memory follows the largest layer; rows lie on the disk. The vision tower, which text does not reach, is not in it.

    Args:
        ids_NT: token ids, int64 [rows, length].
        folder: where the rows' hidden states may lie, rows x length x hidden x 4 bytes; None: the system's folder for temporary files.
        tell: progress: (layers done, layers, what).
        batch: rows that go through a layer at once.
        place: where, and in which numbers.
        stored: dtype of the hidden states between layers; bfloat16 as the model itself would pass them on.
        lost: called with (layer, row) for each row that turned non-finite in a layer; from there on nothing counts it.
        pictures: images in the rows.

    Raises:
        CheckpointError: from the source; or more than a tenth of the rows turned non-finite.
        OutputError: from the disk.
    """
    sums, depth = SquareSums(), len(map.blocks)
    with TemporaryDirectory(prefix="qwench-", dir=folder) as scratch:
        files = HiddenFiles(Path(scratch), (*ids_NT.shape, map.other("embed").shape[1]), stored, depth)
        settings = Walk(observers=[sums], mtp=map.has_mtp, batch=batch, place=place)
        walk(settings, source, map, ids_NT, files, lambda live: None, tell, pictures)
        sound = sorted(set(range(len(ids_NT))) - {row for _, row in settings.lost})
        _of_lm_head(
            sums,
            Trunk(source, map, place.dtype, place.device),
            files.before("changed", depth),
            torch.split(torch.tensor(sound), batch),
        )
    for layer, row in settings.lost:
        lost(layer, row)
    return sums.squares


def _of_lm_head(sums: SquareSums, trunk: Trunk, hidden: Hidden, batches: Sequence[Tensor]) -> None:
    """lm_head reads what the final norm puts out; where it is the embedding, there is no weight of its own."""
    for slot in (s for s in trunk.map.others if s.role == "head"):
        sums.begin(slot.module, slot.shape[1])
        sums.modules[slot.module] = slot.module
        for rows in batches:
            sums.adder(slot.module)(trunk.norm(hidden.pick(rows)).flatten(0, -2))
