"""The files of a checkpoint that are no weights: which of them a release carries on.

Only what is known to belong to the model is copied: tokenizer, chat template, processors, generation defaults, licences. Never Python files (code from a
checkpoint is neither run nor passed on), never README.md (a release has its own card), never config.json and the index (a release has its own), and
nothing unknown. What stays behind is listed, so that the record can say so.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from qwench.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from qwench.errors import CheckpointError

SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
"""Names, and patterns over names, of files that ride along."""

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Those of them that speak of images: they come and go with the tower."""


def sidecars_of(folder: Path) -> dict[str, Path]:
    """Name -> path of the files that a release made from this folder carries on."""
    return {p.name: p for p in _files(folder) if _rides_along(p.name)}


def left_behind(folder: Path) -> list[str]:
    """Files and folders (with a `/`) that are neither weights nor carried on; hidden ones are not worth a word."""
    own = {CONFIG_NAME, INDEX_NAME}
    files = [p.name for p in _files(folder) if not _rides_along(p.name) and p.name not in own and p.suffix != ".safetensors"]
    folders = [f"{p.name}/" for p in folder.iterdir() if p.is_dir()]
    return sorted(name for name in files + folders if not name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())


def _rides_along(name: str) -> bool:
    return not name.endswith(".py") and any(fnmatchcase(name, pattern) for pattern in SIDECARS)


def content_of(path: Path) -> bytes:
    """A file to copy, whole. Raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "make the file readable, or fetch it again") from None


def put_file(path: Path, content: bytes) -> None:
    """A whole file, on the disk, with the permissions that the user's umask gives."""
    with path.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
