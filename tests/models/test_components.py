"""What a component should hold, and what is wrong with one, in every layout that is published."""

from __future__ import annotations

from typing import Any

import pytest

from qwench.models.components import component_complaints, component_names, differing_numbers
from tests.support.memory import tiny_source
from tests.support.tiny import Head, tiny_config

HEADS: list[tuple[bool, Head, int]] = [(False, "dense", 15), (True, "fused", 19), (True, "single", 17 + 3 * 6)]


@pytest.mark.parametrize(("moe", "head", "count"), HEADS)
def test_a_whole_head_has_so_many_tensors_and_no_complaint(moe: bool, head: Head, count: int) -> None:
    source = tiny_source(moe=moe, mtp=head)
    assert len(component_names(source.tensors, "mtp")) == count
    assert list(component_complaints("mtp", source.config, source)) == []
    assert list(component_complaints("vision", source.config, source)) == []


@pytest.mark.parametrize(("moe", "head", "count"), HEADS)
def test_the_one_tensor_that_is_missing_is_named(moe: bool, head: Head, count: int) -> None:
    source = tiny_source(moe=moe, mtp=head)
    del source.values["mtp.layers.0.self_attn.k_norm.weight"]
    (what, _), *rest = component_complaints("mtp", source.config, source)
    assert f"{count - 1} of {count} tensors are stored, missing: mtp.layers.0.self_attn.k_norm.weight" in what
    assert not rest


def test_a_head_held_against_another_config_is_told_with_both_shapes() -> None:
    source, other = tiny_source(), tiny_config()
    other["text_config"]["intermediate_size"] = 384
    found = [what for what, _ in component_complaints("mtp", other, source)]
    assert len(found) == 3
    assert any("mtp.layers.0.mlp.down_proj.weight in memory is [128, 640], [128, 384] is needed" in what for what in found)


def test_a_tensor_of_the_component_that_nobody_knows_is_named() -> None:
    source = tiny_source()
    source.values["mtp.embed_tokens.weight"] = source.values["mtp.fc.weight"]
    assert [what for what, _ in component_complaints("mtp", source.config, source) if "mtp.embed_tokens.weight" in what]


@pytest.mark.parametrize("key", ["hidden_size", "num_key_value_heads", "intermediate_size"])
def test_numbers_that_differ_are_told_with_both_values(key: str) -> None:
    config, other = tiny_config(), tiny_config(layout="causal")
    assert differing_numbers(config, other) == {}
    value: Any = config["text_config"][key]
    other[key] = value + 1
    assert differing_numbers(config, other) == {key: (value, value + 1)}
