"""Rounded inputs while a network runs: each linear layer reads what it is said to read, experts one by one, in every way that we run a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwench.checkpoint.reader import Checkpoint
from qwench.models import map_of
from qwench.models.decoder import Decoder
from qwench.models.inputs import RoundsInputs, rounded_inputs, rounding_inputs
from qwench.models.map import ModelMap
from qwench.models.modules import Modules, lend
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.models.weights import read_block
from qwench.numerics import InputRounding
from tests.support.tiny import write_tiny

IDS = torch.tensor([[(7 * i + j * j) % 300 + 8 for j in range(11)] for i in range(2)])


class Rounding(Checkpoint):
    """A checkpoint that is said to round inputs."""

    rule: Callable[[str], InputRounding | None]

    def input_rounding(self, module: str) -> InputRounding | None:
        return self.rule(module)


def opened(folder: Path, rule: Callable[[str], InputRounding | None]) -> Rounding:
    source = Rounding.open(folder)
    assert isinstance(source, Rounding)
    source.rule = rule
    return source


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("inputs") / "m", moe=request.param)


def in_decoder(module: str) -> InputRounding | None:
    """Four bits for the MLPs, with a window that depends on the module, eight for the mixers."""
    if "mlp." in module and not module.endswith(("mlp.gate", "shared_expert_gate")):
        return InputRounding(
            "nvfp4", 64.0 + 8 * (sum(map(ord, module.rpartition(".gate")[0] or module.removesuffix("up_proj"))) % 7)
        )
    return InputRounding("fp8") if module.endswith(("o_proj", "in_proj_qkv", "mtp.fc")) else None


def test_a_plain_checkpoint_rounds_nothing(folder: Path) -> None:
    source = Checkpoint.open(folder)
    assert not isinstance(source, RoundsInputs)
    assert rounded_inputs(source, map_of(source).slots()) == {}
    assert isinstance(opened(folder, in_decoder), RoundsInputs)


class Wrapped(nn.Module):
    """A linear layer that rounds for itself: what a hook is held against."""

    def __init__(self, linear: nn.Module, rounding: InputRounding) -> None:
        super().__init__()
        self.linear, self.rounding = linear, rounding

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.rounding(x))
        return result


class Literal(nn.Module):
    """Experts by the formula, token by token."""

    def __init__(self, gate_up: Tensor, down: Tensor, rounded: dict[str, InputRounding], stem: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.rounded, self.stem = gate_up, down, rounded, stem

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for n in range(len(hidden)):
            for expert, share in zip(chosen[n].tolist(), shares[n], strict=True):
                read = {
                    half: self.rounded.get(f"{self.stem}{expert}.{half}_proj", lambda x: x) for half in ("gate", "up", "down")
                }
                gate, up = self.gate_up[expert].chunk(2)
                inner = F.silu(F.linear(read["gate"](hidden[n]), gate)) * F.linear(read["up"](hidden[n]), up)
                result[n] += share * F.linear(read["down"](inner), self.down[expert])
        return result


def literal_layer(source: Rounding, map: ModelMap, index: int) -> nn.Module:
    """Decoder layer `index` with its linear layers replaced by ones that round."""
    block, stem = map.blocks[index], f"{map.prefix}layers.{index}."
    layer = Modules(source.config, map).new_layer(block.kind)
    weights = read_block(source, block, stem, torch.float32)
    layer.load_state_dict(weights, assign=True)
    rounded = rounded_inputs(source, block.slots)
    for slot in block.slots:
        if slot.expert is None and slot.module in rounded:
            parent, _, leaf = slot.tensor.removeprefix(stem).removesuffix(".weight").rpartition(".")
            holder = layer.get_submodule(parent)
            setattr(holder, leaf, Wrapped(holder.get_submodule(leaf), rounded[slot.module]))
    if "mlp.experts.down_proj" in weights:
        names = {m: r for m, r in rounded.items() if ".experts." in m}
        experts = Literal(weights["mlp.experts.gate_up_proj"], weights["mlp.experts.down_proj"], names, f"{stem}mlp.experts.")
        layer.get_submodule("mlp").experts = experts
    return layer


@pytest.mark.parametrize("index", [0, 3])
def test_every_layer_reads_what_it_is_said_to_read(folder: Path, index: int) -> None:
    source = opened(folder, in_decoder)
    map = map_of(source)
    trunk = Trunk(source, map)
    hidden = torch.randn(2, 11, map.other("embed").shape[1], generator=torch.Generator().manual_seed(index))
    rope = trunk.modules.rope(torch.arange(11).expand(3, 2, 11), hidden)
    with torch.no_grad():
        want = literal_layer(source, map, index)(hidden, position_embeddings=rope, attention_mask=None)
    got = trunk.run_block(index, hidden)
    plain = Trunk(Checkpoint.open(folder), map).run_block(index, hidden)
    assert float((got - want).abs().max()) < 1e-5 < 1e-4 < float((plain - want).abs().max())
    assert torch.equal(Trunk(Checkpoint.open(folder), map).run_block(index, hidden), plain), "nothing stays behind"


def test_shared_modules_are_left_as_they_were(folder: Path) -> None:
    source = opened(folder, in_decoder)
    map = map_of(source)
    trunk, hidden = Trunk(source, map), torch.randn(1, 5, map.other("embed").shape[1])
    block, stem = map.blocks[0], f"{map.prefix}layers.0."
    layer, weights = trunk.modules.layer(block.kind), read_block(source, block, stem, torch.float32)
    named = {"position_embeddings": trunk.modules.rope(torch.arange(5).expand(3, 1, 5), hidden), "attention_mask": None}
    before = lend(layer, weights, hidden, **named)
    with pytest.raises(ZeroDivisionError), rounding_inputs(layer, block.slots, stem, rounded_inputs(source, block.slots)):
        assert not torch.equal(lend(layer, weights, hidden, **named), before)
        raise ZeroDivisionError
    assert torch.equal(lend(layer, weights, hidden, **named), before)


def test_decoding_token_by_token_reads_the_same(folder: Path) -> None:
    """Eight bits alone: in four, positions that are computed one by one may fall on other steps by rounding alone."""
    source = opened(folder, lambda module: InputRounding("fp8") if "proj" in module else None)
    map = map_of(source)
    trunk = Trunk(source, map)
    reading = Decoder(Trunk(source, map)).begin()
    got = torch.cat([reading.read(IDS[0, :6].tolist()), reading.read(IDS[0, 6:].tolist())])
    want, plain = trunk.forward(IDS[:1])[0], Trunk(Checkpoint.open(folder), map).forward(IDS[:1])[0]
    error, effect = float((got - want).square().mean().sqrt()), float((plain - want).square().mean().sqrt())
    assert error < 0.2 * effect


def test_the_mtp_head_rounds_too(folder: Path) -> None:
    map = map_of(Checkpoint.open(folder))
    hidden, embedded = torch.randn(2, 1, 9, map.other("embed").shape[1], generator=torch.Generator().manual_seed(4))

    def drafted(rule: Callable[[str], InputRounding | None]) -> Tensor:
        return MtpHead(opened(folder, rule), map).drafts(hidden, embedded, 2)[1]

    plain, fc_only, mlp_only = drafted(lambda _: None), drafted(lambda m: InputRounding("fp8") if m == "mtp.fc" else None), None
    mlp_only = drafted(lambda m: InputRounding("fp8") if m.startswith("mtp.") and m.endswith("down_proj") else None)
    assert torch.equal(plain, MtpHead(Checkpoint.open(folder), map).drafts(hidden, embedded, 2)[1])
    assert not torch.equal(plain, fc_only) and not torch.equal(plain, mlp_only) and not torch.equal(fc_only, mlp_only)
