from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.methods.awq import Found, Output, Reader, SearchOptions, mean_magnitude, search_scales
from qwench.methods.folding import Repeated, fold_norm, scale_columns, scale_rows, storable
from qwench.methods.rtn import round_fused, round_to_nearest
from qwench.numerics import SCHEMES, Scheme
from tests.methods import toys
from tests.references import awq as literal

INT4 = Scheme("int", 4, group=16, full_range=True)
EXACT = SearchOptions(scale_dtype=torch.float32)


def inputs_with_outliers(seed: int = 30, batches: int = 3, outliers: int = 4) -> list[Tensor]:
    """Batches [B, T, HIDDEN] of correlated channels, a few of them many times larger, one that is never active."""
    mix = toys.random(toys.HIDDEN, toys.HIDDEN, seed=seed) / 8 + 0.7 * torch.eye(toys.HIDDEN)
    size = torch.ones(toys.HIDDEN)
    size[5 :: toys.HIDDEN // outliers] = 25
    size[11] = 0
    return [toys.random(2, 13 + i, toys.HIDDEN, seed=seed + i + 1) @ mix * size for i in range(batches)]


def module(run: object, weights: toys.Weights, roles: Sequence[str]) -> Output:
    """The part as a function of some of its weights."""
    return lambda readers, x: run(weights | dict(zip(roles, readers, strict=True)), x)  # type: ignore[operator]


def mlp_case(
    options: SearchOptions = EXACT, scheme: Scheme = INT4, inputs: list[Tensor] | None = None
) -> tuple[toys.Weights, Found]:
    weights = toys.mlp_weights()
    readers = [Reader(weights[role], scheme, "gate_up") for role in ("mlp.gate", "mlp.up")]
    found = search_scales(readers, inputs or inputs_with_outliers(), module(toys.mlp, weights, ("mlp.gate", "mlp.up")), options)
    return weights, found


@pytest.mark.parametrize("duo", [False, True])
def test_equals_the_literal_search(duo: bool) -> None:
    gate, up, down = (toys.random(*shape, seed=i) / 5 for i, shape in enumerate([(7, 32), (7, 32), (5, 7)]))
    x = toys.random(19, 32, seed=4) * torch.logspace(-1, 1, 32)
    x[:, 3] = 0
    at_one, tried = literal.search(gate.numpy(), up.numpy(), down.numpy(), x.numpy(), 16, duo)
    readers = [Reader(w, INT4) for w in (gate, up)]
    got = search_scales(readers, list(x.split([4, 15])), _bare_mlp(down), dataclasses.replace(EXACT, duo=duo))
    assert got.loss_at_one == pytest.approx(at_one, rel=1e-4)
    best = min(tried, key=lambda t: t[1])
    assert best[1] < at_one
    assert got.ratio == pytest.approx(best[0])
    assert got.best_loss == pytest.approx(best[1], rel=1e-3)
    assert got.scales.tolist() == pytest.approx(best[2], rel=1e-5)
    assert len(got.losses) == 19
    least = at_one
    for (ratio, loss), (want_ratio, want, _) in zip(got.losses, tried, strict=True):
        assert ratio == pytest.approx(want_ratio)
        # What is worse than the best so far may be given up early, but not before it is worse.
        assert loss == pytest.approx(want, rel=1e-3) or least * 0.999 <= loss <= want
        least = min(least, want)


def _bare_mlp(down: Tensor) -> Output:
    return lambda w, x: (torch.nn.functional.silu(x @ w[0].T) * (x @ w[1].T)) @ down.T


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize(
    "scheme", [INT4, dataclasses.replace(SCHEMES["int4-asym"], group=32), SCHEMES["nvfp4"]], ids=lambda s: s.label
)
def test_outlier_channels_make_it_beat_rounding(scheme: Scheme, duo: bool) -> None:
    """Applied for real: norm folded in bfloat16, readers rescaled and rounded; measured on other inputs than those of the search."""
    weights, gain = toys.mlp_weights(), (0.3 * toys.random(toys.HIDDEN, seed=40)).bfloat16().float()
    held = 3 * inputs_with_outliers(seed=50)[0]
    roles = ("mlp.gate", "mlp.up")
    readers = [Reader(weights[role], scheme, "gate_up") for role in roles]
    snap = functools.partial(storable, gain, zero_centred=True, dtype=torch.bfloat16)
    seen = [toys.norm(gain, x) for x in inputs_with_outliers()]
    found = search_scales(readers, seen, module(toys.mlp, weights, roles), SearchOptions(duo=duo), snap)
    assert not found.kept_one
    assert "less)" in found.says
    assert torch.allclose(found.scales, snap(found.scales), rtol=1e-6)

    def error(scales: Tensor) -> float:
        rounded = round_fused([scale_columns(weights[role], scales) for role in roles], scheme)
        changed = weights | dict(zip(roles, (q.dequantize() for q in rounded), strict=True))
        norm = fold_norm(gain, scales, True).bfloat16().float()
        return float((toys.mlp(changed, toys.norm(norm, held)) - toys.mlp(weights, toys.norm(gain, held))).square().mean())

    assert error(found.scales) < 0.8 * error(torch.ones(toys.HIDDEN))
    assert found.best_loss < 0.8 * found.loss_at_one


@pytest.mark.parametrize("duo", [False, True])
def test_the_number_of_candidates_is_the_number_of_points(duo: bool) -> None:
    for points in (2, 3, 7):
        _, found = mlp_case(SearchOptions(points, duo))
        assert len(found.losses) == points - 1
        ratios = [ratio for ratio, _ in found.losses]
        assert duo or ratios[-1] == 1
        assert ratios == sorted(set(ratios))


def test_the_loss_is_that_of_the_scales_when_applied() -> None:
    weights, found = mlp_case()
    changed = dict(weights)
    for role in ("mlp.gate", "mlp.up"):
        changed[role] = round_to_nearest(
            scale_columns(weights[role], found.scales), INT4, scale_dtype=torch.float32
        ).dequantize()
    errors = [toys.mlp(changed, x / found.scales) - toys.mlp(weights, x) for x in inputs_with_outliers()]
    squares, count = sum(float(e.square().sum()) for e in errors), sum(e.numel() for e in errors)
    assert found.best_loss == pytest.approx(squares / count, rel=1e-4)
    assert found.best_loss == min(loss for _, loss in found.losses)


def test_a_channel_that_is_never_active_keeps_one() -> None:
    _, found = mlp_case()
    assert float(found.scales[11]) == 1
    others = torch.cat([found.scales[:11], found.scales[12:]])
    assert float(others.max() * others.min()) == pytest.approx(1, rel=1e-4)


def test_weights_that_lie_on_the_grid_keep_one() -> None:
    weights = toys.mlp_weights()
    for role in ("mlp.gate", "mlp.up"):
        weights[role] = round_to_nearest(weights[role], INT4).dequantize()
    readers = [Reader(weights[role], INT4) for role in ("mlp.gate", "mlp.up")]
    found = search_scales(readers, inputs_with_outliers(), module(toys.mlp, weights, ("mlp.gate", "mlp.up")), SearchOptions())
    assert found.kept_one
    assert found.loss_at_one == found.best_loss == 0
    assert torch.equal(found.scales, torch.ones(toys.HIDDEN))
    assert found.says == "none of 19 scales beats 1 (loss 0): 1 is kept"
    gain = toys.random(toys.HIDDEN, seed=41).bfloat16()
    assert fold_norm(gain, found.scales, True) is gain


def test_one_wins_ties() -> None:
    """Channels of equal size: every candidate is 1 and none is better than 1."""
    x = torch.where(toys.random(1, 40, toys.HIDDEN, seed=42) > 0, 1.0, -1.0)
    _, found = mlp_case(inputs=[x])
    assert found.loss_at_one > 0
    assert all(loss == found.loss_at_one for _, loss in found.losses)
    assert found.kept_one


def test_inputs_of_zeros_and_losses_that_are_not_finite_keep_one() -> None:
    _, found = mlp_case(inputs=[torch.zeros(1, 5, toys.HIDDEN)])
    assert found.kept_one
    _, found = mlp_case(inputs=[torch.full((1, 5, toys.HIDDEN), math.nan)])
    assert found.kept_one
    assert "not finite" in found.says
    assert found.losses == ()


def moe_readers(weights: toys.Weights) -> tuple[list[Reader], Output]:
    """Routers as they are, shared expert and every expert's pair rounded."""
    readers = [Reader(weights["router"]), Reader(weights["shared.router"])]
    readers += [Reader(weights[role], INT4, "shared") for role in ("shared.gate", "shared.up")]
    readers += [Reader(weights[f"expert.{h}"][j], INT4, f"expert {j}") for j in range(toys.EXPERTS) for h in ("gate", "up")]

    def output(w: list[Tensor], x: Tensor) -> Tensor:
        changed = dict(zip(("router", "shared.router", "shared.gate", "shared.up"), w, strict=False))
        changed |= {"expert.gate": torch.stack(w[4::2]), "expert.up": torch.stack(w[5::2])}
        return toys.moe(weights | changed, x)

    return readers, output


def test_a_mixture_is_judged_as_a_whole_with_its_routers_unrounded() -> None:
    weights, inputs = toys.moe_weights(), [x / 4 for x in inputs_with_outliers()]
    readers, output = moe_readers(weights)
    seen: list[list[Tensor]] = []

    def watching(w: list[Tensor], x: Tensor) -> Tensor:
        seen.append(w)
        return output(w, x)

    found = search_scales(readers, inputs, watching, EXACT)
    assert found.best_loss < 0.8 * found.loss_at_one
    for trial in seen:
        assert torch.allclose(trial[0], weights["router"], rtol=1e-6)
        assert torch.allclose(trial[1], weights["shared.router"], rtol=1e-6)
    assert not any(torch.equal(trial[2], weights["shared.gate"]) for trial in seen[len(inputs) :])


def test_unrounded_readers_are_seen_as_they_will_be_stored() -> None:
    """A bfloat16 router that is rescaled is rounded to bfloat16 again: the loss has to know."""
    weights = toys.moe_weights()
    weights["router"] = weights["router"].bfloat16()
    readers, output = moe_readers(weights | {"router": weights["router"].float()})
    readers[0] = Reader(weights["router"])
    routers: list[Tensor] = []

    def watching(w: list[Tensor], x: Tensor) -> Tensor:
        routers.append(w[0])
        return output(w, x)

    found = search_scales(readers, inputs_with_outliers(), watching, EXACT)
    stored = (weights["router"].float() * found.scales).bfloat16().float() / found.scales
    assert any(torch.equal(router, stored) for router in routers)
    assert not torch.equal(stored, weights["router"].float())


def test_attention_is_judged_by_its_output_not_by_query_alone() -> None:
    roles = ("attention.q", "attention.k", "attention.v")
    weights = toys.attention_weights()
    # Query carries nothing in the channels that are large: on its own it would choose scales that spoil the rest.
    weights["attention.q"][:, ::2] *= 0.02
    weights["attention.v"][:, 1::2] *= 0.02
    size = torch.ones(toys.HIDDEN)
    size[1::2] = 12
    inputs = [toys.random(2, 21, toys.HIDDEN, seed=60 + i) * size for i in range(2)]
    readers = [Reader(weights[role], INT4, "qkv") for role in roles]
    whole_output = module(toys.attention, weights, roles)
    whole = search_scales(readers, inputs, whole_output, EXACT)
    query = search_scales(readers[:1], inputs, lambda w, x: x @ w[0].T, EXACT)
    assert not query.kept_one

    def error(scales: Tensor) -> float:
        rounded = [round_to_nearest(weights[r] * scales, INT4, scale_dtype=torch.float32).dequantize() for r in roles]
        return sum(
            float((whole_output(rounded, x / scales) - whole_output([weights[r] for r in roles], x)).square().sum())
            for x in inputs
        )

    assert error(whole.scales) < 0.9 * error(query.scales)
    assert error(whole.scales) <= error(torch.ones(toys.HIDDEN))


def test_value_into_output_shares_scales_over_repeated_heads() -> None:
    weights = toys.attention_weights()
    repeated = Repeated(toys.VALUE_HEADS, toys.QUERY_HEADS // toys.VALUE_HEADS, toys.HEAD)
    weights["attention.v"][3::10] *= 20
    inputs = [toys.random(2, 21, toys.HIDDEN, seed=70 + i) for i in range(2)]
    heads = [toys.attention_heads(weights, x) for x in inputs]
    found = search_scales([Reader(weights["attention.o"], INT4)], heads, lambda w, x: x @ w[0].T, EXACT, repeated=repeated)
    assert found.scales.shape == (toys.VALUE_HEADS * toys.HEAD,)
    assert found.best_loss < 0.8 * found.loss_at_one

    def error(scales: Tensor) -> float:
        moved = weights | {"attention.v": scale_rows(weights["attention.v"], scales)}
        columns = scale_columns(weights["attention.o"], repeated.spread(scales))
        moved["attention.o"] = round_to_nearest(columns, INT4, scale_dtype=torch.float32).dequantize()
        squares = [(toys.attention(moved, x) - toys.attention(weights, x)).square().mean() for x in inputs]
        return float(sum(squares) / len(squares))

    assert error(found.scales) == pytest.approx(found.best_loss, rel=1e-3)
    assert error(torch.ones_like(found.scales)) == pytest.approx(found.loss_at_one, rel=1e-3)


def test_mean_magnitude_is_over_all_tokens() -> None:
    batches = [toys.random(2, 3, 5, seed=1), toys.random(1, 9, 5, seed=2)]
    flat = torch.cat([b.reshape(-1, 5) for b in batches]).numpy()
    assert mean_magnitude(batches).tolist() == pytest.approx(np.abs(flat).mean(0).tolist(), rel=1e-6)


def test_fused_readers_share_their_outer_scale() -> None:
    weights = toys.mlp_weights()
    weights["mlp.up"] *= 0.01
    seen: list[Tensor] = []

    def watching(w: list[Tensor], x: Tensor) -> Tensor:
        seen.append(w[1])
        return toys.mlp(weights | {"mlp.gate": w[0], "mlp.up": w[1]}, x)

    readers = [Reader(weights[role], SCHEMES["nvfp4"], "gate_up") for role in ("mlp.gate", "mlp.up")]
    inputs = inputs_with_outliers(batches=1)
    search_scales(readers, inputs, watching, EXACT)
    shared = round_fused([weights["mlp.gate"], weights["mlp.up"]], SCHEMES["nvfp4"])[1].dequantize()
    assert torch.equal(seen[1], shared)
    assert not torch.equal(shared, round_to_nearest(weights["mlp.up"], SCHEMES["nvfp4"]).dequantize())
