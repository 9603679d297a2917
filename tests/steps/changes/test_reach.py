"""Statistics of experts on all tokens (`calibration: {experts: all}`): every method sees what a literal computation sees, the layer still follows its router, and pruning's saliency is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import RecipeError
from qwench.formats.release import open_source
from qwench.methods.activation_range import divisor
from qwench.models import map_of
from qwench.models.run import Trunk
from qwench.recipe import ActivationSettings, Quantize, Recipe, Rule, parse_recipe
from qwench.result import Result, read_result
from qwench.run import run_recipe
from qwench.steps.changes import ActivationRanges, Rounding
from qwench.steps.changes.judges import inputs_one_by_one
from qwench.stream import mixture
from qwench.stream.hidden import HiddenFiles
from qwench.stream.live import LiveBlock
from qwench.stream.mixture import moments_of
from qwench.stream.observe import Reach, taking_inputs
from qwench.stream.walk import Rows
from tests.steps.changes.test_activations import W4A4
from tests.support.tiny import write_tiny

ROWS, LENGTH, EXPERTS, TOP_K = 5, 17, 6, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("reach") / "model", moe=True))


@pytest.fixture
def live(source: Checkpoint) -> LiveBlock:
    return LiveBlock(source, map_of(source), Trunk(source, map_of(source)).modules, 0)


@pytest.fixture
def rows(source: Checkpoint, tmp_path: Path) -> Rows:
    ids = torch.randint(map_of(source).other("embed").shape[0], (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    hidden = Trunk(source, map_of(source)).embed(ids)
    files = HiddenFiles(tmp_path, tuple(hidden.shape), torch.float32)  # type: ignore[arg-type]
    files.put("changed", 0, iter(torch.split(hidden, 2)))
    return Rows(files.before("changed", 0), None, None, 2, torch.tensor([True, True, False, True, True]), tmp_path, reach="all")


def read_by_mixture(live: LiveBlock, rows: Rows) -> Tensor:
    """What the router reads, [N, D]."""
    seen: list[Tensor] = []
    with taking_inputs(live, {"mlp": seen.append}):
        for batch in rows.batches():
            live.run(batch)
    return torch.cat(seen)


def inner(live: LiveBlock, expert: int, x_ND: Tensor) -> Tensor:
    """Literally what an expert's down projection would read of every token."""
    gate, up = (live.weight(live.block.slot(f"expert.{half}", expert)) for half in ("gate", "up"))
    return F.silu(x_ND @ gate.T) * (x_ND @ up.T)


def test_every_expert_is_shown_every_token_and_the_layer_puts_out_the_same(live: LiveBlock, rows: Rows) -> None:
    batch = next(rows.batches())
    plain, seen = live.run(batch), dict[str, Tensor]()
    names = [name for name in live.block.inputs if name.startswith("experts.")]
    with taking_inputs(live, {name: lambda x, name=name: seen.update({name: x}) for name in names}, reach="all"):  # type: ignore[misc]
        assert torch.equal(live.run(batch), plain)
    x = read_by_mixture(live, rows)[: 2 * LENGTH]
    assert len(seen) == 2 * EXPERTS
    for expert in range(EXPERTS):
        assert torch.equal(seen[f"experts.{expert}"], x)
        assert torch.allclose(seen[f"experts.{expert}.down"], inner(live, expert, x), atol=1e-5)


def test_moments_are_of_all_tokens_and_the_shared_one_is_summed_once(
    live: LiveBlock, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "TOKENS", 7)
    x = read_by_mixture(live, rows)
    names = [name for name in live.block.inputs if name.startswith("experts.")]
    found = {}
    for name, moment in moments_of(live, rows, names):
        found[name] = moment
        if name == "experts.4":
            live.weight(live.block.slot("expert.up", 4)).mul_(2)
    assert list(found) == names
    for expert in range(EXPERTS):
        read, down = x, inner(live, expert, x)  # that of the expert that was changed, too
        for moment, inputs in ((found[f"experts.{expert}"], read), (found[f"experts.{expert}.down"], down)):
            second = inputs.T @ inputs
            assert moment.count == 4 * LENGTH
            assert torch.allclose(moment.second, second, rtol=0.02, atol=0.01 * float(second.abs().max()))  # type: ignore[arg-type]
        assert found[f"experts.{expert}"] is found["experts.0"]


def test_smoothing_holds_one_experts_inputs_at_a_time(live: LiveBlock, rows: Rows) -> None:
    names = [f"experts.{expert}.down" for expert in (3, 0, 5)]
    x, runs, real = read_by_mixture(live, rows), 0, live.run

    def run(hidden: object) -> Tensor:
        nonlocal runs
        runs += 1
        return real(hidden)  # type: ignore[arg-type]

    live.run = run  # type: ignore[method-assign, assignment]
    made = inputs_one_by_one(live, rows, names)
    for expert, batches in zip((3, 0, 5), made, strict=True):
        assert torch.allclose(torch.cat(batches), inner(live, expert, x), atol=1e-5)
    assert runs == 2, "one pass over four rows, two at a time"
    rows.reach = "routed"
    assert (
        sum(len(torch.cat(b)) for b in inputs_one_by_one(live, rows, [f"experts.{n}.down" for n in range(6)]))
        == 4 * LENGTH * TOP_K
    )


def test_ranges_are_those_of_all_tokens(source: Checkpoint, live: LiveBlock, rows: Rows) -> None:
    x = read_by_mixture(live, rows)
    schemes = {s.module: W4A4 for s in live.block.slots if s.role.startswith("expert.")}
    Rounding(Quantize(rules=(Rule(roles=("expert.*",), scheme="nvfp4-w4a4"),)), None, schemes)(live, rows)
    change = ActivationRanges(ActivationSettings(experts="own"), schemes)
    change(live, rows)
    for expert in range(EXPERTS):
        ups, downs = (live.quantized[live.block.slot(f"expert.{leaf}", expert).module].input_outer for leaf in ("up", "down"))
        assert ups is not None and downs is not None
        assert float(ups) == pytest.approx(divisor(float(x.abs().max())), rel=1e-6)
        assert float(downs) == pytest.approx(divisor(float(inner(live, expert, x).abs().max())), rel=1e-4)
    assert f"{EXPERTS * len(x):,} tokens" in change.reports["layer 0 experts inputs"]


RECIPE = """
name: t
acceptance: off
calibration: {{samples: 2, length: 48{experts}}}
steps:
  - prune: {{ratio: 0.25}}
{smooth}  - quantize:
      method: {method}
      gptq: {{least_tokens: 90}}
      autoround: {{iterations: 3, batch: 2, start: gptq}}
      rules: [{{roles: [expert.*, mtp.expert.*], scheme: int4}}]
  - export: {{format: compressed-tensors}}
"""
SMOOTH = "  - smooth: {folds: [norm.post, expert.up], grid: 3, clip: true}\n"


def recipe_of(reach: Reach, method: str = "gptq", smooth: str = "") -> Recipe:
    return parse_recipe(RECIPE.format(experts=f", experts: {reach}", method=method, smooth=smooth), "t")


def released(recipe: Recipe, out: Path) -> Result:
    run_recipe(recipe, str(checkpoint("moe")), out, 0, Report("test", "bytes", None))
    return read_result(out)


@pytest.mark.parametrize(
    ("method", "smooth"), [("gptq", ""), ("rtn", SMOOTH), ("autoround", "")], ids=["gptq", "awq", "autoround"]
)
def test_no_expert_goes_without_and_the_choice_of_experts_is_the_same(tmp_path: Path, method: str, smooth: str) -> None:
    """96 tokens, four experts of twelve each: with routed tokens alone most see too few."""
    routed, every = (released(recipe_of(reach, method, smooth), tmp_path / reach) for reach in ("routed", "all"))  # type: ignore[arg-type]
    assert (
        routed.pruning is not None
        and every.pruning is not None
        and routed.calibration is not None
        and every.calibration is not None
    )
    first = [(layer.tokens, layer.saliency, layer.kept) for layer in routed.pruning.layers]
    assert first == [(layer.tokens, layer.saliency, layer.kept) for layer in every.pruning.layers]
    short = [[k for k, says in r.calibration.reports.items() if "90 are wanted" in says] for r in (routed, every)]
    if method != "rtn":
        assert len(short[0]) > 40 and not short[1]
    experts = [_expert(tmp_path / reach) for reach in ("routed", "all")]
    assert not torch.equal(*experts), "what an expert is made of depends on what it was shown"


def _expert(folder: Path) -> Tensor:
    release = open_source(folder)
    slot = map_of(release).blocks[2].slot("expert.down", 1)
    return release.read(slot.tensor, slot.part)


@pytest.mark.parametrize(
    ("steps", "fits"),
    [
        ("  - quantize: {method: gptq, rules: [{roles: [expert.*], scheme: int4}]}\n", True),
        ("  - smooth: {}\n  - quantize: {rules: [{roles: [expert.*], scheme: int4}]}\n", True),
        ("  - quantize: {rules: [{roles: [expert.*], scheme: nvfp4-w4a4}]}\n", True),
        ("  - quantize: {method: autoround, autoround: {start: gptq}, rules: [{roles: [expert.*], scheme: int4}]}\n", True),
        ("  - quantize: {method: autoround, autoround: {start: rounding}, rules: [{roles: [expert.*], scheme: int4}]}\n", False),
        ("  - prune: {ratio: 0.5}\n", False),
    ],
    ids=["gptq", "awq", "w4a4", "autoround from gptq", "autoround from rounding", "prune"],
)  # fmt: skip
def test_a_recipe_that_gathers_nothing_by_expert_is_refused(steps: str, fits: bool) -> None:
    text = f"name: t\ncalibration: {{samples: 3, experts: all}}\nsteps:\n{steps}  - export: {{format: compressed-tensors}}\n"
    if fits:
        calibration = parse_recipe(text, "t").calibration
        assert calibration is not None and calibration.experts == "all"
        return
    with pytest.raises(RecipeError, match="no step gathers statistics of what experts read: pruning ranks by the tokens"):
        parse_recipe(text, "t")
