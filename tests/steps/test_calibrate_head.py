"""Weights of the MTP head in a calibrated release: every method, what is reported, what is left alone, and rows that overflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.checkpoint.reader import Checkpoint
from qwench.checkpoint.writer import CheckpointWriter
from qwench.errors import CheckpointError
from qwench.formats.release import open_source
from qwench.models import map_of
from qwench.models.mtp import MtpHead
from qwench.models.run import Trunk
from qwench.recipe import parse_recipe
from qwench.steps.calibrate import Calibrated, calibrate, split_jobs, write_job
from qwench.steps.planning.plan import Plan, make_plan
from qwench.steps.quantize import do_jobs, errors_of
from qwench.stream.head import LiveHead
from qwench.stream.rows import Rows, ids_sha256
from tests.support.tiny import write_tiny

ROWS, LENGTH = 12, 48
HEAD = "mtp.fc, mtp.attention.*, mtp.mlp.*"
MOE_HEAD = "mtp.fc, mtp.attention.*, mtp.expert.*, mtp.shared.*"
RECIPE = """
name: t
calibration: {{samples: 12, length: 48}}
steps:
{before}  - quantize: {{method: {method}, gptq: {{least_tokens: 8}}, autoround: {{iterations: 10}}, rules: [{rules}]}}
  - export: {{format: compressed-tensors}}
"""


def rows_of(vocabulary: int, count: int = ROWS) -> Rows:
    ids = torch.randint(1, vocabulary, (count, LENGTH), generator=torch.Generator().manual_seed(4))
    return Rows(ids, tuple(range(count)), tuple(str(n) for n in range(count)), "random ids", "ab" * 32, ids_sha256(ids))


def rule(roles: str, scheme: str = "int4", layers: str = "all") -> str:
    return f"{{roles: [{roles}], scheme: {scheme}, layers: {layers}}}"


def plan_of(folder: Path, method: str, *rules: str, before: str = "") -> tuple[Plan, Checkpoint]:
    text = RECIPE.format(method=method, rules=", ".join(rules), before=before)
    if method == "rtn" and not before:
        text = text.replace("calibration: {samples: 12, length: 48}\n", "")
    source = Checkpoint.open(folder)
    return make_plan(parse_recipe(text, "t"), source, map_of(source)), source


def release(
    plan: Plan, source: Checkpoint, out: Path, rows: Rows | None = None, tell: Callable[[int, int, str], None] | None = None
) -> Calibrated | None:
    """What `run_recipe` writes, from rows at hand."""
    with CheckpointWriter(out, plan.files, plan.fingerprint) as writer:
        if rows is None:
            do_jobs(plan.jobs, source, writer, lambda job: None)
            found = None
        else:
            found = calibrate(plan, source, writer, rows, tell or (lambda *_: None))
            do_jobs(split_jobs(plan)[0], source, writer, lambda job: None)
        names = {error.module for error in errors_of(writer)}
        assert names == set(plan.schemes), "every quantized weight has its round-trip error on record"
        writer.commit({"config.json": (plan.source.folder / "config.json").read_bytes()})
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("head") / "model", moe=request.param)


def head_of(folder: Path) -> str:
    return MOE_HEAD if map_of(Checkpoint.open(folder)).model_type == "qwen3_5_moe" else HEAD


def drafts(head_in: Path, plan: Plan, trunk_in: Path, ids: Tensor) -> Tensor:
    """What a head drafts from (before lm_head), on the trunk of the source."""
    source, release = Checkpoint.open(trunk_in), open_release(head_in, plan)
    trunk = Trunk(source, map_of(source))
    return MtpHead(release, map_of(release)).drafts(trunk.forward(ids), trunk.embed(ids), 1)[0]


def open_release(folder: Path, plan: Plan):  # type: ignore[no-untyped-def]
    import json

    (folder / "config.json").write_text(json.dumps(plan.config), encoding="utf-8")
    return open_source(folder)


@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_a_calibrated_head_is_closer_than_a_rounded_one_and_nothing_else_changes(
    model: Path, tmp_path: Path, method: str
) -> None:
    plans, errors = {}, {}
    rows = rows_of(map_of(Checkpoint.open(model)).other("embed").shape[0])
    expected = None
    for name in ("rtn", method):
        plan, source = plan_of(model, name, rule(head_of(model)))
        found = release(plan, source, tmp_path / name, rows if name != "rtn" else None)
        if expected is None:
            trunk = Trunk(source, map_of(source))
            expected = MtpHead(source, map_of(source)).drafts(trunk.forward(rows.ids), trunk.embed(rows.ids), 1)[0]
        errors[name] = float((drafts(tmp_path / name, plan, model, rows.ids) - expected).square().mean())
        plans[name] = plan
    assert 0 < errors[method] < 0.9 * errors["rtn"], errors
    assert found is not None and found.reports
    if method == "gptq":
        assert any(key.startswith("mtp.fc") and "of rounding" in said for key, said in found.reports.items())
    else:
        assert "mtp layer 0 autoround" in found.reports and all(key.startswith("mtp") for key in found.reports), (
            "its start is GPTQ"
        )
    source = Checkpoint.open(model)
    written = Checkpoint.open(tmp_path / method)
    for name in source.tensors.keys() & written.tensors.keys():
        assert torch.equal(source.read(name), written.read(name)), name
    assert {m.partition(".")[0] for m in plans[method].schemes} == {"mtp"}


def test_trunk_and_head_together_and_layers_of_the_head_are_its_own(model: Path, tmp_path: Path) -> None:
    """`layers: 1..` of a rule for the trunk does not reach the head's layer 0, and `layers: 0..0` of one for the head is that layer."""
    plan, source = plan_of(
        model, "gptq", rule("attention.*, delta.out", layers="1.."), rule("mtp.attention.*", layers="0..0"), rule("mtp.fc")
    )
    stems = {module.rpartition(".")[0].removeprefix("model.language_model.") for module in plan.schemes}
    assert stems == {"layers.1.linear_attn", "layers.2.linear_attn", "layers.3.self_attn", "mtp.layers.0.self_attn", "mtp"}
    told: list[str] = []
    rows = rows_of(map_of(source).other("embed").shape[0])
    found = release(plan, source, tmp_path / "out", rows, lambda done, layers, what: told.append(f"{done}/{layers} {what}"))
    assert found is not None
    assert sum("loss" in said for said in found.reports.values()) == 2 + 2 + 2 + 1
    assert told[0] == "0/5 layer 0 (1 of 5): gptq" and told[-1].startswith("5/5")
    assert any(line.startswith("4/5 the MTP head (5 of 5): gptq, ") and line.endswith("tokens/s") for line in told)


def test_smoothing_leaves_the_head_alone(model: Path, tmp_path: Path) -> None:
    mlp = "mlp.*" if head_of(model) == HEAD else "expert.*, shared.*"
    plan, source = plan_of(model, "gptq", rule(mlp), rule("mtp.fc"), before="  - smooth: {grid: 3}\n")
    release(plan, source, tmp_path / "out", rows_of(map_of(source).other("embed").shape[0]))
    written = Checkpoint.open(tmp_path / "out")
    kept = [name for name in source.tensors if name.startswith("mtp.") and name != "mtp.fc.weight"]
    assert kept and all(torch.equal(source.read(name), written.read(name)) for name in kept)


def test_clipping_leaves_the_head_alone_too(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    heads = []
    for clip in ("false", "true"):
        step = f"  - smooth: {{grid: 3, layers: 0..0, clip: {clip}}}\n"
        plan, source = plan_of(model, "rtn", rule("mlp.*"), rule("mtp.mlp.*"), before=step)
        release(plan, source, tmp_path / clip, rows_of(map_of(source).other("embed").shape[0]))
        written = Checkpoint.open(tmp_path / clip)
        heads.append({name: written.read(name) for name in written.tensors if name.startswith("mtp.")})
    assert heads[0] and all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_smoothing_of_the_head_where_it_is_named(model: Path, tmp_path: Path, method: str) -> None:
    """The trunk is left alone, every reader of the head's norm is compensated, and a rounded head loses less."""
    moe = head_of(model) == MOE_HEAD
    folder = tmp_path / "outliers"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["mtp.layers.0.post_attention_layernorm.weight"][3::29] += 6
    save_file(tensors, folder / "model.safetensors")
    roles = "mtp.expert.*, mtp.shared.gate, mtp.shared.up" if moe else "mtp.mlp.gate, mtp.mlp.up"
    rows = rows_of(map_of(Checkpoint.open(folder)).other("embed").shape[0])
    errors, expected = [], None
    for before in ("", "  - smooth: {folds: [mtp.norm.post], layers: 1.., grid: 8}\n"):
        plan, source = plan_of(folder, method, rule(roles), before=before)
        out = tmp_path / f"out{len(errors)}"
        found = release(plan, source, out, rows if plan.recipe.calibrated else None)
        if expected is None:
            trunk = Trunk(source, map_of(source))
            expected = MtpHead(source, map_of(source)).drafts(trunk.forward(rows.ids), trunk.embed(rows.ids), 1)[0]
        errors.append(float((drafts(out, plan, folder, rows.ids) - expected).square().mean()))
    assert found is not None and "mtp layer 0 norm.post" in found.reports
    assert errors[1] < (0.9 if method == "rtn" else 1.3) * errors[0], f"{errors}: GPTQ makes up for outliers by itself"
    written = Checkpoint.open(out)
    changed = {n for n in source.tensors.keys() & written.tensors.keys() if not torch.equal(source.read(n), written.read(n))}
    stem = "mtp.layers.0."
    readers = {f"{stem}mlp.gate.weight", f"{stem}mlp.shared_expert_gate.weight"} if moe else set()
    assert changed == readers | {f"{stem}post_attention_layernorm.weight"}


def test_a_run_stopped_in_the_head_goes_on_and_ends_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, source = plan_of(model, "gptq", rule("attention.*"), rule(head_of(model)))
    rows = rows_of(map_of(source).other("embed").shape[0])
    whole = release(plan, source, tmp_path / "whole", rows)

    class Stop(BaseException):
        pass

    real, stops = CheckpointWriter.write, [9]

    def stopping(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        stops[0] -= name.startswith("mtp.")
        if stops[0] == 0:
            raise Stop
        real(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", stopping)
    with pytest.raises(Stop):
        release(plan, source, tmp_path / "parts", rows)
    monkeypatch.undo()
    told: list[str] = []
    parts = release(plan, source, tmp_path / "parts", rows, lambda done, layers, what: told.append(what))
    assert told[0].startswith("the MTP head (5 of 5)"), "the trunk is not walked again"
    assert parts == whole
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


TOKEN = 7
"""The token that makes a row overflow."""


def overflowing(folder: Path) -> Path:
    """A checkpoint whose layer 1 makes rows with `TOKEN` infinite in the middle of its MLP, though every weight is finite.

    Channel 3 of the hidden state belongs to this token alone, until layer 1 reads it with a weight near the largest that bfloat16 has.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    stem = "model.language_model."
    tensors[f"{stem}embed_tokens.weight"][:, 3] = 0
    tensors[f"{stem}embed_tokens.weight"][TOKEN, 3] = 4
    for name, tensor in tensors.items():
        if name.startswith((f"{stem}layers.0.", f"{stem}layers.1.")) and name.endswith(("out_proj.weight", "down_proj.weight")):
            tensor[3] = 0
        if name.endswith("layers.0.mlp.experts.down_proj"):
            tensor[:, 3] = 0
        if name.endswith(("layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight")):
            tensor[5], tensor[5, 3] = 0, 3e37
        if name.endswith("layers.1.mlp.experts.gate_up_proj"):
            for half in (5, 5 + tensor.shape[1] // 2):
                tensor[:, half], tensor[:, half, 3] = 0, 3e37
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_a_few_rows_that_overflow_are_left_out_and_the_release_is_finite(tmp_path: Path, method: str, moe: bool) -> None:
    model = overflowing(write_tiny(tmp_path / "model", moe=moe))
    before = "  - smooth: {grid: 3, clip: true, folds: [norm.post, norm.input, expert.up, mlp.up]}\n" if method == "awq" else ""
    mlp = "expert.*" if moe else "mlp.down"
    rules = rule(f"{mlp}, attention.*, delta.out"), rule(MOE_HEAD if moe else HEAD)
    plan, source = plan_of(model, "gptq" if method == "awq" else method, *rules, before=before)
    rows = rows_of(map_of(source).other("embed").shape[0])
    rows.ids[rows.ids == TOKEN] = TOKEN + 1
    rows.ids[8, 30] = TOKEN
    found = release(plan, source, tmp_path / "out", rows)
    assert found is not None and found.lost_rows == [(1, 8)], "layer and row are on record"
    assert not any("second moment" in said or "not finite" in said for said in found.reports.values()), found.reports
    for tensor in load_file(tmp_path / "out" / "model.safetensors").values():
        assert not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def test_the_release_is_that_of_the_rows_that_stay(tmp_path: Path) -> None:
    """A row that overflows in layer 1 changes nothing from layer 1 on; too many such rows stop the walk."""
    model = overflowing(write_tiny(tmp_path / "model"))
    plan, source = plan_of(model, "gptq", rule("attention.*, mlp.*, delta.out", layers="1.."), rule(HEAD))
    rows = rows_of(map_of(source).other("embed").shape[0])
    rows.ids[rows.ids == TOKEN] = TOKEN + 1
    rows.ids[11, 30] = TOKEN
    rest = rows_of(map_of(source).other("embed").shape[0], ROWS - 1)
    rest.ids[:] = rows.ids[:-1]
    assert release(plan, source, tmp_path / "rest", rest) is not None
    found = release(plan, source, tmp_path / "out", rows)
    assert found is not None and found.lost_rows == [(1, 11)]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "rest" / "model.safetensors").read_bytes()
    rows.ids[3, 11] = TOKEN
    with pytest.raises(
        CheckpointError, match=r"2 of 12 calibration rows are not finite after layer 1; the first was row 3 in layer 1"
    ):
        release(plan, source, tmp_path / "refused", rows)
    assert not (tmp_path / "refused").exists()


def test_what_would_be_stored_as_infinite_is_refused_by_name(tmp_path: Path) -> None:
    plan, source = plan_of(write_tiny(tmp_path / "model"), "gptq", rule("mtp.fc"))
    head = LiveHead(source, plan.map, Trunk(source, plan.map).modules)
    slot = head.block.slot("mtp.norm.post")
    head.alter(slot, torch.full(slot.shape, 3.4e38))  # finite until it is stored in bfloat16
    job = next(job for job in plan.jobs if job.copied and job.copied.name == slot.tensor)
    with (
        CheckpointWriter(tmp_path / "out", plan.files, plan.fingerprint) as writer,
        pytest.raises(CheckpointError, match=rf"{slot.tensor}: what mtp layer 0 would store is NaN or infinite"),
    ):
        write_job(job, head, source, writer)
