"""Importance: how much each input channel of a matrix counts when its scales are chosen, in llama.cpp's file format.

For a matrix that reads inputs x, the importance of channel j is the mean of x_j^2 over the tokens that reached it. A file holds, for each tensor of the GGUF file that
it is for, the sum of squares and the number of tokens, for each expert its own:

    blk.3.ffn_down_exps.weight.in_sum2   F32 [experts, columns]
    blk.3.ffn_down_exps.weight.counts    F32 [experts, 1]

Channels are in the file's order: what is computed on the checkpoint's own weights goes through `in_file_order` first, because the columns of `ssm_out` are permuted.

An expert that no token reached has the count 0 and is quantized as if there were no importance. llama.cpp's own tool never runs the MTP block; ours has entries for
it. `of` fills in nothing in silence: `check` says which tensors have no entry, and which entries fit nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from qwench.checkpoint.staging import output_errors
from qwench.errors import CheckpointError
from qwench.formats.gguf import GgufPlan
from qwench.formats.gguf_fields import Field, add_field
from qwench.formats.gguf_tensors import GgufTensor
from qwench.formats.gguf_transforms import TileHeads

SUM, COUNT = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Entry:
    """Importance of one tensor.

    Attributes:
        squares: float32 [experts or 1, columns]: sums of squared inputs.
        counts: float32 [experts or 1]: tokens that were summed.
    """

    squares: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        assert self.squares.dim() == 2 and self.counts.shape == self.squares.shape[:1]

    def of(self, number: int) -> Tensor | None:
        """Mean squares [columns] for an expert; None where no token reached it."""
        return self.squares[number] / self.counts[number] if self.counts[number] > 0 else None


@dataclass(frozen=True)
class Importance:
    """Importance of a model's tensors, by their names in the GGUF file.

    Attributes:
        entries: by tensor.
        texts: what it was computed on, for people.
        length: tokens in a row of text.
        rows: rows of text.
    """

    entries: dict[str, Entry]
    texts: tuple[str, ...] = ()
    length: int = 512
    rows: int = 0
    file: Path | None = field(default=None, compare=False)

    def of(self, tensor: GgufTensor, number: int) -> Tensor | None:
        """Importance [columns] for the `number`th weight of a tensor; None where there is none."""
        entry = self.entries.get(tensor.name)
        return entry.of(number) if entry is not None else None

    def check(self, plan: GgufPlan) -> list[str]:
        """What a plan's quantized tensors lack; one sentence each.

        Raises CheckpointError where it belongs to another model.
        """
        tensors = {t.tensor.name: t for t in plan.tensors}
        where = f"importance matrix {self.file}" if self.file else "the importance matrix"
        for name, entry in self.entries.items():
            if name in tensors:
                _check_entry(where, entry, tensors[name].tensor)
        known = [n for n in self.entries if n in tensors]
        if not known:
            raise CheckpointError(f"{where} names no tensor of this model", "use the importance matrix of this very model")
        looked_up = "token_embd.weight"  # its rows are copied, nothing multiplies it: it has no inputs
        lacking = [n for n, t in tensors.items() if t.type.startswith(("Q", "IQ")) and n not in self.entries and n != looked_up]
        unreached = {n: int((self.entries[n].counts == 0).sum()) for n in known}
        notes = [f"no importance for {len(lacking)} quantized tensors, such as {lacking[0]}"] if lacking else []
        return notes + [
            f"{n}: {count} experts that no token reached, quantized without importance"
            for n, count in unreached.items()
            if count
        ]


def _check_entry(where: str, entry: Entry, tensor: GgufTensor) -> None:
    have, need = tuple(entry.squares.shape), (len(tensor.slots), tensor.columns)
    if have != need:
        raise CheckpointError(
            f"{where} has {list(have)} experts and channels for {tensor.name}, the model has {list(need)}",
            "use the importance matrix of this very model",
        )
    if not (torch.isfinite(entry.squares).all() and (entry.squares >= 0).all()):
        raise CheckpointError(
            f"{where} has sums for {tensor.name} that are not finite or below 0", "compute it again: it is damaged"
        )


def importance_of(
    plan: GgufPlan, squares: Mapping[str, tuple[Tensor, int]], *, texts: Sequence[str] = (), length: int = 512, rows: int = 0
) -> Importance:
    """Importance for a file from what was observed on the checkpoint's own weights.

    Args:
        plan: the file; any file type, for entries do not depend on it.
        squares: for each `Slot.module`, the sum of its squared inputs [columns] in the checkpoint's order of columns, and the number of tokens. Modules
            that are absent have no entry; experts that are absent count as unreached.
        texts, length, rows: what it was observed on.
    """
    entries = {}
    for tensor in (t.tensor for t in plan.tensors):
        if tensor.float32 or not any(slot.module in squares for slot in tensor.slots):
            continue
        none = (torch.zeros(tensor.columns), 0)
        seen = [squares.get(slot.module, none) for slot in tensor.slots]
        sums = in_file_order(tensor, torch.stack([s.to(torch.float32) for s, _ in seen]))
        entries[tensor.name] = Entry(sums, torch.tensor([float(count) for _, count in seen]))
    return Importance(entries, tuple(texts), length, rows)


def in_file_order(tensor: GgufTensor, squares: Tensor) -> Tensor:
    """Sums of squared inputs [.., columns] of a checkpoint's weight, in the order of the columns in the file."""
    for transform in tensor.transforms:
        if isinstance(transform, TileHeads) and transform.dimension == -1:
            squares = transform.apply(squares)
    return squares


def write_importance(path: Path, importance: Importance) -> None:
    """Write a file that llama.cpp's `llama-quantize --imatrix` reads. It appears whole. Raises OutputError."""
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # the format has no architecture
    for entry in (
        Field("general.type", "string", "imatrix"),
        Field("imatrix.datasets", "strings", list(importance.texts) or [""]),  # llama.cpp wants the key, GGUF no empty list
        Field("imatrix.chunk_count", "uint32", importance.rows),
        Field("imatrix.chunk_size", "uint32", importance.length),
    ):
        add_field(writer, entry)
    for name, values in sorted(importance.entries.items()):
        writer.add_tensor(name + SUM, values.squares.to(torch.float32).contiguous().numpy())
        writer.add_tensor(name + COUNT, values.counts.to(torch.float32).reshape(-1, 1).contiguous().numpy())
    beside = path.with_name(f".{path.name}.partial")
    with output_errors(beside):
        try:
            writer.write_header_to_file(beside)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)


def read_importance(path: Path) -> Importance:
    """Read a file of ours or of `llama-imatrix`. Raises CheckpointError where it is none."""
    mend = "give a file that llama-imatrix or this program wrote (the GGUF format, not the old .dat)"
    try:
        reader = gguf.GGUFReader(path)
        stored = {t.name: np.array(t.data, dtype=np.float32) for t in reader.tensors}
        kind = reader.fields["general.type"].contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is no importance matrix: {error}", mend) from None
    if kind != "imatrix":
        raise CheckpointError(f"{path} is a GGUF file of type {kind!r}, not an importance matrix", mend)
    entries = {}
    for name, squares in stored.items():
        if name.endswith(SUM):
            stem = name.removesuffix(SUM)
            if stem + COUNT not in stored:
                raise CheckpointError(f"{path} has no counts for {stem}", mend)
            counts = stored[stem + COUNT].reshape(-1)
            entries[stem] = Entry(torch.from_numpy(squares.reshape(len(counts), -1)), torch.from_numpy(counts))
    return Importance(entries, *_facts(reader), file=path)


def _facts(reader: gguf.GGUFReader) -> tuple[tuple[str, ...], int, int]:
    def of(key: str, default: object) -> object:
        return reader.fields[key].contents() if key in reader.fields else default

    texts = of("imatrix.datasets", [])
    named: Sequence[str] = texts if isinstance(texts, list) else [str(texts)]
    return tuple(n for n in named if n), int(str(of("imatrix.chunk_size", 512))), int(str(of("imatrix.chunk_count", 0)))
