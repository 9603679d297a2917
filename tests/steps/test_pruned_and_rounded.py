"""Pruning and a calibrated method in one walk: each expert that stays is made of its own weights on the pruned network, in every layout of experts and in the MTP head; a run that is stopped ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.writer import CheckpointWriter
from qwench.demo import checkpoint
from qwench.formats.release import open_source
from qwench.models import map_of
from qwench.models.pruned import Pruned
from qwench.models.run import Trunk
from qwench.result import PruningFacts
from qwench.steps.planning.plan import Plan
from qwench.stream.rows import held_out_rows
from tests.steps.materials.test_prune import LAYOUTS, plan_of, released
from tests.support.files import same_bits
from tests.support.tiny import Experts, Head, Layout, write_tiny

ROLES = "attention.*, expert.*, shared.*, mtp.expert.*, mtp.shared.*"
ROUND = f"  - quantize: {{method: METHOD, gptq: {{least_tokens: 30}}, autoround: {{iterations: 3, batch: 4}}, rules: [{{roles: [{ROLES}], scheme: {{kind: int, bits: 4, group: 32}}}}]}}\n"
SMOOTH = "  - smooth: {folds: [norm.post, expert.up, shared.up, mtp.norm.post, mtp.expert.up], grid: 4, clip: true}\n"
METHODS = {"gptq": ROUND.replace("METHOD", "gptq"), "awq": SMOOTH + ROUND.replace("METHOD", "rtn"), "awq and gptq": SMOOTH + ROUND.replace("METHOD", "gptq"), "autoround": ROUND.replace("METHOD", "autoround")}  # fmt: skip
EXPORT = "{format: compressed-tensors, layout: text}"


def tiny(folder: Path, layout: Layout, trunk: Experts, head: Head) -> Path:
    return write_tiny(folder, moe=True, layout=layout, trunk_experts=trunk, mtp=head, vision=layout == "conditional")


def stayed(plan: Plan, facts: PruningFacts) -> dict[str, list[int]]:
    assert isinstance(plan.source, Pruned)
    return {layer.label: layer.kept for layer in facts.layers}


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
@pytest.mark.parametrize(("layout", "trunk", "head"), LAYOUTS, ids=["-".join(names) for names in LAYOUTS])
def test_what_stays_is_rounded_and_is_the_expert_that_it_was(
    tmp_path: Path, layout: Layout, trunk: Experts, head: Head, method: str
) -> None:
    folder = tiny(tmp_path / "m", layout, trunk, head)
    plans = [plan_of(folder, "{experts: 4}", others, EXPORT) for others in ("", METHODS[method])]
    bare, rounded = (released(plan, tmp_path / str(n)) for n, plan in enumerate(plans))
    assert stayed(plans[0], bare) == stayed(plans[1], rounded), "experts are ranked on the original network"
    one, other = open_source(tmp_path / "0"), open_source(tmp_path / "1")
    maps, count = (map_of(one), map_of(other)), 0
    for block, same in zip((*maps[0].blocks, *maps[0].mtp), (*maps[1].blocks, *maps[1].mtp), strict=True):
        by_place = {(slot.role, slot.expert): slot for slot in same.slots}
        for slot in block.slots:
            weight, made = (
                s.read(x.tensor, x.part).float() for s, x in ((one, slot), (other, by_place[slot.role, slot.expert]))
            )
            if slot.expert is None:
                continue
            count += 1
            angle = float((weight * made).sum() / (weight.norm() * made.norm()))
            assert angle > (0.75 if "awq" in method else 0.9), (slot.module, angle)  # folds scale channels
    assert count == 5 * 4 * 3 and any(".experts.3." in name and "packed" in name for name in other_names(tmp_path / "1"))
    assert not any(".experts.4." in name for name in other_names(tmp_path / "1"))


def other_names(folder: Path) -> list[str]:
    return list(Checkpoint.open(folder).tensors)


class Stop(BaseException):
    """Stands for a kill: nothing catches it, nothing is tidied up behind it."""


@pytest.mark.parametrize(
    ("number", "method", "at"),
    [(0, "gptq", "mtp.layers.0."), (0, "awq and gptq", "model.layers.2."), (1, "gptq", "model.layers.2."), (1, "awq and gptq", "mtp.layers.0.")],
)  # fmt: skip
def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path: Path, number: int, method: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny(tmp_path / "m", *LAYOUTS[number]), "{ratio: 0.34}", METHODS[method], EXPORT)  # type: ignore[arg-type]
    whole = released(plan, tmp_path / "whole")
    real, left = CheckpointWriter.write, [7]

    def stopping(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        left[0] -= name.startswith(at)
        if left[0] == 0:
            raise Stop
        real(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", stopping)
    assert isinstance(plan.source, Pruned)
    with pytest.raises(Stop):
        released(plan, tmp_path / "parts")
    monkeypatch.undo()
    assert not (tmp_path / "parts").exists()
    again = plan_of(tmp_path / "m", "{ratio: 0.34}", METHODS[method], EXPORT)  # a new process knows nothing of who stayed
    assert released(again, tmp_path / "parts") == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_gptq_on_the_pruned_network_is_nearer_to_it_than_rounding(tmp_path: Path) -> None:
    """Moments are of what the experts that stay read when the others are gone. On the trained demo, whose inputs have directions."""
    names, rows = (
        {"bare": "", "rtn": ROUND.replace("METHOD", "rtn"), "gptq": METHODS["gptq"]},
        held_out_rows(checkpoint("moe"), 20, 64),
    )
    read = replace(rows, ids=rows.ids[:14], documents=rows.documents[:14], names=rows.names[:14])
    asked = rows.ids[14:]
    for name, others in names.items():
        released(plan_of(checkpoint("moe"), "{ratio: 0.5}", others, EXPORT), tmp_path / name, read)
    sources = {name: open_source(tmp_path / name) for name in names}
    outputs = {name: Trunk(source, map_of(source)).forward(asked) for name, source in sources.items()}
    errors = {name: float((outputs[name] - outputs["bare"]).square().mean()) for name in ("rtn", "gptq")}
    assert 0 < errors["gptq"] < 0.9 * errors["rtn"], errors
    bare, gptq = (Checkpoint.open(tmp_path / name) for name in ("bare", "gptq"))
    for name in ("mtp.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"):
        assert same_bits(bare.read(name), gptq.read(name)), "routers are those of the experts that stay, bit for bit"
