from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.methods.folding import Repeated, fold_norm, scale_columns, scale_rows, storable
from qwench.models.map import Fold, Slot
from qwench.models.sets import block_of
from tests.methods import toys


def some_scales(channels: int, seed: int = 20) -> Tensor:
    """Between 1/30 and 30, a few of them 1."""
    scales = torch.exp(toys.random(channels, seed=seed).clamp(-3.4, 3.4))
    scales[::7] = 1
    return scales


def folds(kind: str, moe: bool) -> dict[str, Fold]:
    """The folds that the map knows, by source."""
    slots = (Slot("expert.gate", "experts.0.gate_proj", (2, 3), "t", (), 0, 0, True),) if moe else ()
    return {fold.source: fold for fold in block_of(0, kind, "text", slots).folds}


MODULES = {
    "mlp": (toys.mlp_weights, toys.mlp, folds("full_attention", False)["norm.post"]),
    "moe": (toys.moe_weights, toys.moe, folds("full_attention", True)["norm.post"]),
    "attention": (toys.attention_weights, toys.attention, folds("full_attention", False)["norm.input"]),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("zero_centred", [True, False])
def test_smoothing_changes_nothing(name: str, zero_centred: bool) -> None:
    make, run, fold = MODULES[name]
    weights, gain, hidden = make(), 0.3 * toys.random(toys.HIDDEN, seed=21), toys.random(3, 17, toys.HIDDEN, seed=22)
    scales = some_scales(toys.HIDDEN)
    want = run(weights, toys.norm(gain, hidden, zero_centred))
    moved = weights | {role: scale_columns(weights[role], scales) for role in fold.readers}
    got = run(moved, toys.norm(fold_norm(gain, scales, zero_centred), hidden, zero_centred))
    assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", MODULES)
def test_every_reader_counts(name: str) -> None:
    """The trap of mixtures: whichever reader is left out, the router, the shared expert's gate, one half of a pair, the output is another."""
    make, run, fold = MODULES[name]
    weights, gain, hidden = make(), 0.3 * toys.random(toys.HIDDEN, seed=21), toys.random(3, 17, toys.HIDDEN, seed=22)
    scales = some_scales(toys.HIDDEN)
    want = run(weights, toys.norm(gain, hidden))
    smoothed = toys.norm(fold_norm(gain, scales, True), hidden)
    for forgotten in fold.readers:
        moved = {
            role: scale_columns(w, scales) if role in fold.readers and role != forgotten else w for role, w in weights.items()
        }
        assert float((run(moved, smoothed) - want).norm() / want.norm()) > 0.02, forgotten


@pytest.mark.parametrize(("make", "run", "name"), [(toys.mlp_weights, toys.mlp, "mlp"), (toys.moe_weights, toys.moe, "expert")])
def test_up_into_down(make: object, run: object, name: str) -> None:
    weights, x = make(), toys.random(3, 17, toys.HIDDEN, seed=23)  # type: ignore[operator]
    scales = some_scales(weights[f"{name}.up"].shape[-2])
    moved = weights | {
        f"{name}.up": scale_rows(weights[f"{name}.up"], scales),
        f"{name}.down": scale_columns(weights[f"{name}.down"], scales),
    }
    want = run(weights, x)  # type: ignore[operator]
    assert torch.allclose(run(moved, x), want, atol=2e-5 * float(want.abs().max()), rtol=0)  # type: ignore[operator]


def test_value_into_output_with_repeated_heads_and_output_gate() -> None:
    weights, x = toys.attention_weights(), toys.random(3, 17, toys.HIDDEN, seed=24)
    repeated = Repeated(toys.VALUE_HEADS, toys.QUERY_HEADS // toys.VALUE_HEADS, toys.HEAD)
    scales = some_scales(toys.VALUE_HEADS * toys.HEAD)
    moved = weights | {
        "attention.v": scale_rows(weights["attention.v"], scales),
        "attention.o": scale_columns(weights["attention.o"], repeated.spread(scales)),
    }
    want = toys.attention(weights, x)
    assert torch.allclose(toys.attention(moved, x), want, atol=2e-5 * float(want.abs().max()), rtol=0)
    assert torch.allclose(repeated.pool(repeated.spread(scales)), scales)
    wrong = weights | {
        "attention.v": moved["attention.v"],
        "attention.o": weights["attention.o"] * scales.repeat(repeated.times),
    }
    assert not torch.allclose(toys.attention(wrong, x), want, atol=0.1 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero_centred", [True, False])
def test_ones_touch_nothing(dtype: torch.dtype, zero_centred: bool) -> None:
    """1 + 0.0123 does not come back from bfloat16 as 0.0123: so the weight must not make the journey."""
    weight, matrix = torch.full((5,), 0.0123).to(dtype), toys.random(5, 5, seed=1).to(dtype)
    assert fold_norm(weight, torch.ones(5), zero_centred) is weight
    assert scale_columns(matrix, torch.ones(5)) is matrix
    assert scale_rows(matrix, torch.ones(5)) is matrix
    one_channel = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])
    folded = fold_norm(weight, one_channel, zero_centred).to(dtype)
    assert torch.equal(folded == weight, one_channel == 1)
    negative_zero = torch.tensor([-0.0, 0.5]).to(dtype)
    assert bool(torch.signbit(fold_norm(negative_zero, torch.tensor([1.0, 2.0]), zero_centred)[0]))


def test_folding_is_exact_in_float32() -> None:
    weight, scales = 1e-3 * toys.random(999, seed=2), some_scales(999)
    exact = (1 + weight.double()) / scales.double() - 1
    assert torch.equal(fold_norm(weight, scales, True), exact.float())
    assert torch.equal(fold_norm(weight, scales, False), (weight.double() / scales.double()).float())


@pytest.mark.parametrize("zero_centred", [True, False])
def test_a_bfloat16_norm_divides_exactly_by_storable_scales(zero_centred: bool) -> None:
    weight, wanted = (0.3 * toys.random(999, seed=3)).bfloat16(), some_scales(999)
    centre = 1.0 if zero_centred else 0.0

    def off(scales: Tensor) -> float:
        stored = fold_norm(weight, scales, zero_centred).bfloat16()
        return float(((stored.double() + centre) * scales / (weight.double() + centre) - 1).abs().max())

    real = storable(weight, wanted, zero_centred, torch.bfloat16)
    assert off(real) < 1e-6
    assert off(wanted) > (0.01 if zero_centred else 0.001)
    assert float((real / wanted - 1).abs().max()) < 0.1
    assert torch.equal(real[::7], torch.ones_like(real[::7]))


def test_channels_that_cannot_be_scaled_keep_one() -> None:
    weight = torch.tensor([-1.0, 0.5, 0.5, -1.5])
    scales = torch.tensor([3.0, 1e30, 2.0, 4.0])
    real = storable(weight, scales, True, torch.bfloat16)
    assert real.tolist() == [1.0, 1.0, 2.0, pytest.approx(4.0, rel=0.01)]
