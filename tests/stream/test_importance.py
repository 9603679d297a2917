"""Sums of squared inputs, against hooks on the modules of transformers' own layers and against the head's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.checkpoint.reader import Checkpoint
from qwench.models import map_of
from qwench.models.modules import Modules
from qwench.models.run import Trunk
from qwench.stream.head import LiveHead
from qwench.stream.importance import importance_walk
from qwench.stream.live import LiveBlock
from tests.support.tiny import write_tiny

ROWS, LENGTH = 5, 17


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("importance") / "model", moe=request.param))


def ids_of(source: Checkpoint) -> Tensor:
    return torch.randint(map_of(source).other("embed").shape[0], (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def read_of(live: LiveBlock, hidden: Tensor) -> dict[str, Tensor]:
    """By module, what each weight of a layer reads [N, I], from hooks on transformers' modules; experts by their routing."""
    read: dict[str, Tensor] = {}
    handles = []
    for slot in (s for s in live.block.slots if s.linear and s.expert is None):
        module = live.submodule(slot)
        handles.append(
            module.register_forward_pre_hook(lambda _m, i, name=slot.module: read.update({name: i[0].flatten(0, -2)}))
        )
    routed: list[Tensor] = []
    experts = next((s for s in live.block.slots if s.expert is not None), None)
    if experts:
        handles.append(live.submodule(experts).register_forward_pre_hook(lambda _m, i: routed.extend(i[:2])))
    live.run(hidden)
    for handle in handles:
        handle.remove()
    for slot in (s for s in live.block.slots if s.expert is not None):
        tokens = routed[0][(routed[1] == slot.expert).any(-1)]
        if slot.role.endswith("down"):
            tag = slot.role.removesuffix("down")
            gate, up = (live.weight(live.block.slot(tag + half, slot.expert)) for half in ("gate", "up"))
            tokens = F.silu(tokens @ gate.T) * (tokens @ up.T)
        read[slot.module] = tokens
    return read


def test_sums_and_counts_are_those_of_what_every_linear_module_reads(source: Checkpoint, tmp_path: Path) -> None:
    map, ids = map_of(source), ids_of(source)
    found = importance_walk(source, map, ids, folder=tmp_path, batch=2, stored=torch.float32)
    linears = [s for s in map.slots() if s.linear and not s.role.startswith("vision.")]
    assert set(found) == {s.module for s in linears}, "trunk, MTP head and lm_head, and nothing of the tower"
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    trunk = Trunk(source, map)
    modules, hidden = Modules(source.config, map), trunk.embed(ids)
    expected: dict[str, Tensor] = {}
    for index in range(len(map.blocks)):
        expected |= read_of(LiveBlock(source, map, modules, index), hidden)
        hidden = trunk.run_block(index, hidden)
    normed, norms = trunk.norm(hidden), {}
    for name in ("embedding", "hidden"):
        norms[name] = source.read(map.other(f"mtp.norm.{name}").tensor).float()

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight)

    pairs = torch.cat([rms(trunk.embed(ids[:, 1:]), norms["embedding"]), rms(normed[:, :-1], norms["hidden"])], -1)
    expected |= read_of(LiveHead(source, map, modules), pairs)
    expected["lm_head"] = normed.flatten(0, 1)
    assert set(expected) == set(found)
    for module, (sums, count) in found.items():
        assert sums.dtype is torch.float32 and count == len(expected[module]), module
        wanted = expected[module].double().square().sum(0)
        assert torch.allclose(sums.double(), wanted, rtol=2e-3, atol=1e-4 * float(wanted.max()) if count else 0), module


def test_the_walk_does_not_depend_on_how_rows_are_batched(source: Checkpoint) -> None:
    map, ids = map_of(source), ids_of(source)
    one, all_rows = (importance_walk(source, map, ids, batch=size) for size in (1, ROWS))
    for module, (sums, count) in one.items():
        assert count == all_rows[module][1], module
        assert torch.allclose(sums, all_rows[module][0], rtol=0.02, atol=1e-3 * float(sums.max() + 1e-30)), module
