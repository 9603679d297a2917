"""Mending metadata: what is kept, what is refused, and that tensors stay as they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import OutputError
from qwench.formats import FORMATS
from qwench.loading.proof import TABLES, prove
from qwench.steps.checks.mend import Reconfigured, mended, mentioned_schemes, stored_schemes, write_config
from tests.loading.cases import make, release, variant

CURED = [
    "head's shards in ignore", "fc quantized by a broad target", "head's experts missing from ignore", "half of a joined module in ignore",
    "prefix-bound pattern", "gptq dynamic names q alone", "gptq without a pattern for the head", "auto-round stacks by another name",
    "auto-round half of a joined module", "two files and none named", "text-only with image positions",
]  # fmt: skip
BEYOND = ["a global scale differs", "a norm is missing", "unpruned head", "fc stored quantized", "a tensor has another name"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


@pytest.mark.parametrize("case", CURED)
def test_metadata_is_mended_for_every_engine(case: str, home: Path) -> None:
    with Checkpoint.open(make(home, case)) as source:
        assert not all(prove(source, name).good for name in TABLES)
        found = mended(source)
        assert found.told and all(line.startswith("config.json: ") for line in found.told)
        assert all(prove(Reconfigured(source, found.config), name).good for name in TABLES)


@pytest.mark.parametrize("case", BEYOND)
def test_what_lies_in_the_tensors_is_left_alone(case: str, home: Path) -> None:
    with Checkpoint.open(make(home, case)) as source:
        found = mended(source)
        assert found.told == [] and found.config == source.config and found.before == found.after


@pytest.mark.parametrize("recipe", ["int4", "gptq8", "auto-round", "nvfp4a16"])
def test_a_release_that_loads_is_not_changed(recipe: str, home: Path) -> None:
    with Checkpoint.open(release(home, "dense", recipe)) as source:
        found = mended(source)
        assert found.told == [] and found.config == source.config


def test_keys_of_others_and_what_groups_say_beside_their_targets_stay(home: Path, tmp_path: Path) -> None:
    """A config with a key of its writer's own, another version, and an observer that no reader of ours knows."""

    def change(config: dict[str, object]) -> None:
        quantization = config["quantization_config"]
        assert isinstance(quantization, dict)
        quantization |= {"version": "0.9.1", "theirs": [1, 2]}
        quantization["config_groups"]["group_0"]["weights"]["observer"] = "mse"

    with Checkpoint.open(variant(make(home, "prefix-bound pattern"), tmp_path / "m", change)) as source:
        found = mended(source)
    quantization = found.config["quantization_config"]
    assert found.told and quantization["version"] == "0.9.1" and quantization["theirs"] == [1, 2]
    assert quantization["config_groups"]["group_0"]["weights"]["observer"] == "mse"


def test_what_files_hold_decides_what_is_quantized(home: Path) -> None:
    """Of INT8 attention under patterns that engines cannot use: the shapes of the tensors tell the bits."""
    with Checkpoint.open(make(home, "gptq dynamic names q alone")) as source:
        container = FORMATS["gptq"]
        assigned, kept = stored_schemes(source, container)
        labels = {scheme.label for scheme in mentioned_schemes(source.config["quantization_config"], container)}
    attention = {scheme.label for module, scheme in assigned.items() if "self_attn" in module}
    others = {scheme.label for module, scheme in assigned.items() if "self_attn" not in module}
    assert attention == {"int8 g128"} and others == {"int4 g128"} and labels == attention | others
    assert "mtp.fc" in kept and "model.language_model.layers.0.linear_attn.in_proj_a" in kept and not set(kept) & set(assigned)


def test_files_are_replaced_whole_and_tensors_stay(home: Path, tmp_path: Path) -> None:
    folder = variant(make(home, "gptq without a pattern for the head"), tmp_path / "m", lambda config: None)
    tensors = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    original = (make(home, "good dense gptq") / "quantize_config.json").read_bytes()
    with Checkpoint.open(folder) as source:
        config = mended(source).config
    assert write_config(folder, config, FORMATS["gptq"]) == ["quantize_config.json", "config.json"]
    assert json.loads((folder / "config.json").read_text()) == config
    assert json.loads((folder / "quantize_config.json").read_text()) == config["quantization_config"]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")} == tensors
    assert (
        make(home, "good dense gptq") / "quantize_config.json"
    ).read_bytes() == original  # the link was replaced, not what it pointed to
    assert not list(folder.glob(".*"))
    with pytest.raises(OutputError, match="absent"):
        write_config(tmp_path / "absent", config, None)
