"""GPTQ's bytes against a literal writer and a literal reader, and what its readers make of our config."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwench.checkpoint.source import TORCH_DTYPE
from qwench.errors import CheckpointError
from qwench.formats.gptq import complaint, layout, notes, pack, quantization_config, scheme_of, sidecars, unpack
from qwench.formats.release import Release, open_source
from qwench.numerics import SCHEMES, Quantized, Scheme, decode, encode
from tests.formats.test_quantization_config import linears
from tests.references import gptq_bytes
from tests.references.engine_names import gptqmodel, vllm_gptq

MODULE = "model.layers.3.mlp.up_proj"
GROUPED = {
    "int4 g32": Scheme("int", 4, group=32),
    "int4 g16 full": Scheme("int", 4, group=16, full_range=True),
    "int8 g32": Scheme("int", 8, group=32),
    "int8 g48 mse": Scheme("int", 8, group=48, search="mse"),
}
SEVERAL = GROUPED | {"int4 channel": Scheme("int", 4, full_range=True), "int8 channel": Scheme("int", 8)}
SHAPES = [(24, 96), (8, 192)]
CASES = [
    (name, order, shape) for name in SEVERAL for order in (False, True) if name in GROUPED or not order for shape in SHAPES
]


def quantized_of(
    scheme: Scheme, shape: tuple[int, int], ordered: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Quantized:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    weight[1] *= 30
    rounded = encode(weight, scheme, scale_dtype=dtype)
    if not ordered:
        return rounded
    places = torch.randperm(shape[1], generator=generator).to(torch.int32)
    scheme = dataclasses.replace(scheme, ordered=True)
    return dataclasses.replace(rounded, scheme=scheme, group_of_column=places // (scheme.group or shape[1]), error=None)


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{MODULE}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "ordered", "shape"), CASES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_layout_promises_what_pack_returns(name: str, ordered: bool, shape: tuple[int, int], dtype: str) -> None:
    written = quantized_of(SEVERAL[name], shape, ordered, TORCH_DTYPE[dtype])
    tensors = pack(MODULE, written)
    promised = {s.name: (TORCH_DTYPE[s.dtype], s.shape) for s in layout(MODULE, shape, written.scheme, dtype)}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == promised
    assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize(("name", "ordered", "shape"), CASES)
def test_unpack_is_the_inverse_of_pack(name: str, ordered: bool, shape: tuple[int, int]) -> None:
    written = quantized_of(SEVERAL[name], shape, ordered)
    read = unpack(MODULE, pack(MODULE, written), written.scheme, shape)
    assert torch.equal(read.codes, written.codes)
    assert read.scales.dtype == written.scales.dtype and torch.equal(read.scales, written.scales)
    assert read.zeros is None
    assert (read.group_of_column is None) == (not ordered)
    assert not ordered or torch.equal(read.group_of_column, written.group_of_column)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "ordered", "shape"), CASES)
def test_bytes_are_those_of_a_literal_writer(name: str, ordered: bool, shape: tuple[int, int]) -> None:
    written = quantized_of(SEVERAL[name], shape, ordered)
    bits, groups, half = written.scheme.bits, written.scales.shape[1], 2 ** (written.scheme.bits - 1)
    order = (
        written.group_of_column.tolist()
        if written.group_of_column is not None
        else [i // (shape[1] // groups) for i in range(shape[1])]
    )
    codes = written.codes.int() + half
    expected = gptq_bytes.write(codes, written.scales, torch.full((shape[0], groups), half), order, bits, less=1)
    ours = bare(pack(MODULE, written))
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@pytest.mark.parametrize(("name", "ordered", "shape"), CASES)
def test_a_literal_reader_decodes_our_values(name: str, ordered: bool, shape: tuple[int, int]) -> None:
    written = quantized_of(SEVERAL[name], shape, ordered)
    read = gptq_bytes.read(bare(pack(MODULE, written)), written.scheme.bits, more=1, group=written.scheme.group or shape[1])
    assert torch.equal(read, decode(written))


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_words(bits: int, word: int) -> None:
    tensors = pack(MODULE, quantized_of(Scheme("int", bits, group=32), (24, 96)))
    assert set(tensors[f"{MODULE}.qzeros"].flatten().tolist()) == {word}


def test_without_order_g_idx_counts_groups() -> None:
    tensors = pack(MODULE, quantized_of(Scheme("int", 4, group=32), (8, 96)))
    assert tensors[f"{MODULE}.g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32
    fallen_back = quantized_of(Scheme("int", 4, group=32, ordered=True), (8, 96))
    assert torch.equal(pack(MODULE, fallen_back)[f"{MODULE}.g_idx"], tensors[f"{MODULE}.g_idx"])


def foreign(
    bits: int, less: int, shape: tuple[int, int] = (16, 96), group: int = 32, top: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Asymmetric tensors of somebody else, and their values; `top` is added to the largest zero point."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    zeros = torch.randint(1, 2**bits, (shape[0], shape[1] // group), generator=generator)
    zeros[0, 0] = 2**bits - 1 + top
    scales = torch.rand(zeros.shape, generator=generator).half() + 0.1
    order = [i // group for i in range(shape[1])]
    values = (codes - zeros[:, order]).float() * scales.float()[:, order]
    return {f"{MODULE}.{k}": t for k, t in gptq_bytes.write(codes, scales, zeros, order, bits, less).items()}, values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("version", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_zero_points_of_others_are_read_in_both_versions(bits: int, version: str, less: int) -> None:
    tensors, values = foreign(bits, less)
    scheme = Scheme("int", bits, group=32, symmetric=False)
    assert torch.equal(decode(unpack(MODULE, tensors, scheme, (16, 96), {"checkpoint_format": version})), values)


def test_a_zero_point_that_readers_disagree_about_is_refused() -> None:
    tensors, _ = foreign(4, 1, top=1)
    with pytest.raises(CheckpointError, match="holds 15"):
        unpack(MODULE, tensors, Scheme("int", 4, group=32, symmetric=False), (16, 96))


def without_g_idx(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}


def test_g_idx_may_be_missing_where_nothing_is_ordered() -> None:
    written = quantized_of(Scheme("int", 4, group=32), (8, 96))
    assert torch.equal(unpack(MODULE, without_g_idx(pack(MODULE, written)), written.scheme, (8, 96)).codes, written.codes)
    ordered = quantized_of(Scheme("int", 4, group=32), (8, 96), ordered=True)
    with pytest.raises(CheckpointError, match="g_idx is missing"):
        unpack(MODULE, without_g_idx(pack(MODULE, ordered)), ordered.scheme, (8, 96))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{MODULE}.scales"), "scales is missing"),
        (lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"][1:]}), "has the shape [11, 24]"),
        (lambda t: t.update({f"{MODULE}.qzeros": t[f"{MODULE}.qzeros"].long()}), "is torch.int64"),
        (lambda t: t[f"{MODULE}.qzeros"].add_(0x11111111), "config.json says symmetric in format gptq"),
        (lambda t: t[f"{MODULE}.g_idx"].add_(1), "names groups from 1 to 3, there are 3"),
        (lambda t: t.update({f"{MODULE}.g_idx": t[f"{MODULE}.g_idx"].flip(0)}), "orders the columns"),
    ],
)
def test_wrong_tensors_are_named(change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    tensors = pack(MODULE, quantized_of(Scheme("int", 4, group=32), (24, 96)))
    change(tensors)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        unpack(MODULE, tensors, Scheme("int", 4, group=32), (24, 96))
    assert MODULE in error.value.what
    assert error.value.mend


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        (SCHEMES["nvfp4"], (16, 128), "holds integers, not nvfp4"),
        (SCHEMES["fp8"], (16, 128), "holds integers, not fp8"),
        (SCHEMES["int4-asym"], (16, 128), "symmetric"),
        (SCHEMES["int4"], (20, 128), "packs 8 rows of int4 g128 into a word, and 20"),
        (Scheme("int", 8), (16, 30), "packs 4 columns of int8 channel into a word, and 30"),
    ],
)
def test_what_it_cannot_hold(scheme: Scheme, shape: tuple[int, int], words: str) -> None:
    assert words in str(complaint(scheme, shape))


def test_what_it_can_hold() -> None:
    for scheme in (SCHEMES["int4"], SCHEMES["int8"], Scheme("int", 4), Scheme("int", 4, group=32, ordered=True)):
        assert complaint(scheme, (24, 256)) is None
    assert not notes([SCHEMES["int4"]])
    assert "vLLM" in notes([SCHEMES["int8"], Scheme("int", 4, group=32, ordered=True)])[0]


# --- what readers make of the config

INT4, INT8 = SCHEMES["int4"], SCHEMES["int8"]
Rule = Callable[[str], Scheme | None]
NEVER = ("mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b")


def in_trunk(module: str) -> bool:
    return ".layers." in module and not module.startswith("mtp.")


def release_4(module: str) -> Scheme | None:
    """INT8 attention, INT4 mixers and MLPs."""
    if not in_trunk(module) or module.endswith(NEVER):
        return None
    return INT8 if "self_attn" in module else INT4


def with_holes(module: str) -> Scheme | None:
    """As release 4, layer 0 kept, the MLP (or the experts) of layer 5 kept, those of layer 6 in other numbers."""
    if ".layers.0." in module or ".layers.5.mlp" in module:
        return None
    found = release_4(module)
    return Scheme("int", 8, group=64) if found and ".layers.6.mlp" in module else found


def only_experts(module: str) -> Scheme | None:
    return INT4 if in_trunk(module) and ".experts." in module else None


def only_attention(module: str) -> Scheme | None:
    return Scheme("int", 4, group=32, ordered=True) if in_trunk(module) and "self_attn" in module else None


def with_mtp_and_head(module: str) -> Scheme | None:
    """The whole MTP head but its router, and the output head."""
    if module.endswith(NEVER):
        return None
    return INT8 if module.startswith("mtp.") or module == "lm_head" else release_4(module)


def half_of_mtp(module: str) -> Scheme | None:
    """The MTP head's MLP (or experts), not its attention and not its fc."""
    return INT4 if module.startswith("mtp.") and ".mlp." in module and not module.endswith(NEVER) else release_4(module)


def mtp_attention(module: str) -> Scheme | None:
    return INT8 if module.startswith("mtp.layers.0.self_attn") else release_4(module)


def vision_too(module: str) -> Scheme | None:
    return Scheme("int", 8, group=32) if module.startswith("model.visual.blocks") else release_4(module)


RULES = (release_4, with_holes, only_attention, with_mtp_and_head, half_of_mtp, mtp_attention, vision_too)
LAYOUTS = [(rule, experts, trunk) for rule in RULES for experts in (0, 4) for trunk in ("model.language_model", "model")]
LAYOUTS.append((only_experts, 4, "model.language_model"))
cases = pytest.mark.parametrize(("rule", "experts", "trunk"), LAYOUTS, ids=lambda v: getattr(v, "__name__", str(v)))


def build(rule: Rule, experts: int, trunk: str) -> tuple[dict[str, Any], dict[str, Scheme], list[str]]:
    modules = linears(experts, trunk)
    assigned = {m: s for m in modules if (s := rule(m))}
    kept = [m for m in modules if m not in assigned]
    config: dict[str, Any] = json.loads(json.dumps(quantization_config(assigned, kept)))
    return config, assigned, kept


@cases
def test_we_read_what_we_wrote(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    for module, scheme in assigned.items():
        assert scheme_of(config, module) == dataclasses.replace(scheme, full_range=False), module
    assert [m for m in kept if m != "lm_head" and scheme_of(config, m)] == []
    assert config["lm_head"] == ("lm_head" in assigned)


@cases
def test_gptqmodel_decides_right(rule: Rule, experts: int, trunk: str) -> None:
    config, assigned, kept = build(rule, experts, trunk)
    for module, scheme in assigned.items():
        assert gptqmodel(config, module) == (scheme.bits, scheme.group, scheme.ordered), module
    assert [m for m in kept if m != "lm_head" and gptqmodel(config, m)] == []


@cases
@pytest.mark.parametrize("headers", [True, False], ids=["headers read", "headers unread"])
def test_vllm_decides_right(rule: Rule, experts: int, trunk: str, headers: bool) -> None:
    """vLLM takes what is quantized from the headers of the files too; where it cannot read them, the patterns alone have to do."""
    config, assigned, kept = build(rule, experts, trunk)
    stored = list(assigned) if headers else []
    for module, scheme in assigned.items():
        assert vllm_gptq(config, module, stored, trunk != "model") == (scheme.bits, scheme.group), module
    for module in kept:
        assert vllm_gptq(config, module, stored, trunk != "model") is None, module


def test_form_of_the_config() -> None:
    config, _, _ = build(release_4, 0, "model")
    dynamic = config.pop("dynamic")
    assert config == {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "group_size": 128, "lm_head": False,
        "pack_dtype": "int32", "quant_method": "gptq", "sym": True,
    }  # fmt: skip
    assert r"-:mtp\..*" in dynamic
    assert [rule for pattern, rule in dynamic.items() if pattern.startswith("+:")] == [
        {"bits": 8, "desc_act": False, "group_size": 128, "sym": True}
    ]
    config, _, _ = build(release_4, 0, "model")
    assert json.loads(sidecars(config)["quantize_config.json"]) == config
    assert quantization_config({MODULE: Scheme("int", 4)}, [])["group_size"] == -1


def test_the_letters_mtp_are_in_negative_patterns_only_where_the_head_is_kept() -> None:
    for rule, kept in ((release_4, True), (mtp_attention, False), (half_of_mtp, False), (with_mtp_and_head, False)):
        config, _, _ = build(rule, 4, "model.language_model")
        assert any(p.startswith("-:") and "mtp" in p for p in config["dynamic"]) == kept


def test_many_experts_make_a_short_config() -> None:
    for rule in (release_4, with_holes, only_experts):
        modules = linears(64, layers=40)
        assigned = {m: s for m in modules if (s := rule(m))}
        config = quantization_config(assigned, [m for m in modules if m not in assigned])
        assert len(assigned) > 7000
        assert len(json.dumps(config)) < 4000


PEER: dict[str, Any] = {
    "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True, "lm_head": False,
    "pack_dtype": "int32", "dynamic": {r"-:.*\.layers\.2\..*": {}, r"+:.*self_attn\..*": {"bits": 8, "group_size": -1}, r".*in_proj_z": {"sym": False}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.1.mlp.up_proj", Scheme("int", 4, 128, ordered=True)),
        ("model.layers.3.self_attn.q_proj", Scheme("int", 8)),
        ("model.layers.1.linear_attn.in_proj_z", Scheme("int", 4, 128, symmetric=False, ordered=True)),
        ("model.layers.2.self_attn.q_proj", None),
    ],
)
def test_configs_of_others_are_read(module: str, expected: Scheme | None) -> None:
    assert scheme_of(PEER, module) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "3 bits"), ({"checkpoint_format": "marlin"}, "'marlin'"), ({"pack_dtype": "int64"}, "int64"),
        ({"group_size": 0}, "groups of 0"), ({"dynamic": {"+:*": {}}}, "no pattern"), ({"bits": None}, "None bits"),
    ],
)  # fmt: skip
def test_configs_that_we_cannot_read_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        scheme_of(PEER | change, "model.layers.1.mlp.up_proj")
    assert error.value.mend


# --- a release on disk

STORED = {
    "model.layers.0.mlp.up_proj": ("int4 g32", False),
    "model.layers.1.mlp.up_proj": ("int8 g32", False),
    "model.layers.2.mlp.up_proj": ("int4 channel", False),
    "model.layers.3.mlp.up_proj": ("int4 g16 full", False),
    "model.layers.4.mlp.up_proj": ("int8 g32", True),
}
SHAPE = (40, 96)


def write(folder: Path, version: str) -> tuple[Release, dict[str, Quantized]]:
    rounded = {m: quantized_of(SEVERAL[name], SHAPE, ordered) for m, (name, ordered) in STORED.items()}
    tensors = {name: tensor for m, q in rounded.items() for name, tensor in pack(m, q).items()}
    if version == "gptq_v2":
        for name, tensor in tensors.items():
            if name.endswith("qzeros"):
                tensor += 0x01010101 if ".1." in name or ".4." in name else 0x11111111
    tensors["lm_head.weight"] = torch.ones(7, SHAPE[1])
    config = quantization_config({m: q.scheme for m, q in rounded.items()}, ["lm_head"]) | {"checkpoint_format": version}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", "quantization_config": config}))
    source = open_source(folder)
    assert isinstance(source, Release)
    return source, rounded


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_release_is_read_under_its_unquantized_names(tmp_path: Path, version: str) -> None:
    source, rounded = write(tmp_path / "r", version)
    assert set(source.tensors) == {f"{m}.weight" for m in STORED} | {"lm_head.weight"}
    for module, written in rounded.items():
        name = f"{module}.weight"
        entry = source.tensors[name]
        assert (entry.dtype, entry.shape) == ("BF16", SHAPE)
        whole = source.read(name)
        assert torch.equal(whole, decode(written))
        for part in ((slice(3, 29),), (slice(32, None),), (7,), (-1, slice(5, 9)), (slice(8, 16), 3), (slice(20, 20),)):
            assert torch.equal(source.read(name, part), whole[part]), part


def test_a_release_with_the_wrong_version_is_not_read_by_guessing(tmp_path: Path) -> None:
    source, _ = write(tmp_path / "r", "gptq")
    source.config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    with pytest.raises(CheckpointError, match="symmetric in format gptq_v2"):
        source.read("model.layers.0.mlp.up_proj.weight")
