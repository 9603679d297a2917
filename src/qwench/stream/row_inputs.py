"""What rows of tokens are before the first layer: embeddings, those of images among them, and where their tokens stand.

Rows of text alone are embedded from the matrix, and stand at 0, 1, 2 ...; where a row holds images, what the vision tower makes of them takes the places of their tokens.

Letters in names: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.models.grid import row_positions
from qwench.models.run import Trunk
from qwench.models.tower import Tower
from qwench.stream.images import Picture, Pictures, flat_patches

PATCHES = 16_384
"""Patches that go through the tower at once: 64 MiPixels."""


@dataclass
class RowInputs:
    """Attributes:
    trunk: what embeds.
    ids: the rows' tokens, int64 [rows, length].
    pictures: images in them, or None.
    """

    trunk: Trunk
    ids: Tensor
    pictures: Pictures | None = None

    @cached_property
    def tower(self) -> Tower:
        """Raises CheckpointError where there is none."""
        trunk = self.trunk
        return Tower(trunk.source, trunk.map, trunk.place)

    def embed(self, rows: Tensor) -> Tensor:
        """Embeddings [B, T, D] of some rows, in main memory. Raises CheckpointError."""
        embedded_BTD = self.trunk.embed(self.ids[rows])
        for place, row in enumerate(rows.tolist()):
            for group in grouped(self.pictures.of(row) if self.pictures else []):
                self._put(embedded_BTD[place], group)
        return embedded_BTD

    def positions(self, rows: Tensor) -> Tensor | None:
        """Where the tokens of some rows stand, int64 [3, B, T]; None where none of all rows has images."""
        if self.pictures is None:
            return None
        length, merge = self.ids.shape[1], self.pictures.processor.merge
        found = [row_positions(length, [(p.start, p.grid) for p in self.pictures.of(row)], merge) for row in rows.tolist()]
        return torch.stack(found, 1)

    def _put(self, embedded_TD: Tensor, pictures: Sequence[Picture]) -> None:
        """Give the tokens of some images of a row what the tower makes of them."""
        assert self.pictures is not None
        patches = flat_patches(self.pictures.processor, pictures)
        for picture, tokens in zip(pictures, self.tower.embed(patches, [p.grid for p in pictures]), strict=True):
            if not bool(tokens.isfinite().all()):
                raise CheckpointError(
                    f"the vision tower makes NaN or infinity of an image in calibration row {picture.row}",
                    "the checkpoint's tower is damaged or overflows: check it, or set calibration.images to skip",
                )
            embedded_TD[picture.start : picture.start + len(tokens)] = tokens


def grouped(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Images in groups of at most `PATCHES` patches, at least one in each."""
    group: list[Picture] = []
    held = 0
    for picture in pictures:
        size = picture.grid[0] * picture.grid[1] * picture.grid[2]
        if group and held + size > PATCHES:
            yield group
            group, held = [], 0
        group.append(picture)
        held += size
    if group:
        yield group
