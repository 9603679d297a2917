from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.methods import columns
from qwench.methods.gptq import GptqOptions, contradiction, gptq
from qwench.methods.rtn import round_fused, round_to_nearest, shared_outer
from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode
from tests.methods import toys
from tests.methods.test_grids import short
from tests.references import gptq as literal

COLUMNS, TOKENS, DAMPING = 160, 900, 0.02
OUTPUTS = (136, 24)
"""Two members; the first has a partial FP8 block, and so have the columns."""


def inputs(seed: int = 5) -> Tensor:
    """Correlated channels of very different sizes [TOKENS, COLUMNS], one of them never active."""
    mixed = toys.random(TOKENS, COLUMNS, seed=seed) @ (torch.eye(COLUMNS) + toys.random(COLUMNS, COLUMNS, seed=seed + 1) / 8)
    mixed = mixed * torch.logspace(-1, 1, COLUMNS)[torch.randperm(COLUMNS, generator=toys.generator(seed))]
    mixed[:, 37] = 0
    return mixed


SECOND = inputs().T @ inputs()
WEIGHTS = [toys.random(out, COLUMNS, seed=out) for out in OUTPUTS]
SCHEME_NAMES = list(SCHEMES)
CASES = [
    (name, order, scales)
    for name in SCHEMES
    for order in ("none", "static", "grouped", "dynamic")
    for scales in ("fixed", "updated")
    if not (order == "static" and scales == "updated") and not (order == "dynamic" and not name.startswith("int"))
]


def run(scheme: Scheme, options: GptqOptions, weights: list[Tensor] = WEIGHTS, second: Tensor = SECOND) -> list[Quantized]:
    results, report = gptq(weights, second, TOKENS, scheme, options)
    assert report.fallback is None
    return results


def loss(weight: Tensor, quantized: Quantized, second: Tensor = SECOND) -> float:
    return literal.loss(weight.numpy(), decode(quantized).numpy(), second.double().numpy())


def sequence(order: str, width: int) -> list[int]:
    """The columns in the order in which they are to be rounded."""
    size = SECOND.diagonal().tolist()
    if order == "none":
        return list(range(COLUMNS))
    if order != "grouped":
        return sorted(range(COLUMNS), key=lambda c: -size[c])
    full = [list(range(g, g + width)) for g in range(0, COLUMNS - width + 1, width)]
    full.sort(key=lambda group: -sum(size[c] for c in group))
    rest = list(range(len(full) * width, COLUMNS))
    return [c for group in [*full, rest] for c in sorted(group, key=lambda c: -size[c])]


def levels(scheme: Scheme) -> Tensor:
    if scheme.kind == "int":
        return torch.arange(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)).double()
    if scheme.kind == "fp8":
        found = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return found[found.isfinite()]
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    return torch.cat([half, -half])


def scale_of_columns(q: Quantized) -> tuple[Tensor, Tensor]:
    """The scale and zero point of every value, float64 [out, in]."""
    if q.scheme.kind == "fp8":
        tall, wide = q.scheme.block or (1, COLUMNS)
        return q.scales.double().repeat_interleave(tall, 0)[: len(q.codes)].repeat_interleave(wide, 1)[
            :, :COLUMNS
        ], torch.zeros(1, 1)
    group = q.group_of_column.long() if q.group_of_column is not None else torch.arange(COLUMNS) // (q.scheme.group or COLUMNS)
    scale = {"nvfp4": lambda: q.scales.double() / q.outer.double(), "mxfp4": lambda: 2.0 ** (q.scales.double() - 127)}
    values = scale.get(q.scheme.kind, lambda: q.scales.double())()
    return values[:, group], torch.zeros(1, 1) if q.zeros is None else q.zeros.double()[:, group]


@pytest.mark.parametrize(("name", "order", "scales"), CASES)
def test_every_code_is_the_nearest_to_the_target_of_the_literal_version(name: str, order: str, scales: str) -> None:
    """The literal version is given the codes column by column: one that is chosen otherwise at a tie does not change all after it."""
    scheme = short(name)
    for weight, quantized in zip(WEIGHTS, run(scheme, GptqOptions(damping=DAMPING, order=order, scales=scales)), strict=True):  # type: ignore[arg-type]
        width = scheme.group or (scheme.block or (0, COLUMNS))[1]
        steps, values = sequence(order, width), decode(quantized).double()
        starts: dict[int, Tensor] = {}

        def replay(step: int, _target: np.ndarray, moved: np.ndarray) -> np.ndarray:
            starts[step] = torch.from_numpy(moved.copy())  # noqa: B023
            return values[:, steps[step]].numpy()  # noqa: B023

        _, targets = literal.column_by_column(weight.numpy(), SECOND.numpy(), steps, replay, DAMPING)
        target, (scale, zero) = torch.from_numpy(targets), scale_of_columns(quantized)
        missed = (values - target).abs()
        least = torch.stack([((level - zero) * scale - target).abs() for level in levels(scheme)]).amin(0)
        assert ((missed - least) / scale.abs()).max() < 2e-3
        expected = expected_scales(weight, scheme, steps, starts, order, scales, width)
        same = quantized.scales.float() == expected
        assert same.all() if scales == "fixed" else same.double().mean() > 0.99


def expected_scales(
    weight: Tensor, scheme: Scheme, steps: list[int], starts: dict[int, Tensor], order: str, scales: str, width: int
) -> Tensor:
    """The encoder's scales of the original weights, or of the weights as they are when the first column of a group comes up."""
    outer = shared_outer(WEIGHTS, scheme)
    if scales == "fixed" or width >= COLUMNS:
        return encode(weight[:, steps] if order == "dynamic" and width < COLUMNS else weight, scheme, outer).scales.float()
    found = {}
    for start in range(0, COLUMNS, width):
        members = steps[start : start + width]
        group = start // width if order == "dynamic" else members[0] // width
        found[group] = encode(starts[start][:, members].float(), scheme, outer).scales.float()
    return torch.cat([found[group] for group in sorted(found)], 1)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("order", ["none", "static", "grouped"])
def test_loses_what_the_literal_version_loses(name: str, order: str) -> None:
    scheme, weight = short(name), WEIGHTS[0]
    (quantized,) = run(scheme, GptqOptions(damping=DAMPING, order=order, scales="fixed"), [weight])  # type: ignore[arg-type]
    scale, zero = scale_of_columns(quantized)
    steps = sequence(order, scheme.group or (scheme.block or (0, COLUMNS))[1])

    def nearest(step: int, target: np.ndarray, _moved: np.ndarray) -> np.ndarray:
        column, wanted = steps[step], torch.from_numpy(target)
        choices = torch.stack([(v - zero[:, column % zero.shape[1]]) * scale[:, column] for v in levels(scheme)])
        return choices.gather(0, (choices - wanted).abs().argmin(0, keepdim=True))[0].numpy()

    values, _ = literal.column_by_column(weight.numpy(), SECOND.numpy(), steps, nearest, DAMPING)
    assert loss(weight, quantized) == pytest.approx(literal.loss(weight.numpy(), values, SECOND.double().numpy()), rel=0.02)


@pytest.mark.parametrize(("name", "order", "scales"), CASES)
def test_beats_rounding(name: str, order: str, scales: str) -> None:
    scheme = short(name)
    results, report = gptq(WEIGHTS, SECOND, TOKENS, scheme, GptqOptions(order=order, scales=scales))  # type: ignore[arg-type]
    rounded = round_fused(WEIGHTS, scheme)
    for weight, one, other in zip(WEIGHTS, results, rounded, strict=True):
        assert loss(weight, one) < 0.85 * loss(weight, other)
    assert report.relative is not None
    assert report.relative < 0.85


def test_the_report_holds_the_losses() -> None:
    scheme, weight = short("int4-asym"), WEIGHTS[1]
    (quantized,), report = gptq([weight], SECOND, TOKENS, scheme)
    assert report.loss == pytest.approx(loss(weight, quantized) / TOKENS, rel=1e-4)
    assert report.rounding_loss == pytest.approx(loss(weight, round_to_nearest(weight, scheme)) / TOKENS, rel=1e-4)
    assert (report.compared_rows, report.tokens, report.damping, report.dead) == (24, TOKENS, GptqOptions().damping, 1)


def test_the_round_trip_error_is_that_of_the_result() -> None:
    for weight, quantized in zip(WEIGHTS, run(short("nvfp4"), GptqOptions()), strict=True):
        error = (decode(quantized) - weight).double()
        assert quantized.error is not None
        assert quantized.error.mean_abs == pytest.approx(error.abs().mean().item(), rel=1e-4)
        assert quantized.error.max_abs == pytest.approx(error.abs().max().item(), rel=1e-4)
        assert quantized.error.relative_rms == pytest.approx(
            (error.square().sum().sqrt() / weight.double().norm()).item(), rel=1e-4
        )


def test_columns_are_not_updated_twice() -> None:
    """mlx-lm's version does it and still beats rounding, so that only a comparison with the right one shows it."""
    scheme, weight = short("int4"), WEIGHTS[0]
    live = torch.arange(COLUMNS) != 37
    second, weight = SECOND[live][:, live][:128, :128], weight[:, live][:, :128].contiguous()
    (quantized,) = run(scheme, GptqOptions(damping=DAMPING, order="none", scales="fixed", block=32), [weight], second)
    scale = encode(weight, scheme).scales.double().repeat_interleave(32, 1).numpy()

    def nearest(target: np.ndarray, column: int) -> np.ndarray:
        return np.clip(np.rint(target / scale[:, column]), -8, 7) * scale[:, column]

    exact = second.double().numpy()
    right, _ = literal.column_by_column(weight.numpy(), exact, list(range(128)), lambda s, t, _: nearest(t, s), DAMPING)
    twice = literal.updated_twice(weight.numpy(), exact, nearest, DAMPING, 32)
    plain = loss(weight, encode(weight, scheme), second)
    losses = [found / plain for found in (loss(weight, quantized, second), literal.loss(weight.numpy(), right, exact))]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    gain_of_twice = 1 - literal.loss(weight.numpy(), twice, exact) / plain
    assert 0 < gain_of_twice < 0.65 * (1 - losses[0])


@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8-block"])
@pytest.mark.parametrize("block", [1, 48, 100000])
def test_the_block_changes_nothing(name: str, block: int) -> None:
    options = GptqOptions(order="static")
    for one, other in zip(run(short(name), options), run(short(name), replace(options, block=block)), strict=True):
        assert (one.codes.float() == other.codes.float()).double().mean() > 0.999
        assert torch.equal(one.scales.float(), other.scales.float())


@pytest.mark.parametrize("name", ["int4-asym", "nvfp4", "fp8", "fp8-block"])
def test_chunks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(short(name), GptqOptions())
    monkeypatch.setitem(columns.CHUNK_ELEMENTS, "cpu", 1)
    for one, other in zip(whole, run(short(name), GptqOptions()), strict=True):
        assert (one.codes.float() == other.codes.float()).double().mean() > 0.999
        assert torch.equal(one.scales.float(), other.scales.float())


@pytest.mark.parametrize("name", ["int4", "int4-asym", "int8"])
@pytest.mark.parametrize("scales", ["fixed", "updated"])
def test_dynamic_order_is_no_order_on_permuted_columns(name: str, scales: str) -> None:
    order = torch.tensor(sequence("dynamic", 0))
    weight, scheme = WEIGHTS[0], short(name)
    (one,) = run(scheme, GptqOptions(order="dynamic", scales=scales), [weight])  # type: ignore[arg-type]
    permuted = weight[:, order].contiguous()
    (other,) = run(scheme, GptqOptions(order="none", scales=scales), [permuted], SECOND[order][:, order].contiguous())  # type: ignore[arg-type]
    assert one.scheme == replace(scheme, ordered=True)
    assert one.group_of_column is not None
    assert one.group_of_column.dtype == torch.int32
    assert one.group_of_column[order].tolist() == [step // 32 for step in range(COLUMNS)]
    same = one.codes[:, order] == other.codes
    assert same.double().mean() > 0.999
    assert torch.equal(decode(one)[:, order][same], decode(other)[same])


@pytest.mark.parametrize("order", ["none", "static", "grouped"])
def test_other_orders_leave_no_trace(order: str) -> None:
    for quantized in run(short("int4"), GptqOptions(order=order)):  # type: ignore[arg-type]
        assert quantized.group_of_column is None
        assert not quantized.scheme.ordered


def test_what_cannot_be_ordered_is_not() -> None:
    channel = Scheme("int", 8)
    for scheme in (channel, short("nvfp4"), SCHEMES["fp8"]):
        for quantized in run(scheme, GptqOptions(order="dynamic")):
            assert quantized.group_of_column is None
            assert quantized.scheme == scheme


def test_a_fused_set_shares_what_engines_share() -> None:
    ordered = run(short("int4"), GptqOptions(order="dynamic"))
    assert ordered[0].group_of_column is not None
    assert ordered[1].group_of_column is not None
    assert torch.equal(ordered[0].group_of_column, ordered[1].group_of_column)
    first, second = run(short("nvfp4"), GptqOptions(), [WEIGHTS[0], 3 * WEIGHTS[1]])
    assert first.outer is not None
    assert second.outer is not None
    assert torch.equal(first.outer, second.outer)
    given = torch.tensor([77.0])
    (alone,), _ = gptq([WEIGHTS[1]], SECOND, TOKENS, short("nvfp4"), outer=given)
    assert alone.outer is not None
    assert torch.equal(alone.outer, given)


@pytest.mark.parametrize("name", ["int4", "int4-asym", "nvfp4"])
def test_a_search_by_output_takes_the_scale_that_is_best_once_later_groups_have_made_up_for_it(name: str) -> None:
    """For the group that comes first, what is left when all other columns may be any real numbers is E S E^T, S the Schur complement."""
    scheme = short(name, "mse")
    weight, width = WEIGHTS[1], scheme.group or 0
    (quantized,) = run(scheme, GptqOptions(damping=DAMPING, order="none", judge="output"), [weight])
    damped = SECOND.double() + torch.eye(COLUMNS) * DAMPING * SECOND.diagonal().double().mean()
    damped[37, 37] = SECOND.diagonal().double().mean()
    here, rest = slice(0, width), slice(width, COLUMNS)
    schur = damped[here, here] - damped[here, rest] @ torch.linalg.solve(damped[rest, rest], damped[rest, here])
    outer = shared_outer([weight], scheme)
    factors = {"int": np.arange(1, 0.59, -0.04), "nvfp4": [1, 0.94, 0.88, 0.82, 0.76, 1.06, 1.12, 1.25, 1.5]}[scheme.kind]
    losses, stored = [], []
    for factor in factors:
        shrunk = encode(weight[:, here] * float(factor), replace(scheme, search="none"), outer)
        scale = shrunk.scales.double() / (1 if outer is None else outer.double())
        zero = torch.zeros(1) if shrunk.zeros is None else shrunk.zeros.double()[:, 0]

        def nearest(_step: int, target: np.ndarray, _moved: np.ndarray) -> np.ndarray:
            choices = torch.stack([(v - zero) * scale[:, 0] for v in levels(scheme)])  # noqa: B023
            return choices.gather(0, (choices - torch.from_numpy(target)).abs().argmin(0, keepdim=True))[0].numpy()

        values, _ = literal.column_by_column(weight[:, here].numpy(), schur.numpy(), list(range(width)), nearest, 0.0)
        error = weight[:, here].double() - torch.from_numpy(values)
        losses.append(((error @ schur) * error).sum(1))
        stored.append(shrunk.scales.float()[:, 0])
    best = torch.stack(losses).argmin(0, keepdim=True)
    assert (torch.stack(stored).gather(0, best)[0] == quantized.scales.float()[:, 0]).double().mean() > 0.95
    assert len(best.unique()) > 2


@pytest.mark.parametrize("name", ["int4", "int4-asym", "nvfp4"])
def test_judging_by_the_output_is_better(name: str) -> None:
    scheme, weight = short(name, "mse"), toys.random(300, COLUMNS, seed=9)
    for order in ("static", "grouped"):
        by = {j: run(scheme, GptqOptions(order=order, judge=j), [weight])[0] for j in ("weights", "output")}  # type: ignore[arg-type]
        assert loss(weight, by["output"]) < 0.99 * loss(weight, by["weights"])


def test_a_dead_column_is_rounded_plainly() -> None:
    scheme, weight = short("int4"), WEIGHTS[0]
    for order in ("none", "static", "grouped"):
        (quantized,) = run(scheme, GptqOptions(order=order, scales="fixed"), [weight])  # type: ignore[arg-type]
        assert torch.equal(decode(quantized)[:, 37], decode(encode(weight, scheme))[:, 37])
        assert decode(quantized)[:, 37].count_nonzero() > 0


def test_damping_grows_until_the_factorization_succeeds() -> None:
    broken, weight = torch.eye(32), WEIGHTS[1][:, :32]
    broken[3, 7] = broken[7, 3] = 1.05  # an eigenvalue of -0.05
    (quantized,), report = gptq([weight], broken, TOKENS, short("int8"), GptqOptions(damping=0.01))
    assert report.damping == pytest.approx(0.16)
    assert report.fallback is None
    assert decode(quantized).isfinite().all()
    _, report = gptq([WEIGHTS[1]], SECOND, TOKENS, short("int8"), GptqOptions(damping=0.0))
    assert report.damping == 0.0


@pytest.mark.parametrize("name", SCHEMES)
def test_too_few_tokens_fall_back_openly(name: str) -> None:
    scheme = short(name)
    results, report = gptq(WEIGHTS, SECOND, 50, scheme, enough=51)
    searched = replace(scheme, search="none" if scheme.kind == "fp8" else "mse")
    for one, other in zip(results, round_fused(WEIGHTS, searched), strict=True):
        assert torch.equal(decode(one), decode(other))
        assert one.scheme == scheme
    assert report.fallback == "50 tokens were seen, 51 are wanted"
    assert report.relative is None
    assert gptq(WEIGHTS, SECOND, 51, scheme, enough=51)[1].fallback is None


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_a_moment_that_says_nothing_falls_back_openly(fill: float) -> None:
    _, report = gptq(WEIGHTS, torch.full_like(SECOND, fill), TOKENS, short("int4"))
    assert report.fallback is not None
    assert "moment" in report.fallback
    assert gptq(WEIGHTS, SECOND, 0, short("int4"))[1].fallback is not None


def test_fewer_tokens_than_columns_still_beat_rounding_on_those_tokens() -> None:
    few = inputs()[:40]
    (quantized,), report = gptq([WEIGHTS[0]], few.T @ few, 40, short("int4"))
    assert report.relative is not None
    assert report.relative < 0.5
    assert decode(quantized).abs().max() < 10 * WEIGHTS[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes_any_dtype_and_changes_nothing_that_it_was_given(dtype: torch.dtype) -> None:
    weight, second = WEIGHTS[0].to(dtype), SECOND.double()
    before = weight.clone(), second.clone()
    (quantized,), _ = gptq([weight], second, TOKENS, short("int4"), scale_dtype=torch.float16)
    assert quantized.scales.dtype == torch.float16
    assert torch.equal(weight, before[0])
    assert torch.equal(second, before[1])
    (other,), _ = gptq([weight.float()], SECOND, TOKENS, short("int4"), scale_dtype=torch.float16)
    assert (quantized.codes == other.codes).double().mean() > 0.99


def test_contradictions() -> None:
    int4 = SCHEMES["int4"]
    assert contradiction(GptqOptions(), int4) is None
    assert "updated" in (contradiction(GptqOptions(order="static", scales="updated"), int4) or "")
    assert "damping" in (contradiction(GptqOptions(damping=-0.1), int4) or "")
    assert "block" in (contradiction(GptqOptions(block=0), int4) or "")
    assert GptqOptions().order_for(replace(int4, search="mse")) == "grouped"
    assert GptqOptions().order_for(int4) == "static"


@pytest.mark.parametrize("name", ["int4", "int4-asym", "nvfp4"])
def test_a_search_of_its_own_is_that_of_the_scheme_and_leaves_the_scheme_as_it_was(name: str) -> None:
    plain = short(name)
    own = run(plain, GptqOptions(search="mse"))
    asked = run(replace(plain, search="mse"), GptqOptions())
    for one, other, weight in zip(own, asked, WEIGHTS, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))
        assert (one.scheme, other.scheme.search) == (plain, "mse")
        assert loss(weight, one) < loss(weight, run(plain, GptqOptions(order="grouped"), [weight])[0])
    ordered = run(plain, GptqOptions(search="mse", order="dynamic"))[0].scheme if plain.kind == "int" else None
    assert ordered is None or ordered == replace(plain, ordered=True)
