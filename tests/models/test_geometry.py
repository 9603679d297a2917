"""Dimensions from a config, and every way in which a config can be damaged."""

from __future__ import annotations

from typing import Any

import pytest

from qwench.errors import CheckpointError
from qwench.models.geometry import read_geometry
from tests.support.tiny import tiny_config


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = config["text_config"]
    return text


def test_dimensions_of_a_moe() -> None:
    g = read_geometry(tiny_config(moe=True))
    assert (g.hidden, g.queries, g.keys, g.head) == (128, 384, 192, 96)
    assert (g.delta_keys, g.delta_values, g.convolved, g.kernel) == (80, 896, 1056, 4)
    assert (g.experts, g.chosen, g.expert_width, g.shared_width, g.intermediate) == (6, 2, 256, 640, 0)
    assert g.moe and g.context == 512 and g.mtp_layers == 1


def test_the_pattern_may_be_given_by_its_interval() -> None:
    config = tiny_config()
    stated = read_geometry(config).kinds
    del text_of(config)["layer_types"]
    assert read_geometry(config).kinds == stated


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": None}, "head_dim is None, not a positive whole number"),
        ({"hidden_size": "128"}, "hidden_size is 128, not"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 4"),
        ({"layer_types": ["mamba"] * 4}, "layer_types names mamba"),
        ({"layer_types": None, "full_attention_interval": None}, "which layers have full attention"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
        ({"mtp_num_hidden_layers": "one"}, "mtp_num_hidden_layers is one"),
    ],
)
def test_a_damaged_config_is_told(change: dict[str, Any], said: str) -> None:
    config = tiny_config(moe=True)
    text_of(config).update(change)
    with pytest.raises(CheckpointError, match=said):
        read_geometry(config)


def test_everything_that_is_missing_is_told_at_once() -> None:
    config = tiny_config()
    for name in ("vocab_size", "linear_conv_kernel_dim", "intermediate_size"):
        del text_of(config)[name]
    with pytest.raises(CheckpointError) as caught:
        read_geometry(config)
    assert str(caught.value).count("missing") == 3


def test_tying_is_the_outer_configs_word() -> None:
    config = tiny_config(tied=True)
    text_of(config)["tie_word_embeddings"] = False
    assert read_geometry(config).tied
    assert read_geometry(tiny_config(layout="causal", tied=True)).tied
