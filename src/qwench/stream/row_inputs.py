"""What rows of tokens are before the first layer: embeddings, those of images among them, and where their tokens stand.

Rows of text alone are embedded from the matrix, and stand at 0, 1, 2 ...; where a row holds images, what the vision tower makes of them takes the places of their tokens. The MTP head reads embeddings
again and again, one pass over the rows after the other; so the tower runs once, over all images, and what it made of them lies in a file that has no name.

Letters in names: B rows, T positions, D hidden size, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.models.grid import row_positions, tokens_of
from qwench.models.run import Trunk
from qwench.models.tower import Tower
from qwench.stream.hidden import output_errors
from qwench.stream.images import Picture, Pictures, flat_patches

PATCHES = 16_384
"""Patches that go through the tower at once, for one reading of its weights: some 4 million pixels."""


@dataclass
class RowInputs:
    """Attributes:
    trunk: what embeds.
    ids: the rows' tokens, int64 [rows, length].
    pictures: images in them, or None.
    folder: where the images' tokens may lie; None: where the system has its temporary files.
    """

    trunk: Trunk
    ids: Tensor
    pictures: Pictures | None = None
    folder: Path | None = None

    def embed(self, rows: Tensor) -> Tensor:
        """Embeddings [B, T, D] of some rows, in main memory.

        Raises:
            CheckpointError: there is no tower, it makes NaN or infinity of an image, or an image has changed since its tokens were counted.
            OutputError: the disk is full.
        """
        embedded_BTD = self.trunk.embed(self.ids[rows])
        for place, row in enumerate(rows.tolist()):
            for picture in self.pictures.of(row) if self.pictures else ():
                tokens_ND = self._tokens.read(picture)
                embedded_BTD[place, picture.start : picture.start + len(tokens_ND)] = tokens_ND
        return embedded_BTD

    def positions(self, rows: Tensor) -> Tensor | None:
        """Where the tokens of some rows stand, int64 [3, B, T]; None where none of all rows has images."""
        if self.pictures is None:
            return None
        length, merge = self.ids.shape[1], self.pictures.processor.merge
        found = [row_positions(length, [(p.start, p.grid) for p in self.pictures.of(row)], merge) for row in rows.tolist()]
        return torch.stack(found, 1)

    @cached_property
    def _tokens(self) -> PictureTokens:
        assert self.pictures is not None
        return PictureTokens(self.trunk, self.pictures, self.folder)


class PictureTokens:
    """What the tower makes of the images of all rows, in a file without a name, in the numbers that the trunk computes in."""

    def __init__(self, trunk: Trunk, pictures: Pictures, folder: Path | None) -> None:
        self.dtype, self.width = trunk.dtype, trunk.map.other("embed").shape[1]
        tower, merge = Tower(trunk.source, trunk.map, trunk.place), pictures.processor.merge
        sizes = [tokens_of(picture.grid, merge) * self.width * self.dtype.itemsize for picture in pictures.places]
        self._places = {(p.row, p.start): place for p, place in zip(pictures.places, self._spans(sizes), strict=True)}
        where = folder or Path("the folder for temporary files")
        with output_errors(where):
            self._file: IO[bytes] = TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the walk
        for group in grouped(pictures.places):
            made = tower.embed(flat_patches(pictures.processor, group), [picture.grid for picture in group])
            for picture, tokens_ND in zip(group, made, strict=True):
                _check_finite(picture, tokens_ND)
                with output_errors(where):
                    self._file.write(tokens_ND.to(self.dtype).contiguous().view(torch.uint8).numpy().data)

    def read(self, picture: Picture) -> Tensor:
        """The tokens of an image, [N, D]."""
        start, size = self._places[picture.row, picture.start]
        self._file.seek(start)
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=self.dtype).view(-1, self.width)

    @staticmethod
    def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Starts and sizes of what lies one behind the other."""
        return list(zip([0, *accumulate(sizes)][:-1], sizes, strict=True))


def _check_finite(picture: Picture, tokens_ND: Tensor) -> None:
    if not bool(tokens_ND.isfinite().all()):
        raise CheckpointError(
            f"the vision tower makes NaN or infinity of an image in calibration row {picture.row}",
            "the checkpoint's tower is damaged or overflows: check it, or set calibration.images to skip",
        )


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
