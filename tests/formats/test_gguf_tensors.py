"""Names, shapes and sources of a GGUF file's tensors, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.errors import CheckpointError
from qwench.formats.gguf_tensors import Content, GgufTensor, gguf_tensors
from qwench.models import map_of, sketch
from tests.support.tiny import tiny_config, write_tiny

DELTA = {
    "attn_norm.weight": (128,), "post_attention_norm.weight": (128,),
    "attn_qkv.weight": (704, 128), "attn_gate.weight": (512, 128), "ssm_alpha.weight": (8, 128), "ssm_beta.weight": (8, 128),
    "ssm_conv1d.weight": (704, 4), "ssm_a": (8,), "ssm_dt.bias": (8,), "ssm_norm.weight": (64,), "ssm_out.weight": (128, 512),
    "ffn_gate.weight": (640, 128), "ffn_up.weight": (640, 128), "ffn_down.weight": (128, 640),
}  # fmt: skip
ATTENTION = {
    "attn_norm.weight": (128,), "post_attention_norm.weight": (128,),
    "attn_q.weight": (768, 128), "attn_k.weight": (192, 128), "attn_v.weight": (192, 128), "attn_output.weight": (128, 384),
    "attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,),
    "ffn_gate.weight": (640, 128), "ffn_up.weight": (640, 128), "ffn_down.weight": (128, 640),
}  # fmt: skip
HEAD = {"nextn.eh_proj.weight": (128, 256)} | {f"nextn.{n}.weight": (128,) for n in ("enorm", "hnorm", "shared_head_norm")}
OUTSIDE = {"token_embd.weight": (352, 128), "output_norm.weight": (128,), "output.weight": (352, 128)}
BLOCKS = [*[(i, DELTA) for i in range(3)], (3, ATTENTION), (4, ATTENTION | HEAD)]


def planned(content: Content, **arguments: Any) -> dict[str, GgufTensor]:
    source = sketch(tiny_config(**arguments))
    return {t.name: t for t in gguf_tensors(source.config, map_of(source), content)}


def shapes(numbers: range) -> dict[str, tuple[int, ...]]:
    return OUTSIDE | {f"blk.{i}.{name}": shape for i, block in BLOCKS if i in numbers for name, shape in block.items()}


@pytest.mark.parametrize(("content", "numbers"), [("model", range(5)), ("trunk", range(4)), ("mtp", range(4, 5))])
def test_a_dense_model_tensor_by_tensor(content: Content, numbers: range) -> None:
    assert {n: t.shape for n, t in planned(content).items()} == shapes(numbers)


def test_a_moe_stacks_its_experts() -> None:
    found = planned("model", moe=True)
    assert found["blk.1.ffn_gate_exps.weight"].shape == found["blk.4.ffn_up_exps.weight"].shape == (6, 256, 128)
    assert found["blk.1.ffn_down_exps.weight"].shape == (6, 128, 256)
    assert found["blk.1.ffn_gate_inp.weight"].shape == (6, 128)
    assert found["blk.1.ffn_gate_inp_shexp.weight"].shape == (1, 128)
    assert found["blk.1.ffn_down_shexp.weight"].shape == (128, 640)
    assert [s.expert for s in found["blk.4.ffn_down_exps.weight"].slots] == list(range(6))


def test_float32_is_for_vectors_norms_routers_and_convolutions() -> None:
    found = planned("model", moe=True)
    kept = {n.rpartition("blk.")[2].partition(".")[2] for n, t in found.items() if t.float32 and n.startswith("blk.0")}
    assert kept == {
        "attn_norm.weight", "post_attention_norm.weight", "ssm_conv1d.weight", "ssm_a", "ssm_dt.bias", "ssm_norm.weight",
        "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight",
    }  # fmt: skip
    assert not found["token_embd.weight"].float32 and not found["blk.4.nextn.eh_proj.weight"].float32


def test_a_tied_head_is_not_stored() -> None:
    assert "output.weight" not in planned("model", tied=True)


def test_every_layout_has_the_same_tensors(tmp_path: Path) -> None:
    found = []
    for layout, experts, head in (("conditional", "fused", "published"), ("causal", "single", "fused")):
        folder = write_tiny(
            tmp_path / layout, moe=True, layout=layout, trunk_experts=experts, mtp=head, vision=layout == "conditional"
        )  # type: ignore[arg-type]
        with Checkpoint.open(folder) as source:
            found.append([(t.name, t.shape, t.transforms) for t in gguf_tensors(source.config, map_of(source), "model")])
    assert found[0] == found[1]


def library_names(arch: gguf.MODEL_ARCH) -> set[str]:
    return {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[arch]}


@pytest.mark.parametrize("moe", [False, True])
def test_the_trunks_names_are_those_of_the_gguf_library(moe: bool) -> None:
    known = library_names(gguf.MODEL_ARCH.QWEN35MOE if moe else gguf.MODEL_ARCH.QWEN35)
    for name in planned("trunk", moe=moe):
        stem = name.removesuffix(".weight").removesuffix(".bias")
        number = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{number}.", "blk.{bid}.", 1) in known or stem in known, name


def test_the_towers_names_are_those_of_the_gguf_library() -> None:
    config = tiny_config()
    config["vision_config"]["deepstack_visual_indexes"] = [1]
    source = sketch(config)
    known = library_names(gguf.MODEL_ARCH.MMPROJ)
    names = [t.name for t in gguf_tensors(source.config, map_of(source), "vision")]
    assert {"v.deepstack.1.norm.weight", "v.deepstack.1.fc1.bias", "mm.0.weight", "mm.2.bias", "v.patch_embd.weight.1"} < set(
        names
    )
    for name in names:
        stem = name.removesuffix(".1").removesuffix(".weight").removesuffix(".bias")
        generic = [stem.replace(f".{i}", ".{bid}", 1) for i in range(3)]
        assert stem in known or any(g in known for g in generic), name


def test_no_head_and_no_tower() -> None:
    with pytest.raises(CheckpointError, match="no MTP head"):
        planned("mtp", mtp=False)
    with pytest.raises(CheckpointError, match="no vision tower"):
        planned("vision", vision=False)


def test_a_patch_of_another_number_of_frames_is_refused() -> None:
    config = tiny_config()
    config["vision_config"]["temporal_patch_size"] = 3
    source = sketch(config)
    with pytest.raises(CheckpointError, match=r"embeds 3 frames at a time, llama.cpp knows 2"):
        gguf_tensors(source.config, map_of(source), "vision")
