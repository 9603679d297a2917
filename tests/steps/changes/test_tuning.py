"""AutoRound in a layer: where its weights lie, how much it holds, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.numerics import SCHEMES, Scheme
from qwench.recipe import AutoRoundSettings, GptqSettings, Quantize, Rule
from qwench.steps.changes import Rounding, Tuning
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.walk import Rows
from tests.support.memory import tiny_source

COUNT, LENGTH = 9, 16


def case(tmp_path: Path, moe: bool, experts: Any = "fused", layer: int = 1) -> tuple[LiveBlock, Rows, dict[str, Scheme]]:
    """A layer, rows before it as earlier quantized layers left them, and a scheme for each of its weights. One row is not sound."""
    source = tiny_source(moe=moe, trunk_experts=experts)
    map = map_of(source)
    trunk = Trunk(source, map)
    clean = torch.randn(COUNT, LENGTH, 128, generator=torch.Generator().manual_seed(2))
    changed = clean + 0.05 * torch.randn(COUNT, LENGTH, 128, generator=torch.Generator().manual_seed(3))
    targets = trunk.run_block(layer, clean)
    changed[4] = torch.nan
    files = HiddenFiles(tmp_path, (COUNT, LENGTH, 128), torch.float32)
    for stream, index, states in (("changed", 1, changed), ("original", 1, clean), ("original", 2, targets)):
        files.put(stream, index, iter([states]))
    live = LiveBlock(source, map, trunk.modules, layer)
    sound = torch.ones(COUNT, dtype=torch.bool)
    sound[4] = False
    never = ("router", "shared.router", "delta.a", "delta.b")
    schemes = {s.module: SCHEMES["int4"] for s in live.block.slots if s.linear and s.role not in never}
    rows = Rows(files.before("changed", 1), files.before("original", 1), files.before("original", 2), 4, sound, tmp_path)
    return live, rows, schemes


def settings(**autoround: Any) -> Quantize:
    return Quantize(
        method="autoround",
        rules=(Rule(roles=("*",), scheme="int4"),),
        autoround=AutoRoundSettings(batch=3, **autoround),
        gptq=GptqSettings(least_tokens=44),
    )


def error(live: LiveBlock, rows: Rows) -> float:
    assert rows.targets is not None
    sound = rows.sound.nonzero().flatten()
    with torch.no_grad():
        return float((live.run(rows.changed.pick(sound)) - rows.targets.pick(sound)).square().mean())


@pytest.mark.parametrize(("moe", "experts"), [(False, "fused"), (True, "fused"), (True, "single")])
def test_a_layer_is_tuned_where_it_lies(tmp_path: Path, moe: bool, experts: Any) -> None:
    live, rows, schemes = case(tmp_path, moe, experts)
    homes = {name: weight.data_ptr() for name, weight in live.weights.items()}
    change = Tuning(settings(iterations=20, start="rounding"), None, schemes)
    rounded = case(tmp_path / "other", moe, experts)[0]
    Rounding(Quantize(rules=(Rule(roles=("*",), scheme="int4"),)), None, schemes)(rounded, rows)
    change(live, rows)
    assert error(live, rows) < 0.9 * error(rounded, rows)
    assert live.quantized.keys() == schemes.keys()
    assert {name: weight.data_ptr() for name, weight in live.weights.items()} == homes
    assert not any(weight.requires_grad for weight in live.weights.values())
    for slot in live.block.slots:
        if slot.module in schemes:
            assert torch.equal(live.weight(slot), live.quantized[slot.module].dequantize())
        else:
            assert torch.equal(live.weight(slot), rounded.weight(slot))


@pytest.mark.parametrize("moe", [False, True])
def test_from_gptq_no_worse_than_gptq(tmp_path: Path, moe: bool) -> None:
    live, rows, schemes = case(tmp_path, moe)
    change = Tuning(settings(iterations=6, start="gptq"), None, schemes)
    change(live, rows)
    other = case(tmp_path / "other", moe)[0]
    gptq = Rounding(settings().model_copy(update={"method": "gptq"}), None, schemes)
    gptq(other, rows)
    assert error(live, rows) <= error(other, rows) * (1 + 1e-5)
    assert {key: said for key, said in change.reports.items() if "autoround" not in key} == gptq.reports
    if moe:
        fallbacks = [said for said in gptq.reports.values() if "rounded to nearest" in said]
        assert fallbacks, "of 128 tokens, two experts each, some of the six see fewer than 44"
        assert all("tokens were seen, 44 are wanted" in said for said in fallbacks)


def test_rows_are_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, rows, schemes = case(tmp_path, False)
    most = 0
    real = type(rows.changed).pick

    def pick(self: Any, wanted: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(wanted))
        assert 4 not in wanted.tolist(), "not a sound row"
        return real(self, wanted)

    monkeypatch.setattr(type(rows.changed), "pick", pick)
    Tuning(settings(iterations=2, start="rounding"), None, schemes)(live, rows)
    assert most == 3


def test_experts_that_no_token_reaches_are_named(tmp_path: Path) -> None:
    live, rows, schemes = case(tmp_path, True)
    experts = {slot.module for slot in live.block.slots if slot.expert is not None}
    # Along one direction: tokens on one side of it go to the first two, those on the other side to the last two.
    live.weights["mlp.gate.weight"].copy_(torch.tensor([3, 2, 0.1, -0.1, -2, -3])[:, None].expand(-1, 128))
    change = Tuning(
        settings(iterations=2, start="rounding"), None, {module: s for module, s in schemes.items() if module in experts}
    )
    change(live, rows)
    said = change.reports["layer 1 autoround, not reached by any token"]
    left = [f"mlp.experts.{e}.{part}_proj" for e in (2, 3) for part in ("down", "gate", "up")]
    assert said == f"they stay as they started: {', '.join(left)}"
    other = case(tmp_path / "other", True)[0]
    Rounding(Quantize(rules=(Rule(roles=("*",), scheme="int4"),)), None, schemes)(other, rows)
    for slot in live.block.slots:
        if slot.expert in (2, 3):
            assert torch.equal(live.weight(slot), other.weight(slot))
