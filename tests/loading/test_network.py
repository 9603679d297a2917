"""What engines build from a config alone: names, what is joined, shapes, and the parameters of a module."""

from __future__ import annotations

from qwench.formats import compressed_tensors, gptq
from qwench.loading.network import Naming, decoder_claims, head_claims, leaves, modules_of, tower_claims
from qwench.loading.parameters import parameters_of
from qwench.loading.parts import Module
from qwench.numerics import SCHEMES
from tests.support.tiny import tiny_config, tiny_shapes

SAME = Naming(lambda module: module, lambda module: module)


def built(moe: bool, fuses: bool = True) -> dict[str, Module]:
    config = tiny_config(moe=moe)
    claims = [*decoder_claims(config, "model.language_model."), *head_claims(config, 1), *tower_claims(config)]
    naming = Naming(lambda module: module, lambda module: module, fuses)
    return {module.asked: module for module in modules_of(claims, naming)}


def test_every_stored_weight_has_one_place() -> None:
    """Against the names written by hand in tests/support/tiny.py, experts one by one."""
    for moe in (False, True):
        stored = {member.stored: member for _, member in leaves(built(moe).values())}
        written = tiny_shapes(tiny_config(moe=moe), "single", "single")
        biases = {name for name in written if name.endswith(".bias")}
        assert {name.removesuffix(".weight") for name in written.keys() - biases} == set(stored)
        assert all(stored[name.removesuffix(".weight")].shape == shape for name, shape in written.items() if name not in biases)
        extras = {f"{module.asked}.bias" for module in built(moe).values() if "bias" in module.extras}
        assert extras == biases


def test_what_is_joined() -> None:
    modules = built(moe=True)
    stem = "model.language_model.layers."
    assert [m.leaf for m in modules[f"{stem}3.self_attn.qkv_proj"].members] == ["q_proj", "k_proj", "v_proj"]
    assert [m.leaf for m in modules[f"{stem}0.linear_attn.in_proj_qkvz"].members] == ["in_proj_qkv", "in_proj_z"]
    assert [m.leaf for m in modules["mtp.layers.0.mlp.shared_expert.gate_up_proj"].members] == ["gate_proj", "up_proj"]
    experts = modules[f"{stem}1.mlp.experts"]
    assert experts.kind == "experts" and len(experts.members) == 18 and {m.expert for m in experts.members} == set(range(6))
    assert not modules[f"{stem}1.mlp.gate"].configured and modules["lm_head"].kind == "head"
    assert modules["model.visual.blocks.0.attn.qkv"].kind == "linear" and not modules["model.visual.blocks.0.attn.qkv"].fused
    assert f"{stem}3.self_attn.q_proj" in built(moe=True, fuses=False)


def test_parameters_have_a_part_for_every_member() -> None:
    modules = built(moe=True)
    qkv, experts = (
        modules["model.language_model.layers.3.self_attn.qkv_proj"],
        modules["model.language_model.layers.1.mlp.experts"],
    )
    plain = {p.name.rpartition(".")[2]: p.parts for p in parameters_of(qkv, None, None)}
    assert plain == {"weight": {"q_proj": (768, 128), "k_proj": (192, 128), "v_proj": (192, 128)}}
    four = {p.name.rpartition(".")[2]: p.parts for p in parameters_of(qkv, compressed_tensors, SCHEMES["nvfp4-w4a4"])}
    assert set(four) == {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}
    assert four["weight_global_scale"] == {"q_proj": (1,), "k_proj": (1,), "v_proj": (1,)}
    words = {p.name.rpartition(".")[2]: p.parts for p in parameters_of(qkv, compressed_tensors, SCHEMES["int4"])}
    assert words["weight_shape"] == {"": None}  # any member's: they overwrite each other
    of_experts = {p.name.rpartition(".")[2]: p.parts for p in parameters_of(experts, gptq, SCHEMES["int4"])}
    assert set(of_experts) == {"w13_qweight", "w13_qzeros", "w13_scales", "w2_qweight", "w2_qzeros", "w2_scales"}
    assert len(of_experts["w13_scales"]) == 12 and of_experts["w2_scales"]["5.down_proj"] == (2, 128)
