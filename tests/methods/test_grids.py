from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwench.methods.grids import Grid
from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode
from tests.methods import toys

SEARCHED = [(name, search) for name in SCHEMES for search in ("none", "mse", "four-over-six")]
SEARCHED = [
    (n, s) for n, s in SEARCHED if s == "none" or (s == "mse" and "fp8" not in n) or (s == "four-over-six" and n == "nvfp4")
]


def short(name: str, search: str = "none") -> Scheme:
    """A named scheme with groups that suit small matrices."""
    scheme = SCHEMES[name]
    return replace(scheme, search=search, group=32 if scheme.kind == "int" else scheme.group)


def grid_for(scheme: Scheme, encoded: Quantized) -> Grid:
    return Grid(scheme, outer=1.0 if encoded.outer is None else float(encoded.outer))


@pytest.mark.parametrize(("name", "search"), SEARCHED)
def test_fits_the_scales_of_the_encoder_and_rounds_as_it_does(name: str, search: str) -> None:
    scheme = short(name, search)
    weight = toys.random(150, 160, seed=1) * torch.logspace(-2, 2, 150).unsqueeze(1)
    encoded = encode(weight, scheme)
    grid = grid_for(scheme, encoded)
    scales = grid.fit(weight.T.contiguous())
    assert scales.stored.dtype == encoded.scales.dtype
    same = encoded.scales.float() == scales.stored.float().T
    # Sums of squares in another order may tip the scales between candidates that are as good.
    assert same.double().mean() >= (1.0 if search == "none" else 0.995)
    if encoded.zeros is not None:
        assert scales.zero_GR is not None
        assert torch.equal(scales.zero_GR.T[same].to(torch.int8), encoded.zeros[same])
    if search == "none":
        assert torch.equal(grid.rounded(weight.T.contiguous()).T, decode(encoded))


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_of_levels_are_those_of_the_encoder(name: str) -> None:
    scheme = short(name)
    weight = toys.random(24, 96, seed=2)
    weight[3, :32] = -1e-9
    encoded = encode(weight, scheme)
    grid = grid_for(scheme, encoded)
    scales, width = grid.fit(weight.T.contiguous()), grid.width(96)
    quotient = weight.T / scales.scale_GR.repeat_interleave(width, 0)[:96]
    if scales.zero_GR is not None:
        quotient += scales.zero_GR.repeat_interleave(width, 0)[:96]
    codes = grid.codes(grid.nearest(quotient)).T
    assert codes.dtype == encoded.codes.dtype
    assert torch.equal(codes.contiguous().view(torch.uint8), encoded.codes.view(torch.uint8))


def test_columns_that_matter_pull_the_search() -> None:
    scheme, weight = short("int4", "mse"), toys.random(300, 64, seed=3).T.contiguous()
    importance = torch.ones(64)
    importance[:4] = 100
    error = [(Grid(scheme).fit(weight, i), i) for i in (None, importance)]
    losses = []
    for scales, _ in error:
        scale = scales.scale_GR.repeat_interleave(32, 0)
        losses.append(float(((Grid(scheme).nearest(weight / scale) * scale - weight).square() * importance.unsqueeze(1)).sum()))
    assert losses[1] < 0.97 * losses[0]
