"""The modules that judge scales, against the transformers layer that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.methods.awq import Reader, SearchOptions, search_scales
from qwench.models import map_of
from qwench.models.map import Slot
from qwench.models.run import Trunk
from qwench.numerics import SCHEMES
from qwench.steps.changes.judges import capture_inputs, capture_module, mixture_output
from qwench.steps.changes.smoothing import readers_of
from qwench.stream.live import LiveBlock
from tests.support.memory import tiny_source


class Stream:
    """Rows before a layer, as `stream.walk.Rows` gives them."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def batches(self) -> list[Tensor]:
        return list(self.hidden.split(2))


def mixture() -> tuple[LiveBlock, list[Slot], Stream]:
    source = tiny_source(moe=True)
    map = map_of(source)
    live = LiveBlock(source, map, Trunk(source, map).modules, 1)
    fold = next(f for f in live.block.folds if f.source == "norm.post")
    hidden = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(3))
    return live, readers_of(live, fold, live.block.slot("norm.post")), Stream(hidden)


def test_a_mixture_taken_expert_by_expert_is_the_module() -> None:
    live, readers, rows = mixture()
    inputs = capture_module(live, rows, live.block.slot("norm.post")).inputs  # type: ignore[arg-type]
    assert [len(batch) for batch in inputs] == [2, 2, 1]
    with torch.no_grad():
        module = live.layer.get_submodule("mlp")
        own = {n.removeprefix("mlp."): w for n, w in live.weights.items() if n.startswith("mlp.")}
        wanted = torch.cat([torch.func.functional_call(module, own, (batch,)) for batch in inputs])
    got = mixture_output(live, readers)([live.weight(slot) for slot in readers], torch.cat(inputs))
    assert torch.allclose(got, wanted, atol=1e-5)


def test_weights_made_one_by_one_give_the_same_scales_and_are_each_asked_for_once() -> None:
    live, readers, rows = mixture()
    scheme = SCHEMES["int4"]
    quantized = [Reader(live.weight(s), None if "router" in s.role else scheme) for s in readers]
    inputs = [torch.cat(capture_module(live, rows, live.block.slot("norm.post")).inputs)]  # type: ignore[arg-type]
    inputs[0][..., 3::29] *= 7
    output, asked = mixture_output(live, readers), 0

    class Counting(Sequence[Tensor]):
        def __init__(self, weights: Sequence[Tensor]) -> None:
            self.weights = weights

        def __len__(self) -> int:
            return len(self.weights)

        def __getitem__(self, place: int) -> Tensor:  # type: ignore[override]
            nonlocal asked
            asked += 1
            return self.weights[place]

    def counting(weights: Sequence[Tensor], batch: Tensor) -> Tensor:
        return output(Counting(weights), batch)

    options = SearchOptions(points=5)
    held = search_scales(quantized, inputs, output, options)
    made = search_scales(quantized, inputs, counting, options, one_by_one=True)
    assert torch.equal(held.scales, made.scales)
    assert held.losses == made.losses
    assert not held.kept_one
    assert asked <= (1 + 1 + 4) * len(readers), "the original, 1, and four more points"


def test_all_experts_are_captured_in_one_pass() -> None:
    live, _, rows = mixture()
    names = [name for name in live.block.inputs if name.endswith(".down") and name.startswith("experts.")]
    runs = 0
    real = live.run

    def run(hidden: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return real(hidden)

    live.run = run  # type: ignore[method-assign]
    taken = capture_inputs(live, rows, names)  # type: ignore[arg-type]
    assert runs == len(rows.batches())
    assert sum(len(batch) for batches in taken.values() for batch in batches) == 5 * 7 * 2, "two experts a token"
    assert {batch.shape[1] for batches in taken.values() for batch in batches} == {256}
