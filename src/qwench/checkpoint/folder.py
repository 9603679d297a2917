"""What a checkpoint folder says it holds, checked against what it does hold.

Three kinds of folder are read: one file `model.safetensors`; several files with `model.safetensors.index.json`, whose `weight_map` says which
tensor is where; several files and no index. Where there is an index it decides which files belong to the checkpoint. It comes from strangers: a name in it
that leads out of the folder is refused. (Files may be symlinks; the hub's cache is made of them.)

Pickles are never opened: unpickling runs code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwench.checkpoint.header import FETCH, read_header
from qwench.checkpoint.source import TensorEntry
from qwench.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

Wanted = Callable[[str], bool]
"""Whether a tensor of that name is needed."""


@dataclass
class Inventory:
    """The tensors of a folder.

    Attributes:
        tensors: every tensor by name.
        files: the safetensors files that were looked into, and their sizes in bytes.
        notes: what is odd, but no reason to stop; one sentence each.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder. Raises CheckpointError where there is no folder, no such file, or not a JSON object in it."""
    if not folder.exists():
        raise CheckpointError(
            f"there is no folder {folder}", "give the folder of a checkpoint, or a hub id such as Qwen/Qwen3.5-9B"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file", "give the folder that holds config.json and the safetensors files")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds no {CONFIG_NAME}", "give the folder of a checkpoint; `config.json` is published with every one"
        )
    return _json_object(folder / CONFIG_NAME)


def read_index(path: Path) -> dict[str, str]:
    """An index: tensor -> file. Raises CheckpointError where it is none, or where a file name leaves the folder."""
    weight_map = _json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files", FETCH)
    for file in sorted(set(weight_map.values())):
        _check_file_name(path, file)
    return weight_map


def take_inventory(folder: Path, wanted: Wanted | None = None) -> Inventory:
    """Every tensor of a folder.

    Args:
        wanted: where it is given and there is an index, files that hold no wanted tensor may be absent and are not looked into.

    Raises:
        CheckpointError: what is wrong with the folder, everything at once.
    """
    weight_map = read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
    present = sorted(p.name for p in folder.glob("*.safetensors"))
    if weight_map is None and not present:
        raise _no_tensors(folder)
    if weight_map is not None and wanted is not None:
        weight_map = {name: file for name, file in weight_map.items() if wanted(name)}
    files = present if weight_map is None else sorted(set(weight_map.values()))
    inventory, faults = _read_headers(folder, files)
    if weight_map is not None:
        faults += _compare(folder, weight_map, inventory, whole=wanted is None)
        _note_strays(inventory, present, wanted)
    raise_together(folder, faults)
    return inventory


def raise_together(folder: Path, faults: Sequence[CheckpointError]) -> None:
    """One error that says everything, or nothing where there is nothing."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        lines = "\n".join(f"  - {fault.what}" for fault in faults)
        mends = dict.fromkeys(fault.mend for fault in faults if fault.mend)
        raise CheckpointError(f"{folder} has {len(faults)} faults:\n{lines}", "; ".join(mends))


def some(names: Iterable[str], shown: int = 4) -> str:
    """`a, b, c, d and 12 more`."""
    listed = sorted(names)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "make the file readable, or fetch it again") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not JSON: {error}", FETCH) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is JSON, but not an object", FETCH)
    return data


def _check_file_name(index: Path, file: str) -> None:
    if "/" in file or "\\" in file or "\0" in file or file in {"", ".", ".."}:
        what = f"{index} names the file {file!r}, which is not directly in that folder"
        raise CheckpointError(what, "don't trust this checkpoint; if you made it, use plain file names")
    if file.endswith(PICKLES):
        raise CheckpointError(
            f"{index} names {file}, a pickle: opening it would run code", "convert the checkpoint to safetensors"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{index} names {file}, which is no safetensors file", "convert the checkpoint to safetensors")


def _no_tensors(folder: Path) -> CheckpointError:
    pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
    if pickles:
        what = f"{folder} holds its weights as pickles ({some(pickles)}): opening them would run code"
        return CheckpointError(what, "convert the checkpoint to safetensors, or fetch a revision that has them")
    return CheckpointError(
        f"{folder} holds no safetensors files", "fetch the weights too: model.safetensors, or its shards and their index"
    )


def _read_headers(folder: Path, files: Sequence[str]) -> tuple[Inventory, list[CheckpointError]]:
    """The tensors of these files, and the files that could not be read or that repeat a tensor."""
    inventory, faults = Inventory(), []
    for file in files:
        if not (folder / file).is_file():
            faults.append(_missing(folder, file))
            continue
        try:
            entries = read_header(folder / file)
            inventory.files[file] = (folder / file).stat().st_size
        except CheckpointError as error:
            faults.append(error)
            continue
        twice = [e.name for e in entries if e.name in inventory.tensors]
        for name in twice[:4]:
            what = f"{folder}: tensor {name} is in both {inventory.tensors[name].file} and {file}"
            faults.append(CheckpointError(what, "keep one of the two files, or one of the two tensors"))
        inventory.tensors.update({e.name: e for e in entries})
    return inventory, faults


def _missing(folder: Path, file: str) -> CheckpointError:
    if (folder / file).is_symlink():
        return CheckpointError(f"{folder / file} is a link to nothing", "fetch the file again")
    return CheckpointError(
        f"{folder / INDEX_NAME} names {file}, which is not in the folder", "fetch that file too, or the index that fits"
    )


def _compare(folder: Path, weight_map: Mapping[str, str], inventory: Inventory, whole: bool) -> list[CheckpointError]:
    """Index against files: a tensor that is not where the index says is a fault, one that it does not name a note."""
    faults = []
    for file in sorted(set(weight_map.values()) & set(inventory.files)):
        named = [name for name, where in weight_map.items() if where == file]
        lost = [n for n in named if n not in inventory.tensors or inventory.tensors[n].file != file]
        if lost:
            what = f"{folder / INDEX_NAME} says that {file} holds {some(lost)}, and it does not"
            faults.append(CheckpointError(what, "fetch the index and the files of one revision"))
    unnamed = [name for name in inventory.tensors if name not in weight_map]
    if unnamed and whole:
        files = some({inventory.tensors[name].file for name in unnamed})
        inventory.notes.append(
            f"{files}: {len(unnamed)} tensors that the index does not name, read nevertheless: {some(unnamed)}"
        )
    return faults


def _note_strays(inventory: Inventory, present: Sequence[str], wanted: Wanted | None) -> None:
    strays = [file for file in present if file not in inventory.files]
    if strays and wanted is None:
        inventory.notes.append(f"{some(strays)}: not named by the index, not read")
