"""The tower's tensors, with and without DeepStack mergers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from qwench.errors import CheckpointError
from qwench.models import map_of
from qwench.models.vision import vision_claims
from tests.support.memory import MemorySource, tiny_source
from tests.support.tiny import tiny_config, tiny_shapes


def test_deepstack_mergers_are_those_of_the_transformers_class() -> None:
    """Qwen3.5's own class has none; Qwen3-VL's, from which the tower comes, has."""
    vision = tiny_config()["vision_config"] | {"deepstack_visual_indexes": [0, 1, 1]}
    wanted = {k: v for k, v in vision.items() if k != "model_type"}
    with torch.device("meta"):
        model = Qwen3VLVisionModel._from_config(Qwen3VLVisionConfig(**wanted))
    expected = {f"model.visual.{n}": tuple(p.shape) for n, p in model.named_parameters()}
    assert {c.tensor: c.shape for c in vision_claims(vision)} == expected


def test_deepstack_tensors_are_claimed() -> None:
    config = tiny_config()
    config["vision_config"]["deepstack_visual_indexes"] = [1]
    shapes = tiny_shapes(config) | {c.tensor: c.shape for c in vision_claims(config["vision_config"])}
    source = MemorySource(config, {n: torch.zeros(s) for n, s in shapes.items()})
    assert "model.visual.deepstack_merger_list.0.norm.weight" in source.values
    assert map_of(source).other("vision.deepstack_merger_list.0.linear_fc1.weight").shape == (192, 192)


def test_only_matrices_of_linear_layers_are_linear() -> None:
    linear = {s.role for s in map_of(tiny_source()).others if s.linear and s.role.startswith("vision.blocks.0.")}
    assert linear == {f"vision.blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")}


def test_a_config_that_lacks_a_number_is_told() -> None:
    source = tiny_source()
    del source.config["vision_config"]["depth"], source.config["vision_config"]["in_channels"]
    with pytest.raises(CheckpointError, match="vision_config lacks depth, in_channels"):
        map_of(source)
