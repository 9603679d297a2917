"""A checkpoint by its headers alone: of a folder its files, of a hub id what the first bytes of its files say. No weight is fetched.

The hub is asked for config.json, the index and the sidecars, and for the beginning of every safetensors file that the index names (some 100 kB each): enough to know every tensor's name, dtype and
shape, and nothing of its values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from qwench.checkpoint.folder import INDEX_NAME, read_config, read_index
from qwench.checkpoint.hub import locate
from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import BYTES_OF, Part, StoredSource, TensorEntry
from qwench.errors import CheckpointError

SINGLE = "model.safetensors"
AT_ONCE = 8
"""Files whose headers are asked for at the same time."""


class Headers:
    """The tensors of a model on the hub, without their values; see `StoredSource`.

    Attributes:
        folder: where its config lies on this machine.
        config: the parsed `config.json`.
        tensors: every stored tensor by name.
        notes: what the index and the files disagree on.
    """

    def __init__(
        self, name: str, folder: Path, config: dict[str, Any], entries: Sequence[TensorEntry], notes: Sequence[str] = ()
    ) -> None:
        self.name, self.folder, self.config, self.notes = name, folder, config, notes
        self.tensors: Mapping[str, TensorEntry] = {entry.name: entry for entry in entries}

    def read(self, name: str, part: Part = ()) -> Tensor:
        """Always raises CheckpointError."""
        raise self._far(name)

    def chunks(self, name: str, part: Part = ()) -> Iterator[memoryview]:
        """Always raises CheckpointError."""
        raise self._far(name)

    def stamp(self) -> str:
        """A digest of names, shapes and config."""
        told = [(e.name, e.dtype, e.shape, e.file) for e in self.tensors.values()]
        return hashlib.sha256(repr((told, self.config)).encode()).hexdigest()

    def _far(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{name} of {self.name} was not fetched: only headers were", "fetch the model, and give its folder"
        )


def open_headers(model: str) -> tuple[StoredSource, bool]:
    """A model's config and headers, and whether its values can be read too (of a folder).

    Args:
        model: a folder, or `org/name` or `org/name@revision`.

    Raises:
        CheckpointError: everything that is wrong with the folder; the hub does not give it, or a file is no safetensors file.
    """
    if Path(model).expanduser().exists() or model.startswith("demo:"):
        return Checkpoint.open(locate(model).path), True
    located = locate(model, weights=False)
    weight_map = read_index(located.path / INDEX_NAME) if (located.path / INDEX_NAME).is_file() else None
    files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        entries = [e for found in pool.map(lambda file: _header(located.name, located.revision, file), files) for e in found]
    notes = _disagreements(weight_map or {}, entries)
    return Headers(located.name, located.path, read_config(located.path), entries, notes), False


def _header(repo: str, revision: str | None, file: str) -> list[TensorEntry]:
    """The tensors of one file on the hub, in the order in which they lie. Raises CheckpointError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().parse_safetensors_file_metadata(repo, file, revision=revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the header of {file} of hub model {repo} cannot be read: {error}", "try again, or fetch it and give the folder"
        ) from error
    except Exception as error:  # the library's own class for a damaged header derives from Exception alone
        if type(error).__module__.partition(".")[0] not in ("huggingface_hub", "httpx", "requests"):
            raise
        raise CheckpointError(
            f"the header of {file} of hub model {repo} cannot be read: {error}", "try again, or fetch it and give the folder"
        ) from error
    unknown = sorted({tensor.dtype for tensor in found.tensors.values()} - BYTES_OF.keys())
    if unknown:
        raise CheckpointError(f"{file} of {repo} has tensors of dtype {', '.join(unknown)}", f"known: {', '.join(BYTES_OF)}")
    placed = sorted(found.tensors.items(), key=lambda item: item[1].data_offsets[0])
    return [TensorEntry(name, tensor.dtype, tuple(tensor.shape), file, tensor.data_offsets[0]) for name, tensor in placed]


def _disagreements(weight_map: Mapping[str, str], entries: Sequence[TensorEntry]) -> list[str]:
    where = {entry.name: entry.file for entry in entries}
    wrong = [name for name, file in weight_map.items() if where.get(name) != file]
    return [f"the index names {len(wrong)} tensors that are not in the file it says, {wrong[0]} first"] if wrong else []
