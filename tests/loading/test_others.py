"""Formats of other writers: what every engine would make of releases in them, good ones and such as are broken in the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.loading import sglang_schemes, vllm_schemes
from qwench.loading.findings import Finding
from qwench.loading.modelopt import SIDECAR, effective, read_modelopt
from qwench.loading.parts import Member, Module, Stop
from qwench.loading.proof import prove
from qwench.loading.vllm import PACKED, PREFIXES
from tests.loading.others import OTHERS, base, make

ENGINES = ("vllm", "sglang", "sglang-0.5.19", "transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


def findings(folder: Path, engine: str) -> tuple[Finding, ...]:
    with Checkpoint.open(folder) as source:
        return prove(source, engine).findings


@pytest.mark.parametrize("case", OTHERS)
def test_the_worst_in_every_engine(case: str, home: Path) -> None:
    folder = make(home, case)
    worst = [next((f.level for f in findings(folder, engine) if f.level != "note"), "") for engine in ENGINES]
    assert worst == list(OTHERS[case][-1])


def test_what_is_told_names_modules_and_what_mends_them(home: Path) -> None:
    (missing,) = findings(make(home, "fp8: head's names missing from the list"), "vllm")
    assert (
        "mtp.fc" in missing.names
        and "unquantized, and would be cast" in missing.what
        and "modules_to_not_convert" in missing.mend
    )
    (tower,) = findings(make(home, "fp8: tower quantized"), "sglang")
    assert "no scale is applied" in tower.what and "no config mends it" in tower.mend and "qwen3_vl.py" in tower.rule
    (scales,) = findings(make(home, "nvfp4: outer scales differ"), "vllm")
    assert "have different global scales" in scales.what and "in_proj_z 0.000116984" in scales.what
    (stops,) = findings(make(home, "nvfp4: names without language_model"), "vllm")
    assert "and unquantized, there is room for [128, 128]" in stops.what and "the list of what is not quantized" in stops.mend
    (joined,) = findings(make(home, "awq: a joined module listed by its members"), "sglang")
    assert joined.names == ("model.language_model.layers.3.self_attn.qkv_proj",)


def linear(name: str) -> Module:
    return Module(name, name, "linear", (Member(name.rpartition(".")[2], (128, 256), name),))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": []}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}


@pytest.mark.parametrize(
    ("config", "vllm", "sglang"),
    [
        (FP8 | {"activation_scheme": None}, "activation_scheme", "activation_scheme"),
        (FP8 | {"activation_scheme": "static"}, "dynamic ones are read", "blocks"),
        (AWQ | {"bits": 8}, "4 bits are read", ""),
        (AWQ | {"group_size": 48}, "", "groups of 32, 64, 128"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "zero_point None", "zero_point None"),
        (NVFP4 | {"quant_algo": "NVFP4_AWQ"}, "known are FP8", ""),
        (NVFP4 | {"quant_algo": "FP8_PB_WO"}, "", "known are FP8"),
        (NVFP4 | {"quant_algo": "W4A8"}, "known are FP8", "known are FP8"),
        (NVFP4 | {"quant_algo": "MIXED_PRECISION"}, "without `quantized_layers`", "without NVFP4 layers"),
    ],
)
def test_configs_that_an_engine_stops_at(config: dict[str, object], vllm: str, sglang: str) -> None:
    for told, decide in (
        (vllm, lambda: vllm_schemes.decider_of(config, PREFIXES, [])),
        (sglang, lambda: sglang_schemes.decider_of(config, True)),
    ):
        if told:
            with pytest.raises(Stop, match=told):
                decide()
        else:
            decide()


def test_lists_are_read_in_three_ways_by_vllm() -> None:
    """Exact names, parts of names, and wildcards of which the last letter stands for a whole tree."""
    gate_up, packed = linear("language_model.model.layers.1.mlp.gate_up_proj"), PACKED["conditional"]
    ten = linear("language_model.model.layers.10.mlp.down_proj")

    def built(config: dict[str, object], module: Module) -> bool:
        return vllm_schemes.decider_of(config, PREFIXES, []).scheme(module, packed) is not None

    assert built(FP8 | {"modules_to_not_convert": ["gate", "layers.1.mlp"]}, gate_up)
    assert not built(FP8 | {"modules_to_not_convert": ["model.language_model.layers.1.mlp.gate_up_proj"]}, gate_up)
    assert not built(AWQ | {"modules_to_not_convert": ["gate"]}, gate_up)
    tree = NVFP4 | {"ignore": ["model.language_model.layers.1*"]}
    assert not built(tree, gate_up) and not built(tree, ten)  # a part of the name of layer 10, too
    assert built(NVFP4 | {"ignore": ["model.language_model.layers.1.mlp.up_proj*", "model.language_model.layers.1.mlp.x"]}, ten)


def test_sglang_takes_a_text_only_layer_for_one_of_the_head() -> None:
    """Without `model.` before it, a name of the trunk stands in the head's as well: layer 0 kept is the head's layer kept."""
    decider = sglang_schemes.decider_of(FP8 | {"modules_to_not_convert": ["model.layers.0.mlp.down_proj"]}, True)
    assert decider.scheme(linear("model.layers.0.mlp.down_proj"), {}) is None
    assert decider.scheme(linear("mtp.layers.0.mlp.down_proj"), {}) is None
    assert decider.scheme(linear("model.layers.10.mlp.down_proj"), {}) is not None


def test_an_older_modelopt_file_is_found_beside_config_json(home: Path, tmp_path: Path) -> None:
    folder = base(home, "dense", "nvfp4-sidecar")
    with Checkpoint.open(folder) as source:
        assert "quantization_config" not in source.config
        said = read_modelopt(effective(source).config["quantization_config"])
    assert said.algo == "NVFP4" and said.sidecar and "lm_head" in said.exclude and not said.missing
    broken = tmp_path / "m"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / SIDECAR).unlink()
    (broken / SIDECAR).write_text("{")
    with Checkpoint.open(broken) as source, pytest.raises(CheckpointError, match=r"hf_quant_config\.json cannot be read"):
        prove(source, "vllm")
    (broken / SIDECAR).write_text('{"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}')
    (first, *_) = findings(broken, "vllm")
    assert first.level == "refuses" and "lacks group_size, kv_cache_quant_algo" in first.what
    with pytest.raises(CheckpointError, match="quant_algo None"):
        read_modelopt({"quant_method": "modelopt"})
