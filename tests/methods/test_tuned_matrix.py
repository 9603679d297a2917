from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwench.methods import tuned_matrix
from qwench.methods.straight_through import centred
from qwench.methods.tuned_matrix import TunedMatrix, round_trip_of, tuning_complaint
from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode
from tests.methods import toys
from tests.references import autoround as literal
from tests.references.rounding import f32

FULL, ASYMMETRIC = Scheme("int", 4, group=8, full_range=True), Scheme("int", 4, group=8, symmetric=False)
ALL = [FULL, ASYMMETRIC, Scheme("int", 8, group=16), Scheme("int", 4), SCHEMES["nvfp4"]]


def values_of(matrix: TunedMatrix) -> Tensor:
    values = torch.empty(matrix.weight.shape)
    matrix.values(values)
    return values


@pytest.mark.parametrize("scheme", [FULL, ASYMMETRIC], ids=lambda s: s.label)
def test_steps_equal_the_literal_version(scheme: Scheme) -> None:
    weight = toys.random(5, 24, seed=1)
    weight[0, :8].abs_()
    weight[1, :8] = -weight[1, :8].abs()
    matrix = TunedMatrix(weight, scheme, None, torch.float32)
    groups = [[literal.Group([f32(v) for v in part], [f32(0)] * 8) for part in row.view(3, 8).numpy()] for row in weight]
    for seed in range(2, 6):
        gradient = toys.random(5, 24, seed=seed)
        gradient[3, :4] = 0
        matrix.step(gradient, 0.11, 0.11)
        for row, slopes in zip(groups, gradient.view(5, 3, 8).tolist(), strict=True):
            for group, slope in zip(row, slopes, strict=True):
                literal.step(group, slope, 0.11, scheme.symmetric)
    for name, wanted in {
        "offset": [[float(v) for g in row for v in g.offsets] for row in groups],
        "low": [[float(g.low) for g in row] for row in groups],
        "high": [[float(g.high) for g in row] for row in groups],
    }.items():
        assert torch.allclose(getattr(matrix.tuning, name), torch.tensor(wanted), atol=1e-6), name
    assert matrix.quantized().codes.tolist() == [
        [q for g in row for q in literal.codes(g, scheme.symmetric)[0]] for row in groups
    ]
    assert (matrix.tuning.offset != 0).any()
    assert (matrix.tuning.high < 1).any()


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_start_is_rounding_to_nearest(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = toys.random(7, 48, seed=2).to(dtype)
    got, want = TunedMatrix(weight, scheme, None, torch.float16).quantized(), encode(weight, scheme, scale_dtype=torch.float16)
    assert torch.equal(got.codes, want.codes)
    assert got.scales.dtype == want.scales.dtype
    assert torch.equal(got.scales.float(), want.scales.float())
    assert torch.equal(decode(got), decode(want))
    assert round_trip_of(weight, got).mean_abs == pytest.approx(want.error.mean_abs, rel=1e-5)  # type: ignore[union-attr]
    assert round_trip_of(weight, got).max_abs == pytest.approx(want.error.max_abs, rel=1e-6)  # type: ignore[union-attr]
    assert round_trip_of(weight, got).relative_rms == pytest.approx(want.error.relative_rms, rel=1e-5)  # type: ignore[union-attr]


def elsewhere(weight: Tensor, scheme: Scheme) -> Quantized:
    """Codes that are not the nearest ones, under scales that are not the plain ones, as error feedback chooses them."""
    searched = replace(scheme, search="mse")
    return replace(encode(weight + 0.5 * weight.std() * toys.random(*weight.shape, seed=50), searched), scheme=scheme)


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_a_start_that_is_given_is_the_start(scheme: Scheme) -> None:
    weight = toys.random(7, 48, seed=2)
    start = elsewhere(weight, scheme)
    got = TunedMatrix(weight, scheme, None, torch.bfloat16, start).quantized()
    assert torch.equal(got.scales.float(), start.scales.float())
    assert torch.equal(decode(got), decode(start)), "a zero may have another sign"
    if start.zeros is not None:
        assert torch.equal(got.zeros, start.zeros)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_a_weight_stays_as_near_to_itself_as_its_code_allows(scheme: Scheme) -> None:
    weight = toys.random(7, 48, seed=2)
    near, far = encode(weight, scheme), elsewhere(weight, scheme)
    moved = (centred(weight, near) != weight).float().mean()
    assert moved < 0.1, "only those at the very edge of their cell"
    centre = centred(weight, far)
    assert 0.2 < (centre != weight).float().mean() < 1
    between = (centre - weight).abs() <= (decode(far) - weight).abs() + 1e-6
    assert between.all()


def test_scales_of_a_given_start_can_grow() -> None:
    weight = toys.random(5, 24, seed=1)
    matrix = TunedMatrix(weight, FULL, None, torch.float32, elsewhere(weight, FULL))
    plain = TunedMatrix(weight, FULL, None, torch.float32)
    for seed in range(2, 6):
        for one in (matrix, plain):
            one.step(toys.random(5, 24, seed=seed), 0.1, 0.1)
    assert matrix.tuning.high.max() > 1
    assert plain.tuning.high.max() == 1


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_values_are_those_of_the_codes_whatever_the_portions(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = toys.random(7, 48, seed=3).bfloat16()
    whole, pieces = (TunedMatrix(weight, scheme, None, torch.bfloat16) for _ in range(2))
    for matrix, elements in ((whole, 1 << 22), (pieces, 100)):
        monkeypatch.setitem(tuned_matrix.ELEMENTS, "cpu", elements)
        for seed in range(4, 8):
            matrix.step(toys.random(7, 48, seed=seed), 0.2, 0.2)
        assert torch.equal(values_of(matrix), decode(matrix.quantized()))
    assert torch.equal(values_of(whole), values_of(pieces))
    assert not torch.equal(values_of(whole), decode(encode(weight, scheme)))
    for bound, name in ((0.5, "offset"), (1, "low"), (1, "high")):
        assert float(getattr(whole.tuning, name).abs().max()) <= bound, name


def test_what_cannot_be_tuned_says_so() -> None:
    assert tuning_complaint(SCHEMES["int4"], (3, 256)) is None
    assert "does not divide rows of 200" in str(tuning_complaint(SCHEMES["int4"], (3, 200)))
    assert "fp8" in str(tuning_complaint(SCHEMES["fp8"], (3, 256)))
