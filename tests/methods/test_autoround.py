from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.methods.autoround import Homes, Options, Run, batches, is_judged, tune_block
from qwench.methods.gptq import gptq
from qwench.methods.rtn import round_to_nearest, shared_outer
from qwench.numerics import SCHEMES, Quantized, Scheme
from tests.methods import toys
from tests.references import autoround as literal

INT4 = Scheme("int", 4, group=16, full_range=True)
QUICK = Options(iterations=40, judge_rows=None)
ROWS, LENGTH = 40, 13


def correlated(rows: int = ROWS, seed: int = 80) -> Tensor:
    """[rows, LENGTH, HIDDEN] along directions whose sizes fall from 3 to 0.03."""
    directions = torch.linalg.qr(toys.random(toys.HIDDEN, toys.HIDDEN, seed=79))[0]
    return toys.random(rows, LENGTH, toys.HIDDEN, seed=seed) * torch.logspace(0, -2, toys.HIDDEN) * 3 @ directions


def mlp_case() -> tuple[toys.Weights, Tensor, Tensor]:
    """Weights, inputs as earlier quantized blocks make them, and what the original makes of the original inputs."""
    weights, clean = toys.mlp_weights(), correlated()
    return weights, clean + 0.02 * toys.random(*clean.shape, seed=81), toys.mlp(weights, clean)


def rounded(weights: toys.Weights, scheme: Scheme) -> dict[str, Quantized]:
    return {name: round_to_nearest(weight, scheme) for name, weight in weights.items()}


def loss_of(codes: dict[str, Quantized], inputs: Tensor, targets: Tensor, run: Run = toys.mlp) -> float:
    return float((run({name: q.dequantize() for name, q in codes.items()}, inputs) - targets).double().square().mean())


def schemes_of(weights: toys.Weights, scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(weights, scheme)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_literal_version(symmetric: bool) -> None:
    weight, x = toys.random(5, 16, seed=1), toys.random(9, 8, seed=2) @ toys.random(8, 16, seed=3)
    y = x @ weight.T
    losses, history = literal.tune(weight.numpy(), 8, x.double().numpy(), y.double().numpy(), 6, symmetric)
    scheme = Scheme("int", 4, group=8, symmetric=symmetric, full_range=symmetric)
    options = Options(iterations=6, batch=9, judge_every=1, scale_dtype=torch.float32)
    got, report = tune_block(lambda w, rows: rows @ w["w"].T, {"w": weight}, {"w": scheme}, x, y, options)
    assert [loss for _, loss in report.losses] == pytest.approx(losses, rel=1e-4)
    best = min(range(7), key=lambda i: losses[i])
    assert report.best_iteration == best > 0
    assert got["w"].codes.tolist() == history[best]


@pytest.mark.parametrize(
    "scheme",
    [INT4, dataclasses.replace(INT4, full_range=False), dataclasses.replace(SCHEMES["int4-asym"], group=16), SCHEMES["nvfp4"]],
    ids=["full_range", "symmetric", "asymmetric", "nvfp4"],
)
def test_beats_rounding_on_correlated_inputs(scheme: Scheme) -> None:
    weights, inputs, targets = mlp_case()
    options = Options(iterations=200, judge_rows=None)
    got, report = tune_block(toys.mlp, weights, schemes_of(weights, scheme), inputs, targets, options)
    start = loss_of(rounded(weights, scheme), inputs, targets)
    assert report.start_loss == pytest.approx(start, rel=1e-4)
    assert report.best_loss == pytest.approx(loss_of(got, inputs, targets), rel=1e-4)
    assert report.best_loss < 0.7 * start
    assert "less)" in report.says
    # And on rows that it never saw.
    fresh = correlated(seed=90)
    held = fresh + 0.02 * toys.random(*fresh.shape, seed=91), toys.mlp(weights, fresh)
    assert loss_of(got, *held) < 0.9 * loss_of(rounded(weights, scheme), *held)
    for name, quantized in got.items():
        assert 0 < report.changed[name] < 0.6
        assert quantized.error is not None
        nearest = round_to_nearest(weights[name], scheme).error
        assert nearest is not None
        assert nearest.relative_rms < quantized.error.relative_rms < 3 * nearest.relative_rms


def test_eight_bits_too() -> None:
    weights, inputs, targets = mlp_case()
    scheme = Scheme("int", 8, group=16)
    inputs = correlated()  # the noise of the inputs would hide the rounding
    _, report = tune_block(
        toys.mlp, weights, schemes_of(weights, scheme), inputs, targets, Options(iterations=100, judge_rows=None)
    )
    assert report.best_loss < 0.8 * report.start_loss


def test_what_is_returned_is_what_the_loss_saw() -> None:
    weights, inputs, targets = mlp_case()
    seen: list[dict[str, Tensor]] = []

    def watching(w: dict[str, Tensor], x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            seen.append({name: value.clone() for name, value in w.items()})
        return toys.mlp(w, x)

    options = dataclasses.replace(QUICK, iterations=12, judge_every=3, judge_rows=4, scale_dtype=torch.float16)
    got, report = tune_block(watching, weights, schemes_of(weights, INT4), inputs, targets, options)
    assert [step for step, _ in report.losses] == [0, 3, 6, 9, 12]
    assert report.judged_rows == 4
    judged = seen[[step for step, _ in report.losses].index(report.best_iteration)]
    for name, quantized in got.items():
        assert torch.equal(quantized.dequantize(), judged[name])
        assert quantized.scales.dtype == torch.float16


def test_no_steps_is_rounding_to_nearest() -> None:
    weights, inputs, targets = mlp_case()
    got, report = tune_block(toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, Options(iterations=0))
    for name, nearest in rounded(weights, INT4).items():
        assert torch.equal(got[name].codes, nearest.codes)
        assert torch.equal(got[name].scales, nearest.scales)
    assert report.best_iteration == 0
    assert set(report.changed.values()) == {0.0}
    assert report.says.startswith("no step beats rounding to nearest")


def test_the_best_iterate_is_never_worse_than_the_start() -> None:
    """Steps so wild that they only do harm."""
    weights, inputs, targets = mlp_case()
    options = dataclasses.replace(QUICK, iterations=8, rate=30.0, judge_every=2)
    got, report = tune_block(toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, options)
    assert max(loss for _, loss in report.losses) > 2 * report.start_loss
    assert report.best_loss == min(loss for _, loss in report.losses) <= report.start_loss
    assert loss_of(got, inputs, targets) == pytest.approx(report.best_loss, rel=1e-4)


def test_where_nothing_is_left_to_gain_the_start_is_kept() -> None:
    weights = {name: q.dequantize() for name, q in rounded(toys.mlp_weights(), INT4).items()}
    inputs = correlated(rows=4)
    got, report = tune_block(
        toys.mlp, weights, schemes_of(weights, INT4), inputs, toys.mlp(weights, inputs), Options(iterations=4)
    )
    assert report.start_loss == report.best_loss == 0
    assert report.best_iteration == 0
    assert report.unreached == tuple(sorted(weights))
    assert all(torch.equal(got[name].dequantize(), weight) for name, weight in weights.items())


def test_same_seed_same_codes_other_seed_other_codes() -> None:
    weights, inputs, targets = mlp_case()
    runs = [
        tune_block(
            toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, dataclasses.replace(QUICK, iterations=10, seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    for name in weights:
        assert torch.equal(runs[0][0][name].codes, runs[1][0][name].codes)
        assert torch.equal(runs[0][0][name].scales, runs[1][0][name].scales)
    assert runs[0][1] == runs[1][1]
    assert any(not torch.equal(runs[0][0][name].codes, runs[2][0][name].codes) for name in weights)


def test_inputs_of_the_quantized_blocks_are_compensated() -> None:
    """With inputs that are off by a known factor, tuning on them beats tuning on the clean ones."""
    weights, clean = toys.mlp_weights(), correlated()
    shifted, targets = 0.93 * clean, toys.mlp(weights, clean)
    aware, _ = tune_block(toys.mlp, weights, schemes_of(weights, INT4), shifted, targets, QUICK)
    unaware, _ = tune_block(toys.mlp, weights, schemes_of(weights, INT4), clean, targets, QUICK)
    assert loss_of(aware, shifted, targets) < 0.8 * loss_of(unaware, shifted, targets)


def test_portions_that_fit_memory_make_the_same_steps() -> None:
    weights, inputs, targets = mlp_case()
    largest = 0

    def watching(w: dict[str, Tensor], x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return toys.mlp(w, x)

    options = dataclasses.replace(QUICK, iterations=12, judge_every=4)
    free, report = tune_block(watching, weights, schemes_of(weights, INT4), inputs, targets, options)
    assert largest == report.rows_at_once == 8
    assert report.bytes_per_row is None
    probe = tune_block(
        toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, dataclasses.replace(options, activation_limit=1)
    )
    bytes_per_row = probe[1].bytes_per_row
    assert bytes_per_row is not None
    # Kept for one row: its input, gate, SiLU's sigmoid or input, up, their product, error: between 3 and 8 activations of the inner size.
    assert 3 <= bytes_per_row / (4 * LENGTH * toys.INNER) <= 8
    assert probe[1].rows_at_once == 1
    largest = 0
    tight, report = tune_block(
        watching,
        weights,
        schemes_of(weights, INT4),
        inputs,
        targets,
        dataclasses.replace(options, activation_limit=3 * bytes_per_row),
    )
    assert largest == report.rows_at_once == 3
    for name in weights:
        assert float((tight[name].codes != free[name].codes).float().mean()) < 0.01
    assert report.best_loss == pytest.approx(
        tune_block(toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, options)[1].best_loss, rel=0.02
    )


def test_measuring_what_rows_take_leaves_nothing_behind() -> None:
    """Nodes that keep their own output (exp, sigmoid) hold themselves where a hook gives it back to them."""
    weights, inputs, targets = mlp_case()
    seen: list[weakref.ref[Tensor]] = []

    def run(w: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = torch.exp(-F.linear(x, w["mlp.gate"]).square())
        seen.append(weakref.ref(inner))
        return F.linear(inner * F.linear(x, w["mlp.up"]), w["mlp.down"])

    options = dataclasses.replace(QUICK, iterations=1, activation_limit=2**30)
    tune_block(run, weights, schemes_of(weights, INT4), inputs, targets, options)
    assert seen and all(tensor() is None for tensor in seen)


def test_experts_that_no_token_reaches_stay_at_the_nearest_and_are_named() -> None:
    weights, inputs = toys.moe_weights(), correlated(rows=8) + 1
    weights["router"][3] = -5.0
    tuned = {f"expert.{part}.{j}": weights[f"expert.{part}"][j] for part in ("gate", "up", "down") for j in range(toys.EXPERTS)}

    def run(w: dict[str, Tensor], x: Tensor) -> Tensor:
        stacked = {
            f"expert.{p}": torch.stack([w[f"expert.{p}.{j}"] for j in range(toys.EXPERTS)]) for p in ("gate", "up", "down")
        }
        return toys.moe(weights | stacked, x)

    targets = toys.moe(weights, inputs)
    got, report = tune_block(run, tuned, schemes_of(tuned, INT4), inputs, targets, dataclasses.replace(QUICK, iterations=10))
    assert report.unreached == ("expert.down.3", "expert.gate.3", "expert.up.3")
    for name in report.unreached:
        assert torch.equal(got[name].codes, round_to_nearest(tuned[name], INT4).codes)
    assert report.best_loss < report.start_loss


def test_experts_in_one_parameter_are_tuned_where_they_lie() -> None:
    """The same codes as with a parameter for each expert, and no second copy of the parameter."""
    weights, inputs = toys.moe_weights(), correlated(rows=8) + 1
    parts = [(part, j) for part in ("gate", "up", "down") for j in range(toys.EXPERTS) if (part, j) != ("up", 2)]
    tuned = {f"expert.{part}.{j}": weights[f"expert.{part}"][j].clone() for part, j in parts}
    targets = toys.moe(weights, inputs)
    options = dataclasses.replace(QUICK, iterations=10)

    def stacking(w: dict[str, Tensor], x: Tensor) -> Tensor:
        every = {f"expert.{p}": weights[f"expert.{p}"].unbind() for p in ("gate", "up", "down")}
        stacked = {
            name: torch.stack([w.get(f"{name}.{j}", expert) for j, expert in enumerate(experts)])
            for name, experts in every.items()
        }
        return toys.moe(weights | stacked, x)

    apart, _ = tune_block(stacking, tuned, schemes_of(tuned, INT4), inputs, targets, options)
    places = {f"expert.{part}.{j}": (f"expert.{part}", (j,)) for part, j in parts}
    parameters = {f"expert.{part}": weights[f"expert.{part}"].clone() for part in ("gate", "up", "down")}
    seen: set[int] = set()

    def in_place(w: dict[str, Tensor], x: Tensor) -> Tensor:
        seen.update(t.data_ptr() for t in w.values())
        return toys.moe(weights | w, x)

    together, report = tune_block(
        in_place, tuned, schemes_of(tuned, INT4), inputs, targets, options, homes=Homes(parameters, places)
    )
    assert seen == {t.data_ptr() for t in parameters.values()}
    assert report.best_iteration > 0
    for name in tuned:
        assert torch.equal(together[name].codes, apart[name].codes)
    assert torch.equal(parameters["expert.up"][2], weights["expert.up"][2]), "what is not tuned stays"


def test_rows_are_read_when_they_are_needed() -> None:
    weights, inputs, targets = mlp_case()
    most = 0

    class Watched:
        def __init__(self, rows: Tensor) -> None:
            self.rows, self.shape = rows, tuple(rows.shape)

        def pick(self, rows: Tensor, /) -> Tensor:
            nonlocal most
            most = max(most, len(rows))
            return self.rows[rows].bfloat16()

    options = dataclasses.replace(QUICK, iterations=3, batch=5, judge_every=3)
    lazily, _ = tune_block(toys.mlp, weights, schemes_of(weights, INT4), Watched(inputs), Watched(targets), options)
    held, _ = tune_block(toys.mlp, weights, schemes_of(weights, INT4), inputs.bfloat16(), targets.bfloat16(), options)
    assert most == 5
    for name in weights:
        assert torch.equal(lazily[name].codes, held[name].codes)


def test_tuning_goes_on_from_error_feedback() -> None:
    weights, inputs, targets = mlp_case()
    second = torch.einsum("btd,bte->de", inputs, inputs)
    codes, _ = gptq([weights["mlp.gate"], weights["mlp.up"]], second, inputs[..., 0].numel(), INT4)
    starts = dict(zip(("mlp.gate", "mlp.up"), codes, strict=True))
    options = dataclasses.replace(QUICK, iterations=0)
    got, report = tune_block(toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, options, starts=starts)
    for name, start in starts.items():
        assert torch.equal(got[name].dequantize(), start.dequantize())
    assert report.given
    assert report.start_loss < loss_of(rounded(weights, INT4), inputs, targets)
    assert "no step beats the start" in report.says


def test_a_fused_set_keeps_its_outer_scale() -> None:
    weights, inputs, _ = mlp_case()
    weights["mlp.up"] = weights["mlp.up"] * 0.05
    outer = shared_outer([weights["mlp.gate"], weights["mlp.up"]], SCHEMES["nvfp4"])
    outers = {"mlp.gate": outer, "mlp.up": outer}
    got, _ = tune_block(
        toys.mlp,
        weights,
        schemes_of(weights, SCHEMES["nvfp4"]),
        inputs,
        toys.mlp(weights, inputs),
        dataclasses.replace(QUICK, iterations=4),
        outers,
    )
    assert outer is not None
    for name in outers:
        assert torch.equal(got[name].outer, outer)  # type: ignore[arg-type]
    assert not torch.equal(got["mlp.down"].outer, outer)  # type: ignore[arg-type]


def test_bfloat16_rows() -> None:
    weights, inputs, targets = mlp_case()
    short = {name: weight.bfloat16() for name, weight in weights.items()}
    dtypes: set[torch.dtype] = set()

    def watching(w: dict[str, Tensor], x: Tensor) -> Tensor:
        dtypes.update(t.dtype for t in (*w.values(), x))
        return toys.mlp(w, x)

    _, report = tune_block(watching, short, schemes_of(weights, INT4), inputs, targets.bfloat16(), QUICK)
    assert dtypes == {torch.bfloat16}
    assert report.best_loss < 0.8 * report.start_loss


def test_an_output_that_is_not_finite_stays_rounded_to_nearest_and_says_so() -> None:
    weights, inputs, targets = mlp_case()
    targets[0, 0, 0] = math.nan
    got, report = tune_block(toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, QUICK)
    assert torch.equal(got["mlp.up"].codes, round_to_nearest(weights["mlp.up"], INT4).codes)
    assert "not finite" in report.says
    assert len(report.losses) == 1


def test_the_caller_may_have_switched_gradients_off() -> None:
    weights, inputs, targets = mlp_case()
    with torch.no_grad():
        _, report = tune_block(
            toys.mlp, weights, schemes_of(weights, INT4), inputs, targets, dataclasses.replace(QUICK, iterations=20)
        )
    assert report.best_loss < report.start_loss


def test_batches_use_all_rows_alike_and_none_twice_at_once() -> None:
    seen = list(batches(11, Options(iterations=22, batch=4, seed=5)))
    assert all(len(set(batch.tolist())) == 4 for batch in seen)
    counts = torch.bincount(torch.cat(seen), minlength=11)
    assert counts.tolist() == [8] * 11
    assert [b.tolist() for b in seen] == [b.tolist() for b in batches(11, Options(iterations=22, batch=4, seed=5))]
    assert [len(b) for b in batches(3, Options(iterations=2, batch=8))] == [3, 3]


def test_judgements_begin_where_they_are_told_to() -> None:
    options = Options(iterations=10, judge_every=2, judge_from=0.5)
    assert [step for step in range(1, 11) if is_judged(step, options)] == [6, 8, 10]
    odd = dataclasses.replace(options, iterations=7, judge_from=0.0)
    assert [step for step in range(1, 8) if is_judged(step, odd)] == [2, 4, 6, 7]
