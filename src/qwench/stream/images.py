"""Images of calibration records: where their bytes are, how many tokens they take, and the patches that the vision tower reads.

An image is a file on this machine, or bytes that a record holds. It is opened, turned as its EXIF data says, resized and cut into patches by the checkpoint's own processor
(`preprocessor_config.json`) in the form of transformers that needs nothing but Pillow. Nobody who calibrates on text alone comes here: Pillow and the processor are imported when
they are first needed. Nothing is ever fetched: an address on the web is no image on this machine.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor

from qwench.checkpoint.folder import read_config
from qwench.errors import CheckpointError
from qwench.models.grid import Grid, tokens_of

Image = bytes | Path
"""Where the bytes of an image are: here, or in a file."""

CONFIGS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Picture:
    """An image in a row of tokens.

    Attributes:
        row: which.
        start: place of its first token.
        grid: its patches.
        image: where its bytes are.
        sha256: of these.
    """

    row: int
    start: int
    grid: Grid
    image: Image
    sha256: str


@dataclass(frozen=True)
class Pictures:
    """The images of some rows.

    Attributes:
        places: in order of rows and starts.
        processor: what makes patches of them.
    """

    places: tuple[Picture, ...]
    processor: ImageProcessor

    @property
    def sha256(self) -> str:
        """SHA-256 over row, start, grid and bytes of every image, in hexadecimal."""
        lines = (f"{p.row} {p.start} {p.grid} {p.sha256}\n" for p in self.places)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """That they take in all rows."""
        return sum(tokens_of(picture.grid, self.processor.merge) for picture in self.places)

    def of(self, row: int) -> list[Picture]:
        """Those of a row."""
        return [picture for picture in self.places if picture.row == row]


class ImageProcessor:
    """The image processor of a checkpoint folder.

    Raises:
        CheckpointError: it has no tower, no processor config, or one that does not go with its tower.
    """

    def __init__(self, folder: Path) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

        self._fit, config = smart_resize, read_config(folder)
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise CheckpointError(
                f"{folder}: config.json describes no vision tower, and calibration.images is `use`",
                "set calibration.images to skip or text, or graft the tower first",
            )
        if not any((folder / name).is_file() for name in CONFIGS):
            raise CheckpointError(
                f"{folder} holds no {CONFIGS[0]}, which says how images are cut into patches",
                "copy it from the base checkpoint, or set calibration.images to skip or text",
            )
        try:
            self._processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a broken file makes transformers raise
            raise CheckpointError(f"the processor config in {folder} cannot be read: {error}", "copy it again") from error
        for name, ours in (("patch_size", "patch_size"), ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
            if getattr(self._processor, name) != vision.get(ours):
                raise CheckpointError(
                    f"{folder}: {name} is {getattr(self._processor, name)} in {CONFIGS[0]}, the tower's {ours} is {vision.get(ours)}",
                    "take both files from the same checkpoint",
                )
        self.merge = int(self._processor.merge_size)
        self.token_id = int(config["image_token_id"])
        self.framed = (int(config["vision_start_token_id"]), self.token_id, int(config["vision_end_token_id"]))

    def grid(self, image: Image) -> Grid:
        """Patches that an image will have; its pixels are not looked at. Raises ValueError, OSError where it cannot be read."""
        with _opened(image) as opened:
            width, height = opened.size
            if opened.getexif().get(ORIENTATION, 1) >= SIDEWAYS:
                width, height = height, width
        size = self._processor.patch_size
        edges = self._processor.size
        rows, columns = self._fit(height, width, size * self.merge, edges["shortest_edge"], edges["longest_edge"])
        return 1, rows // size, columns // size

    def patches(self, image: Image) -> Tensor:
        """An image's patches [patches, numbers in a patch], float32. Raises ValueError, OSError where it cannot be read."""
        from PIL import ImageOps

        with _opened(image) as opened:
            turned = ImageOps.exif_transpose(opened).convert("RGB")
        found: Tensor = self._processor(images=[turned], return_tensors="pt")["pixel_values"]
        return found.to(torch.float32)


ORIENTATION, SIDEWAYS = 0x0112, 5
"""The EXIF tag, and the first of its values that lays an image on its side."""


def image_of(value: Any, folder: Path | None) -> Image | None:
    """The image that a value of a record is: a path, `file:`, `data:`, or the mapping of bytes and path that data sets hold; None where it is none on this machine.

    Args:
        folder: what paths are relative to.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return bytes(value["bytes"])
        value = next((value[key] for key in ("path", "url", "image", "image_url") if value.get(key)), None)
        return image_of(value, folder)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        return None
    if value.startswith("data:"):
        return _decoded(value)
    parsed = urlparse(value)
    if parsed.scheme in ("http", "https", "ftp", "s3", "gs", "hf"):
        return None
    path = Path(unquote(parsed.path) if parsed.scheme == "file" else value).expanduser()
    return path if path.is_absolute() or folder is None else folder / path


def bytes_of(image: Image) -> bytes:
    """Raises OSError."""
    return image.read_bytes() if isinstance(image, Path) else image


def sha256_of(image: Image) -> str:
    """SHA-256 of an image's bytes, in hexadecimal. Raises OSError."""
    return hashlib.sha256(bytes_of(image)).hexdigest()


def _opened(image: Image) -> Any:
    from PIL import Image as pillow

    return pillow.open(image if isinstance(image, Path) else BytesIO(image))


def _decoded(url: str) -> bytes | None:
    try:
        return base64.b64decode(url.partition("base64,")[2], validate=True) or None
    except binascii.Error:
        return None


def flat_patches(processor: ImageProcessor, pictures: Sequence[Picture]) -> Tensor:
    """Patches of several images, one after the other. Raises CheckpointError where one has changed since its tokens were counted."""
    found = []
    for picture in pictures:
        patches = processor.patches(picture.image)
        frames, rows, columns = picture.grid
        if len(patches) != frames * rows * columns or sha256_of(picture.image) != picture.sha256:
            name = picture.image if isinstance(picture.image, Path) else "an image of a record"
            raise CheckpointError(f"{name} has changed while it was calibrated on", "leave the files alone and run again")
        found.append(patches)
    return torch.cat(found)
