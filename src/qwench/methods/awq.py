"""AWQ: scale channels before they are rounded. Lin et al. 2023, "Activation-aware Weight Quantization" (arXiv:2306.00978).

A column of a weight that meets large activations matters more than others, and rounding knows nothing of that. Multiply it by s > 1 before rounding
and divide its input by s: the function is the same, the column's share of the rounding error is smaller. The input is divided for nothing where
it comes out of a norm or of another linear layer (`qwench.methods.folding`).

How large should s be? Along one curve, s = mean|x| ^ ratio, a handful of points are tried. (`duo` divides by mean|w| ^ (1 - ratio), the mean size of
the column's weights within their groups: a column that is large in its group already is rounded well.) The judge is the output of the whole
module that reads the channels: the MLP, the mixture of experts with its router, the attention with its output gate. Judging query alone picks
absurd scales. The weights that it sees are Q(W * s) / s, on the unscaled inputs: the same as Q(W * s) on inputs / s, and the module needs no surgery.

s = 1 is always a candidate and wins ties: where nothing beats it, the report says so and nothing is touched.

What it trades away: one s for all readers of a norm; readers that are not rounded (routers, decay gates) are rescaled in their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.methods.folding import Repeated, scale_columns
from qwench.methods.rtn import shared_outer
from qwench.methods.straight_through import nearest_values
from qwench.numerics import Scheme

Output = Callable[[Sequence[Tensor], Tensor], Tensor]
"""The module that reads the channels: weights of its readers, in the order of `readers`, and one batch of inputs -> its output."""

LIMITS = (1e-4, 1e4)
"""Scales are kept within."""


@dataclass(frozen=True)
class Reader:
    """A weight that reads the channels.

    Attributes:
        weight: [out, channels].
        scheme: what it will be rounded to; None: it is rescaled and stored in its own dtype.
        fused: readers of one name are fused by engines and share an NVFP4 divisor; "" is fused with nobody.
    """

    weight: Tensor
    scheme: Scheme | None = None
    fused: str = ""


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        points: candidates in all, s = 1 among them: at least 2.
        duo: take the size of the weights into account.
        scale_dtype: what `int` scales are stored in.
    """

    points: int = 20
    duo: bool = False
    scale_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        scales: float32 [channels of the source]; all ones where nothing beat 1.
        ratio: the exponent; None where 1 was kept.
        loss_at_one: mean squared error of the module's output with readers rounded as they are.
        best_loss: the same with `scales`; equal to `loss_at_one` where 1 was kept.
        losses: (ratio, loss) of every candidate but 1. A candidate is given up once it is worse than the best: its loss is what it had by then.
    """

    scales: Tensor
    ratio: float | None
    loss_at_one: float
    best_loss: float
    losses: tuple[tuple[float, float], ...]

    @property
    def kept_one(self) -> bool:
        return self.ratio is None

    @property
    def says(self) -> str:
        """One line for the log."""
        if not math.isfinite(self.loss_at_one):
            return f"the output with rounded weights is not finite (loss {self.loss_at_one}): 1 is kept"
        if self.ratio is None:
            return f"none of {len(self.losses)} scales beats 1 (loss {self.loss_at_one:.4g}): 1 is kept"
        gain = 1 - self.best_loss / self.loss_at_one
        return f"ratio {self.ratio:.3f}: loss {self.loss_at_one:.4g} -> {self.best_loss:.4g} ({gain:.1%} less)"


@torch.no_grad()
def search_scales(
    readers: Sequence[Reader],
    inputs: Sequence[Tensor],
    output: Output,
    options: SearchOptions | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
    repeated: Repeated | None = None,
    one_by_one: bool = False,
) -> Found:
    """Scales for the channels of one fold.

    Args:
        readers: every weight that reads them, in the order in which `output` wants them.
        inputs: batches [..., channels] as the readers see them, at least one; weights are handed to `output` in their dtype, on their device. The
            module's outputs for all of them are held in memory.
        output: the module that reads the channels.
        snap: the scales next to given ones that the source can hold, such as `storable`; None: any.
        repeated: how the source's channels lie in the readers' columns; None: one to one.
        one_by_one: a rounded weight is made when `output` asks for it and not kept, instead of all of them once for each scale: for a mixture of
            experts, whose weights would be held twice. Pays where there is one batch, and each weight is asked for once.

    Returns:
        Scales of the source's channels; `repeated.spread` puts them on the readers' columns.
    """
    options = options or SearchOptions()
    trial = _Trial(readers, inputs, output, options.scale_dtype, one_by_one)
    spread = repeated.spread if repeated else _same
    at_one = best_loss = trial.loss(None, math.inf)
    best, best_ratio, losses = None, None, []
    for ratio, scales in candidates(readers, mean_magnitude(inputs), options, repeated):
        if not math.isfinite(at_one):
            break
        scales = snap(scales) if snap else scales
        loss = trial.loss(spread(scales), best_loss)
        losses.append((ratio, loss))
        if loss < best_loss:
            best, best_ratio, best_loss = scales, ratio, loss
    if best is None:
        columns = readers[0].weight.shape[1] // (repeated.times if repeated else 1)
        best = torch.ones(columns, device=inputs[0].device)
    return Found(best, best_ratio, at_one, best_loss, tuple(losses))


def candidates(
    readers: Sequence[Reader], magnitude: Tensor, options: SearchOptions, repeated: Repeated | None = None
) -> Iterator[tuple[float, Tensor]]:
    """(ratio, scales) of every candidate but 1.

    s = magnitude^ratio, for `duo` divided by size^(1 - ratio), then divided by sqrt(max * min) so that it lies about 1. Channels that are never active
    keep 1: they have nothing to say, and would drag the middle down.

    Args:
        magnitude: mean |x| at the readers' columns.
    """
    pool = repeated.pool if repeated else _same
    activity = pool(magnitude).to(torch.float32)
    size = pool(mean_size(readers)).to(activity.device) if options.duo else None
    # Without weights a ratio of 0 is the candidate 1 itself.
    steps = options.points - 1
    assert steps >= 1, options
    ratios = [i / max(1, steps - 1) for i in range(steps)] if size is not None else [(i + 1) / steps for i in range(steps)]
    live = activity > 0
    if not bool(live.any()):
        return
    for ratio in ratios:
        raw = activity.pow(ratio)
        if size is not None:
            raw = raw / (size.pow(1 - ratio) + 1e-4)
        raw = raw.clamp(min=LIMITS[0])
        middle = (raw[live].max() * raw[live].min()).sqrt()
        yield ratio, torch.where(live, raw / middle, torch.ones_like(raw)).clamp(*LIMITS)


def mean_magnitude(inputs: Sequence[Tensor]) -> Tensor:
    """Mean |x| of each channel over batches [..., channels], float64 [channels]."""
    total = torch.zeros(inputs[0].shape[-1], dtype=torch.float64, device=inputs[0].device)
    rows = 0
    for batch in inputs:
        flat = batch.reshape(-1, batch.shape[-1])
        total += flat.abs().sum(0, dtype=torch.float32 if flat.dtype != torch.float64 else torch.float64)
        rows += len(flat)
    return total / max(1, rows)


def mean_size(readers: Sequence[Reader]) -> Tensor:
    """Mean, over the rows of all readers that are rounded, of |w| relative to the largest |w| of its group; float32 [channels]."""
    rounded = [r for r in readers if r.scheme is not None]
    if not rounded:
        return torch.ones(readers[0].weight.shape[1], device=readers[0].weight.device)
    total, rows = torch.zeros(rounded[0].weight.shape[1], device=rounded[0].weight.device), 0
    for reader in rounded:
        assert reader.scheme is not None
        group = reader.scheme.group or reader.weight.shape[1]
        size = reader.weight.to(torch.float32).abs().reshape(len(reader.weight), -1, group)
        total += (size / (size.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
        rows += len(reader.weight)
    return total / rows


def together(found: Sequence[Found]) -> str:
    """One line for the log, over several searches of one kind (the experts of a layer)."""
    if len(found) == 1:
        return found[0].says
    moved = [one for one in found if not one.kept_one]
    before, after = (
        (math.fsum(losses) for losses in zip(*((o.loss_at_one, o.best_loss) for o in found), strict=True))
        if found
        else (0.0, 0.0)
    )
    gain = f": loss {before:.4g} -> {after:.4g} ({1 - after / before:.1%} less)" if before > 0 else ""
    return f"{len(moved)} of {len(found)} get scales{gain}"


class Made(Sequence[Tensor]):
    """Tensors that are made when they are asked for."""

    def __init__(self, make: Callable[[int], Tensor], count: int) -> None:
        self.make, self.size = make, count

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> Tensor:  # type: ignore[override]
        if not 0 <= place < self.size:
            raise IndexError(place)
        return self.make(place)


class _Trial:
    """Measures the module's output with rounded readers against its output with the readers as they are."""

    def __init__(
        self, readers: Sequence[Reader], inputs: Sequence[Tensor], output: Output, scale_dtype: torch.dtype, one_by_one: bool
    ) -> None:
        self.readers, self.inputs, self.output, self.scale_dtype = readers, inputs, output, scale_dtype
        self.one_by_one = one_by_one
        originals = self._all(lambda place: self._ready(readers[place].weight))
        self.wanted = [output(originals, batch) for batch in inputs]
        self.elements = sum(wanted.numel() for wanted in self.wanted)

    def loss(self, scales: Tensor | None, enough: float) -> float:
        """Mean squared error with these scales [columns] (None: 1); where it exceeds `enough`, what it was when it did."""
        weights, total = self._rounded(scales), 0.0
        for batch, wanted in zip(self.inputs, self.wanted, strict=True):
            error = self.output(weights, batch).to(torch.float32) - wanted.to(torch.float32)
            total += float(error.square().sum(dtype=torch.float64)) / self.elements
            if total > enough:
                break
        return total

    def _ready(self, weight: Tensor) -> Tensor:
        return weight.to(self.inputs[0])

    def _all(self, weight: Callable[[int], Tensor]) -> Sequence[Tensor]:
        made = Made(weight, len(self.readers))
        return made if self.one_by_one else list(made)

    def _rounded(self, scales: Tensor | None) -> Sequence[Tensor]:
        """Q(W * s) / s of every reader."""
        outers = self._outers(scales)

        def weight(place: int) -> Tensor:
            reader = self.readers[place]
            scaled = reader.weight if scales is None else scale_columns(reader.weight, scales.to(reader.weight.device))
            if reader.scheme is None:
                seen = scaled.to(reader.weight.dtype)
            else:
                seen = nearest_values(scaled, reader.scheme, outers[place], self.scale_dtype)
            return self._ready(seen if scales is None else seen.to(torch.float32) / scales.to(seen.device))

        return self._all(weight)

    def _outers(self, scales: Tensor | None) -> list[Tensor | None]:
        """The divisor of each reader, which those of one fused set share."""
        sets: dict[str, list[int]] = {}
        for place, reader in enumerate(self.readers):
            if reader.scheme is not None and reader.scheme.kind == "nvfp4":
                sets.setdefault(reader.fused or f"reader {place}", []).append(place)
        outers: list[Tensor | None] = [None] * len(self.readers)
        for places in sets.values():
            chosen = [self.readers[place].weight for place in places]
            scaled = chosen if scales is None else [scale_columns(w, scales.to(w.device)) for w in chosen]
            scheme = self.readers[places[0]].scheme
            assert scheme is not None
            shared = shared_outer([weight.cpu() for weight in scaled], scheme)
            for place in places:
                outers[place] = shared
        return outers


def _same(values: Tensor) -> Tensor:
    return values
