from __future__ import annotations

import pytest
import torch

from qwench.methods import tuned_matrix
from qwench.methods.tuned_matrix import TunedMatrix, round_trip_of, tuning_complaint
from qwench.numerics import SCHEMES, Scheme, decode, encode
from tests.methods import toys
from tests.references import autoround as literal
from tests.references.rounding import f32

FULL, ASYMMETRIC = Scheme("int", 4, group=8, full_range=True), Scheme("int", 4, group=8, symmetric=False)
ALL = [FULL, ASYMMETRIC, Scheme("int", 8, group=16), Scheme("int", 4), SCHEMES["nvfp4"]]


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


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_values_are_those_of_the_codes_whatever_the_portions(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = toys.random(7, 48, seed=3).bfloat16()
    whole, pieces = (TunedMatrix(weight, scheme, None, torch.bfloat16) for _ in range(2))
    for matrix, elements in ((whole, 1 << 22), (pieces, 100)):
        monkeypatch.setattr(tuned_matrix, "ELEMENTS", elements)
        for seed in range(4, 8):
            matrix.step(toys.random(7, 48, seed=seed), 0.2, 0.2)
        assert torch.equal(matrix.values(torch.float32), decode(matrix.quantized()))
    assert torch.equal(whole.values(torch.float32), pieces.values(torch.float32))
    assert not torch.equal(whole.values(torch.float32), decode(encode(weight, scheme)))
    for bound, name in ((0.5, "offset"), (1, "low"), (1, "high")):
        assert float(getattr(whole.tuning, name).abs().max()) <= bound, name


def test_what_cannot_be_tuned_says_so() -> None:
    assert tuning_complaint(SCHEMES["int4"], (3, 256)) is None
    assert "does not divide rows of 200" in str(tuning_complaint(SCHEMES["int4"], (3, 200)))
    assert "fp8" in str(tuning_complaint(SCHEMES["fp8"], (3, 256)))
