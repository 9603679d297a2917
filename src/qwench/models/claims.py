"""What an architecture expects of a checkpoint, and the comparison with what is stored.

A `Claim` is one stored tensor that the architecture expects, with the weights that lie in it. Claims are made from a config and from the names that are
stored (which tell the layouts apart), and then held against the checkpoint: what is missing, what has another shape, what nobody claims.
All complaints come at once; names that differ only in their numbers are told as one line, so that a missing layer is not a screen of text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwench.checkpoint.source import TensorEntry, TensorSource
from qwench.models.geometry import Complaint
from qwench.models.map import Slot

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a layer or an expert in a tensor's name."""
HOLE = "\0"


@dataclass(frozen=True)
class Claim:
    """A stored tensor that the architecture expects.

    Attributes:
        tensor: its name.
        shape: its dimensions.
        slots: the weights in it: one, or the gates and ups of all experts.
    """

    tensor: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]


def one(
    role: str, module: str, shape: tuple[int, ...], *, layer: int | None = None, expert: int | None = None, linear: bool = False
) -> Claim:
    """A tensor `module.weight` that is one weight."""
    tensor = f"{module}.weight"
    return Claim(tensor, shape, (Slot(role, module, shape, tensor, (), layer, expert, linear),))


def bare(role: str, name: str, shape: tuple[int, ...], *, layer: int | None = None) -> Claim:
    """A parameter that is no `.weight`: its full name is its module."""
    return Claim(name, shape, (Slot(role, name, shape, name, (), layer),))


def fits(claim: Claim, source: TensorSource) -> bool:
    """Whether the tensor is stored in the shape that is expected."""
    entry = source.tensors.get(claim.tensor)
    return entry is not None and entry.shape == claim.shape


def misfits(claims: Iterable[Claim], source: TensorSource, component: str) -> Iterator[Complaint]:
    """Complaints about tensors that are missing or of another shape. An incomplete MTP head gets one of its own."""
    expected = list(claims)
    missing = [c.tensor for c in expected if c.tensor not in source.tensors]
    if missing and component == "mtp":
        yield (
            f"the MTP head is incomplete: {len(expected) - len(missing)} of {len(expected)} tensors are stored, missing: {summary(missing)}",
            "take the mtp.* tensors from the original checkpoint, or remove what is left of them and set mtp_num_hidden_layers to 0",
        )
    elif missing:
        yield (
            f"{source.folder}: {len(missing)} of the {len(expected)} {component} tensors that config.json asks for are missing: {summary(missing)}",
            "fetch the checkpoint again, or use the config.json that belongs to it",
        )
    wrong = [(c, source.tensors[c.tensor]) for c in expected if c.tensor in source.tensors and not fits(c, source)]
    yield from _shapes(wrong)


def _shapes(wrong: Sequence[tuple[Claim, TensorEntry]]) -> Iterator[Complaint]:
    """One complaint for all tensors that differ in the same way."""
    alike: defaultdict[tuple[str, tuple[int, ...], tuple[int, ...]], list[TensorEntry]] = defaultdict(list)
    for claim, entry in wrong:
        alike[NUMBER.sub(HOLE, claim.tensor), entry.shape, claim.shape].append(entry)
    for (_, stored, expected), entries in alike.items():
        files = sorted({e.file for e in entries})
        where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
        verb = "is" if len(entries) == 1 else "are"
        yield (
            f"{summary([e.name for e in entries])} in {where} {verb} {list(stored)}, config.json says {list(expected)}",
            "use the config.json that belongs to these weights",
        )


def unclaimed(claimed: Iterable[str], source: TensorSource) -> Iterator[Complaint]:
    """A complaint about every stored tensor that plays no role: left alone, it would be lost without a word."""
    known = set(claimed)
    strange = [name for name in source.tensors if name not in known]
    if not strange:
        return
    quantized = [
        n for n in strange if n.endswith((".weight_packed", ".weight_scale", ".qweight", ".scales", ".weight_scale_inv"))
    ]
    mend = (
        "this checkpoint is quantized already: start from the unquantized one, or read it as a release"
        if quantized
        else "remove what does not belong to the model, or use the config.json that belongs to these weights"
    )
    yield (
        f"{source.folder}: {len(strange)} stored tensors play no role in the architecture of config.json: {summary(strange)}",
        mend,
    )


def summary(names: Iterable[str]) -> str:
    """Names as a sentence: those that differ only in their numbers are one entry with a count.

    `mtp.fc.weight, mtp.layers.0.mlp.experts.{0..255}.up_proj.weight (256)`
    """
    alike: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        alike[NUMBER.sub(HOLE, name)].append(tuple(int(n) for n in NUMBER.findall(name)))
    told = []
    for pattern, numbers in alike.items():
        told.append(pattern + (f" ({len(numbers)})" if len(numbers) > 1 else ""))
        for column in zip(*numbers, strict=True):
            told[-1] = told[-1].replace(HOLE, _span(sorted(set(column))), 1)
    return ", ".join(told)


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(str(n) for n in numbers) + "}"
