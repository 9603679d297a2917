"""The bytes of a GGUF file: every value where it belongs, whatever the layout; never half a file; a little in memory at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.source import Part
from qwench.demo import checkpoint
from qwench.errors import CheckpointError, OutputError
from qwench.formats import gguf_writer
from qwench.formats.gguf import Override, plan_gguf
from qwench.formats.gguf_importance import Entry, Importance
from qwench.formats.gguf_writer import file_bytes, write_gguf
from qwench.models import map_of
from qwench.numerics import ggml
from tests.support.gguf_files import make_gguf, metadata_of, tensors_of
from tests.support.oracle import borrow_sidecars, write_runnable
from tests.support.tiny import Experts, Layout, save_checkpoint, tiny_shapes, tiny_tensors

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stored(folder: Path) -> Any:
    source = Checkpoint.open(folder)
    return lambda name: source.read(name).float()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("moe") / "m", moe=True)


@pytest.fixture(scope="module")
def written(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Tensor]]:
    return tensors_of(make_gguf(moe, tmp_path_factory.mktemp("gguf") / "m.gguf"))


def test_values(moe: Path, written: dict[str, tuple[str, Tensor]]) -> None:
    """Written out one by one, from the meaning of each transform."""
    at, layer = stored(moe), "model.language_model.layers.1."
    values = {name: tensor for name, (_, tensor) in written.items()}
    assert torch.equal(values["blk.1.attn_norm.weight"], at(f"{layer}input_layernorm.weight") + 1)
    assert torch.equal(values["blk.1.ssm_norm.weight"], at(f"{layer}linear_attn.norm.weight"))
    assert torch.equal(values["output_norm.weight"], at("model.language_model.norm.weight") + 1)
    heads = torch.tensor([0, 3, 1, 4, 2, 5])  # of 2 keys and 6 values, grouped, in tiled order
    decay = -at(f"{layer}linear_attn.A_log").exp()
    assert torch.equal(values["blk.1.ssm_a"], decay[heads])
    assert torch.equal(values["blk.1.ssm_beta.weight"], at(f"{layer}linear_attn.in_proj_b.weight")[heads])
    gate = at(f"{layer}linear_attn.in_proj_z.weight").view(6, 64, -1)
    assert torch.equal(values["blk.1.attn_gate.weight"].view(6, 64, -1), gate[heads])
    mixed, expected = values["blk.1.attn_qkv.weight"], at(f"{layer}linear_attn.in_proj_qkv.weight")
    assert torch.equal(mixed[:256], expected[:256])
    assert torch.equal(mixed[256:].view(6, 64, -1), expected[256:].view(6, 64, -1)[heads])
    kernel = at(f"{layer}linear_attn.conv1d.weight").squeeze(1)
    assert torch.equal(values["blk.1.ssm_conv1d.weight"][256:].view(6, 64, 4), kernel[256:].view(6, 64, 4)[heads])
    out = at(f"{layer}linear_attn.out_proj.weight").view(-1, 6, 64)
    assert torch.equal(values["blk.1.ssm_out.weight"].view(-1, 6, 64), out[:, heads])
    fused = at(f"{layer}mlp.experts.gate_up_proj")
    assert torch.equal(values["blk.1.ffn_gate_exps.weight"], fused[:, :256])
    assert torch.equal(values["blk.1.ffn_up_exps.weight"], fused[:, 256:])
    assert torch.equal(values["blk.4.ffn_up_exps.weight"][5], at("mtp.layers.0.mlp.experts.5.up_proj.weight"))
    assert torch.equal(values["blk.4.nextn.eh_proj.weight"], at("mtp.fc.weight"))
    assert torch.equal(values["blk.4.nextn.enorm.weight"], at("mtp.pre_fc_norm_embedding.weight") + 1)
    assert torch.equal(values["blk.4.nextn.shared_head_norm.weight"], at("mtp.norm.weight") + 1)


def test_types(written: dict[str, tuple[str, Tensor]]) -> None:
    assert {t for t, _ in written.values()} == {"BF16", "F32"}
    assert written["blk.1.ffn_gate_inp.weight"][0] == written["blk.1.ssm_conv1d.weight"][0] == "F32"
    assert written["token_embd.weight"][0] == "BF16"


@pytest.mark.parametrize(("layout", "trunk", "head"), [("causal", "single", "single"), ("conditional", "single", "fused")])
def test_layouts_give_the_same_file(moe: Path, layout: Layout, trunk: Experts, head: Experts, tmp_path: Path) -> None:
    """One model in two layouts, the same values: the same bytes."""
    config = json.loads((moe / "config.json").read_text(encoding="utf-8"))
    if layout == "causal":
        config = config["text_config"] | {"architectures": ["Qwen3_5MoeForCausalLM"]}
    with Checkpoint.open(moe) as source:
        tensors = {name: laid_out(source, name) for name in tiny_shapes(config, trunk, head)}
    other = borrow_sidecars(save_checkpoint(tmp_path / "m", config, tensors))
    make_gguf(moe, tmp_path / "a.gguf", name="one")
    make_gguf(other, tmp_path / "b.gguf", name="one")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def laid_out(source: Checkpoint, name: str) -> Tensor:
    """The value that a tensor of another layout has in this one."""
    name = re.sub(r"^model\.(?!language_model|visual)", "model.language_model.", name)
    if name in source.tensors:
        return source.read(name)
    stem, _, rest = name.rpartition("experts.")
    if rest in FUSED:
        return torch.stack([torch.cat([source.read(f"{stem}experts.{e}.{p}.weight") for p in FUSED[rest]]) for e in range(6)])
    expert, projection, _ = rest.split(".")
    fused = next(name for name, parts in FUSED.items() if projection in parts)
    whole = source.read(f"{stem}experts.{fused}", (int(expert),))
    return whole.chunk(len(FUSED[fused]))[FUSED[fused].index(projection)].contiguous()


def test_metadata_of_a_moe(moe: Path, tmp_path: Path) -> None:
    found = metadata_of(make_gguf(moe, tmp_path / "m.gguf", file_type="Q4_K_M", name="A name"))
    numbers = {k.removeprefix("qwen35moe."): v for k, v in found.items() if k.startswith("qwen35moe.")}
    epsilon = numbers.pop("attention.layer_norm_rms_epsilon")
    assert epsilon == pytest.approx(1e-6)
    assert numbers == {
        "block_count": 5, "nextn_predict_layers": 1, "context_length": 512, "embedding_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64,
        "attention.recurrent_layers": [True, True, True, False, False], "full_attention_interval": 4,
        "rope.dimension_count": 16, "rope.dimension_sections": [3, 3, 2, 0], "rope.freq_base": 1e7,
        "ssm.conv_kernel": 4, "ssm.state_size": 64, "ssm.group_count": 2, "ssm.time_step_rank": 6, "ssm.inner_size": 384,
        "expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 640,
    }  # fmt: skip
    assert (found["general.architecture"], found["general.name"], found["general.file_type"]) == ("qwen35moe", "A name", 15)


def test_metadata_without_the_head(moe: Path, tmp_path: Path) -> None:
    found = metadata_of(make_gguf(moe, tmp_path / "m.gguf", content="trunk"))
    assert found["qwen35moe.block_count"] == 4 and "qwen35moe.nextn_predict_layers" not in found


def test_a_tower(tmp_path: Path) -> None:
    folder = checkpoint("dense")
    path = make_gguf(folder, tmp_path / "mmproj.gguf", content="vision")
    values, found, at = tensors_of(path), metadata_of(path), stored(folder)
    assert (found["clip.projector_type"], found["clip.vision.image_size"]) == ("qwen3vl_merger", 192)
    assert found["clip.vision.image_mean"] == [0.5, 0.5, 0.5] and found["general.type"] == "mmproj"
    patches = at("model.visual.patch_embed.proj.weight")
    assert torch.equal(values["v.patch_embd.weight.1"][1], patches[:, :, 1])
    assert values["v.patch_embd.weight"][0] == values["v.position_embd.weight"][0] == "F32"
    assert torch.equal(values["v.blk.1.ffn_down.weight"][1], at("model.visual.blocks.1.mlp.linear_fc2.weight"))
    assert values["v.blk.1.ffn_down.weight"][0] == "BF16" and values["v.blk.1.ln1.bias"][0] == "F32"


@pytest.mark.parametrize("file_type", ["BF16", "Q4_K_M"])
def test_sizes_are_known_before(moe: Path, file_type: str, tmp_path: Path) -> None:
    with Checkpoint.open(moe) as source:
        plan = plan_gguf(source, map_of(source), file_type=file_type)
        size = write_gguf(plan, source, tmp_path / "m.gguf").nbytes
        assert size == (tmp_path / "m.gguf").stat().st_size == file_bytes(plan, source)
    stored_types = {n: t for n, (t, _) in tensors_of(tmp_path / "m.gguf").items()}
    assert stored_types == {t.tensor.name: t.type for t in plan.tensors}


def test_importance_and_overrides_reach_the_bytes(moe: Path, tmp_path: Path) -> None:
    name, generator = "blk.0.ffn_down_exps.weight", torch.Generator().manual_seed(0)
    squares = torch.rand(6, 256, generator=generator)
    counts = torch.tensor([3.0, 0, 3, 3, 3, 3])
    with Checkpoint.open(moe) as source:
        plan = plan_gguf(source, map_of(source), file_type="Q8_0", overrides=[Override("expert.down", "Q4_K")], importance=True)
        write_gguf(plan, source, tmp_path / "m.gguf", importance=Importance({name: Entry(squares, counts)}))
        weight = source.read("model.language_model.layers.0.mlp.experts.down_proj").float()
    found = tensors_of(tmp_path / "m.gguf")[name]
    assert found[0] == "Q4_K"
    for e in range(6):
        weights = squares[e] / 3 if e != 1 else None
        assert torch.equal(found[1][e], ggml.decode("Q4_K", ggml.encode("Q4_K", weight[e], weights), 256))
    assert tensors_of(tmp_path / "m.gguf")["blk.4.ffn_down_exps.weight"][0] == "Q8_0"  # expert.* does not reach into mtp.


def test_small_pieces_give_the_same_file(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gguf(moe, tmp_path / "a.gguf", file_type="Q4_K_M")
    largest, read = 0, Checkpoint.read

    def watched(self: Checkpoint, name: str, part: Part = ()) -> Tensor:
        nonlocal largest
        tensor = read(self, name, part)
        if "embed" in name or "experts" in name:
            largest = max(largest, tensor.numel())
        return tensor

    monkeypatch.setattr(gguf_writer, "ELEMENTS", 1 << 12)
    monkeypatch.setattr(Checkpoint, "read", watched)
    make_gguf(moe, tmp_path / "b.gguf", file_type="Q4_K_M")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert largest <= 1 << 12


def test_nothing_appears_where_writing_fails(moe: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(moe, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = tiny_tensors(tiny_shapes(config))
    tensors["mtp.fc.weight"][3, 4] = float("nan")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_checkpoint(folder, config, tensors)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"mtp.fc.weight holds NaN or infinity, so blk.4.nextn.eh_proj.weight cannot be"):
        make_gguf(folder, tmp_path / "out" / "m.gguf")
    assert not any((tmp_path / "out").iterdir())


def test_a_taken_name_and_a_missing_folder(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        make_gguf(moe, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    with pytest.raises(OutputError, match="does not exist"):
        make_gguf(moe, tmp_path / "nowhere" / "m.gguf")


def test_a_full_disk(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        make_gguf(moe, tmp_path / "m.gguf")
    assert not any(tmp_path.iterdir())


def test_a_folder_without_tokenizer(moe: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(moe, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing, and a GGUF file carries its tokenizer"):
        make_gguf(folder, tmp_path / "m.gguf")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config.json with image_mean"):
        make_gguf(folder, tmp_path / "mmproj.gguf", content="vision")


def test_alignment(moe: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(make_gguf(moe, tmp_path / "m.gguf"))
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)
