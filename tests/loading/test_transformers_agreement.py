"""The table of transformers' rules against transformers itself, in formats of other writers: which modules it turns into quantized ones, and what comes of files that it does not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as library
from safetensors.torch import load_file
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

from qwench.checkpoint.reader import Checkpoint
from qwench.loading import transformers
from tests.loading.others import OTHERS, make

FP8 = [name for name, (_, kind, _, _, _) in OTHERS.items() if kind.startswith("fp8")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


@pytest.mark.parametrize("case", FP8)
def test_fp8_modules_are_those_that_it_builds(case: str, home: Path) -> None:
    """As on a GPU that has FP8: on a CPU it decodes what it reads."""
    folder = make(home, case)
    with Checkpoint.open(folder) as source:
        (model,) = transformers.models_of(source.config, source.tensors)
    ours = {
        name.removesuffix("_scale_inv"): next(iter(parameter.parts.values()))
        for name, parameter in model.parameters.items()
        if name.endswith("_scale_inv") and ".experts." not in name
    }
    experts = {name.rpartition(".")[0] for name in model.parameters if name.endswith("w2_weight_scale_inv")}
    built = built_by_transformers(folder)
    theirs = {name.removesuffix("_scale_inv"): shape for name, shape in built.items() if ".experts." not in name}
    assert ours == theirs
    assert experts == {name.rpartition(".")[0] for name in built if ".experts." in name}


def built_by_transformers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Scales of weights that it allocates, with their shapes."""
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    seeing = config.architectures[0].endswith("ForConditionalGeneration")
    with torch.device("meta"):
        model = (library.AutoModelForImageTextToText if seeing else library.AutoModelForCausalLM).from_config(config)
    said = FineGrainedFP8Config.from_dict(dict(config.quantization_config))
    quantizer: Any = FineGrainedFP8HfQuantizer(said, pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("_scale_inv")}


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, report = library.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    return model, report


def test_a_method_that_it_does_not_know_is_loaded_as_if_unquantized(home: Path) -> None:
    """ModelOpt's FP8: codes in the place of weights, all scales left over, and no error."""
    folder = make(home, "good dense modelopt fp8")
    model, report = loaded(folder)
    with Checkpoint.open(folder) as source:
        (load,) = transformers.replay(source.config, source.tensors)
    assert set(report["unexpected_keys"]) == {name for name, dropped in load.dropped.items() if not dropped.designed}
    assert not report["missing_keys"] and not load.unfilled
    name = "model.language_model.layers.3.self_attn.k_proj.weight"
    codes = load_file(folder / "model.safetensors")[name].to(torch.bfloat16)
    assert load.casts[name].stored == "fp8" and torch.equal(dict(model.named_parameters())[name].data, codes)


def test_codes_that_do_not_fit_stop_it(home: Path) -> None:
    folder = make(home, "good dense nvfp4")
    with Checkpoint.open(folder) as source:
        (load,) = transformers.replay(source.config, source.tensors)
    assert load.misfits
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(folder)


def test_good_block_fp8_is_decoded(home: Path) -> None:
    folder = make(home, "good moe fp8")
    model, report = loaded(folder)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    stored, name = load_file(folder / "model.safetensors"), "model.language_model.layers.3.self_attn.k_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(dict(model.named_parameters())[name].data, (stored[name].float() * scale).to(torch.bfloat16))
