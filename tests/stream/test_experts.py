"""Listening to experts: they put out what they would, and what is heard is what each of them adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.stream.experts import taking_experts
from qwench.stream.live import LiveBlock
from tests.support.tiny import Experts, write_tiny


@pytest.fixture(params=["fused", "single"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> LiveBlock:
    experts: Experts = request.param
    source = Checkpoint.open(write_tiny(tmp_path / "m", moe=True, trunk_experts=experts))
    map = map_of(source)
    return LiveBlock(source, map, Trunk(source, map).modules, 2)


def test_the_layer_puts_out_the_same_bits(live: LiveBlock) -> None:
    x = torch.randn(3, 17, 128, generator=torch.Generator().manual_seed(2))
    alone = live.run(x)
    with taking_experts(live, lambda *_: None):
        assert torch.equal(live.run(x), alone)
    assert torch.equal(live.run(x), alone)


def test_what_is_heard_adds_up_to_the_mixture(live: LiveBlock) -> None:
    x = torch.randn(3, 17, 128, generator=torch.Generator().manual_seed(2))
    heard: list[tuple[int, Tensor, Tensor, Tensor]] = []
    mixture: list[tuple[Tensor, Tensor]] = []
    module = live.submodule(live.block.slot("expert.up", 0))
    handle = module.register_forward_hook(lambda _module, read, put_out: mixture.append((read[0], put_out)))
    with taking_experts(live, lambda *one: heard.append(one)):
        live.run(x)
    handle.remove()
    [(read, put_out)] = mixture
    assert sum(len(inputs) for _, inputs, _, _ in heard) == 3 * 17 * 2, "two experts a token"
    total = torch.zeros_like(put_out)
    for expert, inputs, weights, outputs in heard:
        gate, up, down = (live.weight(live.block.slot(f"expert.{half}", expert)) for half in ("gate", "up", "down"))
        torch.testing.assert_close(outputs, (torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T)
        places = (read[:, None] == inputs).all(-1).nonzero()[:, 0]
        assert len(places) == len(inputs)
        order = (read[None] == inputs[:, None]).all(-1).int().argmax(1)
        total.index_add_(0, order, outputs * weights[:, None])
    torch.testing.assert_close(total, put_out)
