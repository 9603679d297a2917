from __future__ import annotations

import dataclasses

import pytest
import torch

from qwench.numerics import SCHEMES, Scheme, complaint, decode, encode


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        (SCHEMES["int4"], (6, 200), "group of 128 does not divide rows of 200"),
        (SCHEMES["nvfp4"], (6, 24), "group of 16 does not divide rows of 24"),
        (SCHEMES["mxfp4"], (6, 48), "group of 32 does not divide rows of 48"),
        (SCHEMES["nvfp4"], (2, 3, 16), "needs a matrix"),
        (SCHEMES["fp8"], (16,), "needs a matrix"),
        (SCHEMES["fp8"], (0, 16), "needs a matrix"),
        (Scheme("nvfp4", 4, group=32), (6, 64), "groups of 16, not 32"),
        (Scheme("mxfp4", 4, group=16), (6, 64), "groups of 32, not 16"),
        (Scheme("int", 3, group=32), (6, 64), "4 or 8 bits"),
        (Scheme("fp8", 4), (6, 64), "has 8 bits"),
        (Scheme("fp8", 8, group=16), (6, 64), "not for a group"),
        (Scheme("fp8", 8, block=(64, 64)), (6, 64), "only fp8 has blocks, of 128x128"),
        (Scheme("int", 4, block=(128, 128)), (6, 64), "only fp8 has blocks"),
        (Scheme("int", 4, group=0), (6, 64), "cannot be"),
        (Scheme("nvfp4", 4, group=16, symmetric=False), (6, 64), "only int can be asymmetric"),
        (Scheme("int", 4, group=32, symmetric=False, full_range=True), (6, 64), "says that it is symmetric"),
        (Scheme("fp8", 8, full_range=True), (6, 64), "full_range is for int"),
        (dataclasses.replace(SCHEMES["nvfp4"], ordered=True), (6, 64), "can be ordered only in int with groups"),
        (Scheme("int", 4, ordered=True), (6, 64), "can be ordered only in int with groups"),
        (dataclasses.replace(SCHEMES["fp8"], search="mse"), (6, 64), "no mse search"),
        (dataclasses.replace(SCHEMES["int4"], search="four-over-six"), (6, 128), "is for nvfp4"),
    ],
)  # fmt: skip
def test_complaints_say_what_is_wrong(scheme: Scheme, shape: tuple[int, ...], words: str) -> None:
    said = complaint(scheme, shape)
    assert said is not None
    assert words in said


@pytest.mark.parametrize("name", SCHEMES)
def test_every_short_name_works_and_says_nothing(name: str) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    scheme = SCHEMES[name]
    assert complaint(scheme, (24, 256)) is None
    got = encode(weight, scheme)
    assert got.scheme == scheme
    assert got.dequantize().shape == weight.shape
    assert got.error is not None
    assert 0 < got.error.relative_rms < 0.15
    assert torch.equal(decode(got), got.dequantize())


def test_partial_blocks_and_words_are_no_reason_to_complain() -> None:
    assert complaint(SCHEMES["fp8-block"], (130, 200)) is None
    assert complaint(Scheme("int", 4, symmetric=False), (7, 13)) is None


def test_weights_are_not_changed() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
        before = weight.clone()
        for scheme in SCHEMES.values():
            encode(weight, scheme)
            assert torch.equal(weight, before)
