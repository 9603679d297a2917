"""The text-only layout: names, config, and that transformers computes the same from it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qwench.models.geometry import read_geometry
from qwench.models.layout import config_with_mtp, is_text_only, text_only_config, text_only_name
from qwench.recipe import parse_recipe
from qwench.run import run_recipe
from tests.support.tiny import tiny_config, tiny_shapes, write_tiny
from tests.test_run import QUIET

TEXT = "name: t\nsteps:\n  - export: {layout: text}\n"


@pytest.mark.parametrize("moe", [False, True])
def test_names_and_config_are_those_of_the_causal_layout(moe: bool) -> None:
    config = tiny_config(moe=moe)
    before = copy.deepcopy(config)
    text = text_only_config(config)
    expected = tiny_config(moe=moe, layout="causal")
    for key in ("mrope_section", "mrope_interleaved"):
        del expected["rope_parameters"][key]
    assert text == expected
    names = {text_only_name(name) for name in tiny_shapes(config)} - {None}
    assert names == tiny_shapes(expected).keys()
    assert config == before, "the config of the source is left alone"
    assert read_geometry(text) == read_geometry(config)


def test_a_text_only_config_is_left_as_it_is() -> None:
    config = tiny_config(layout="causal")
    assert text_only_config(config) == config
    assert is_text_only(config) and not is_text_only(tiny_config())


def test_the_top_level_wins_as_it_does_for_readers() -> None:
    config = tiny_config(tied=False) | {"tie_word_embeddings": True, "eos_token_id": 17, "transformers_version": "5.2.0"}
    config["text_config"]["eos_token_id"] = 18
    text = text_only_config(config)
    assert (text["tie_word_embeddings"], text["eos_token_id"], text["transformers_version"]) == (True, 17, "5.2.0")
    assert not any("vision" in key or "image" in key or "video" in key for key in text)


@pytest.mark.parametrize("layout", ["conditional", "causal"])
def test_mtp_layers_are_announced_wherever_readers_look(layout: str) -> None:
    config = tiny_config(layout=layout, mtp=False)  # type: ignore[arg-type]
    changed = config_with_mtp(config, 1)
    assert changed["mtp_num_hidden_layers"] == changed.get("text_config", changed)["mtp_num_hidden_layers"] == 1
    assert config.get("text_config", config)["mtp_num_hidden_layers"] == 0, "the config of the source is left alone"


@pytest.mark.parametrize("moe", [False, True])
def test_transformers_computes_the_same(moe: bool, tmp_path: Path) -> None:
    """The whole model, loaded from either folder by the class that its config names."""
    source = write_tiny(tmp_path / "source", moe=moe)
    run_recipe(parse_recipe(TEXT, "t"), str(source), tmp_path / "text", 1, QUIET)
    ids = torch.randint(0, 300, (2, 23), generator=torch.Generator().manual_seed(5))
    logits = []
    for loader, folder in ((AutoModelForImageTextToText, source), (AutoModelForCausalLM, tmp_path / "text")):
        model, info = loader.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
        )
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert not [key for key in info["unexpected_keys"] if not str(key).startswith("mtp.")]
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
    assert torch.equal(*logits)


def test_transformers_takes_the_number_at_the_top_level_too(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    (source / "config.json").write_text(json.dumps(config_with_mtp(tiny_config(), 1)))
    assert AutoConfig.from_pretrained(source).mtp_num_hidden_layers == 1
