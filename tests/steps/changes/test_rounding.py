"""Rounding in a walk: what GPTQ is told of a moment that few tokens were summed up in, and what that is worth on tokens that nobody calibrated on."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from qwench.methods.feedback import GREATEST_DAMPING
from qwench.methods.gptq import GptqOptions, gptq
from qwench.numerics import SCHEMES
from qwench.recipe import GptqSettings
from qwench.steps.changes.rounding import damping_for
from qwench.stream.observe import Moment


def moment(tokens: int, columns: int) -> Moment:
    return Moment(tokens, torch.zeros(columns, columns), torch.zeros(columns))


def test_damping_grows_with_columns_over_tokens_and_ends() -> None:
    plain = GptqSettings()
    assert damping_for(plain, moment(10**7, 256)) == pytest.approx(plain.damping, abs=1e-4)
    assert damping_for(plain, moment(1024, 256)) == pytest.approx(0.03 + 0.5 / 4)
    assert damping_for(GptqSettings(damping=0.1, scarcity=0.25), moment(512, 256)) == pytest.approx(0.1 + 0.25 / 2)
    assert damping_for(plain, moment(3, 256)) == damping_for(plain, moment(0, 256)) == GREATEST_DAMPING
    assert damping_for(GptqSettings(scarcity=0), moment(3, 256)) == 0.03
    with pytest.raises(ValidationError):
        GptqSettings(scarcity=-0.1)


def test_it_is_worth_it_where_tokens_are_few_and_costs_nothing_where_they_are_many() -> None:
    """Error on fresh tokens of one distribution, over damping by 0.03 alone."""
    generator = torch.Generator().manual_seed(8)
    columns, mix = 256, torch.randn(256, 256, generator=generator) / 16 + torch.eye(256)
    weight = torch.randn(96, columns, generator=generator)
    fresh = torch.randn(4000, columns, generator=generator) @ mix
    ratios = []
    for tokens in (200, 20_000):
        inputs = torch.randn(tokens, columns, generator=generator) @ mix
        errors = []
        for settings in (GptqSettings(scarcity=0), GptqSettings()):
            seen = Moment(tokens, inputs.T @ inputs, inputs.abs().sum(0))
            assert seen.second is not None
            options = GptqOptions(damping=damping_for(settings, seen), search="mse")
            (rounded,), _ = gptq([weight], seen.second, tokens, SCHEMES["int4"], options)
            errors.append(float(((rounded.dequantize() - weight) @ fresh.T).square().mean()))
        ratios.append(errors[1] / errors[0])
    assert ratios[0] < 0.85, ratios
    assert 0.98 < ratios[1] < 1.02, ratios
