"""Making GGUF releases: what is planned is what appears; a killed run goes on; importance reaches the files; what cannot be written is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.errors import CheckpointError, OutputError, VerificationError
from qwench.formats.gguf_importance import read_importance
from qwench.formats.gguf_transforms import PlusOne
from qwench.recipe import AcceptanceGate, load_recipe, parse_recipe
from qwench.result import read_result
from qwench.run import plan_for, run_recipe
from qwench.steps.gguf.plan import GgufRelease
from tests.support.finetunes import demo_tensors, write_finetune
from tests.support.gguf_files import make_gguf, tensors_of
from tests.support.oracle import write_runnable

QUIET = Report("test", "bytes", None)
SMALL = "name: small\nacceptance: off\nsteps:\n- export: {format: gguf, types: [Q8_0, Q4_0]}\n"
OBSERVED = (
    "name: observed\nacceptance: off\nsteps:\n- export: {format: gguf, types: [Q4_K_M], importance: true}\n"
    "calibration: {samples: 4, length: 64}\n"
)


def test_what_is_planned_is_what_appears(tmp_path: Path) -> None:
    recipe, model = load_recipe("gguf").model_copy(update={"acceptance": "off"}), checkpoint("dense")
    plan = plan_for(recipe, str(model))
    result = run_recipe(recipe, str(model), tmp_path / "out", 1, QUIET)
    assert isinstance(plan, GgufRelease)
    assert {f.name: f.nbytes for f in plan.files} == {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.gguf")}
    assert result == read_result(tmp_path / "out")
    assert [(f.content, f.file_type) for f in result.files][-1] == ("vision", "BF16")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "result.json"} <= names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lost_head_comes_back_from_a_donor_and_is_measured_in_every_file(tmp_path: Path) -> None:
    """Release 2: the bundled recipe, on fewer rows."""
    recipe = load_recipe("mtp-gguf").model_copy(update={"acceptance": AcceptanceGate(documents=2, length=32)})
    assert recipe.gguf is not None and recipe.gguf.types == ("BF16", "Q8_0", "Q6_K", "Q4_K_M") and recipe.gguf.mmproj == "BF16"
    model = write_finetune(tmp_path / "tuned")
    result = run_recipe(recipe, str(model), tmp_path / "out", 1, QUIET, donor="demo:dense")
    models = [f for f in result.files if f.content == "model"]
    assert len(models) == 4 and all(any(row.component == "mtp" for row in f.precision) for f in models)
    for file in models:
        assert file.acceptance is not None and file.acceptance.release is not None and file.acceptance.source is not None
        assert file.acceptance.release.by_position[0].mean > 0.4
    assert models[0].acceptance is not None and models[0].acceptance.source == models[0].acceptance.release, (
        "BF16 loses nothing"
    )
    assert result.graft is not None and result.graft.tensors == 15
    head = tensors_of(tmp_path / "out" / "tuned-BF16.gguf")["blk.8.nextn.eh_proj.weight"][1]
    (donated,) = [t for n, t in demo_tensors().items() if n == "mtp.fc.weight"]
    assert torch.equal(head, donated.float())
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The MTP head (15 tensors) of `demo:dense`" in text and "| `tuned-Q4_K_M.gguf` |" in text


def test_a_dead_head_stops_the_run_and_can_be_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms without their offset, the classic of converters: every file looks whole, and no draft is accepted."""
    recipe = parse_recipe(
        "name: t\nacceptance: {documents: 2, length: 32}\nsteps:\n- export: {format: gguf, types: [Q8_0], mmproj: none}\n", "t"
    )
    model = str(checkpoint("dense"))
    monkeypatch.setattr(PlusOne, "apply", lambda self, weight: weight)
    with pytest.raises(VerificationError, match=r"dense-Q8_0\.gguf: at draft position 1 the release accepts 0"):
        run_recipe(recipe, model, tmp_path / "out", 1, QUIET)
    assert not (tmp_path / "out").exists()
    result = run_recipe(recipe, model, tmp_path / "out", 1, QUIET, accept_any=True)
    assert result.run.resumed_tensors == 1, "the file was whole, only its head was not worth much"
    assert result.files[0].acceptance is not None and result.files[0].acceptance.overridden
    assert "below that, and finished all the same" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_files_are_those_of_the_writer(tmp_path: Path) -> None:
    """The same bytes as a plan and a writer without the driver; metadata but for the name."""
    model = checkpoint("moe")
    run_recipe(parse_recipe(SMALL, "t"), str(model), tmp_path / "out", 1, QUIET)
    (path,) = (tmp_path / "out").glob("*-Q4_0.gguf")
    expected = tensors_of(make_gguf(model, tmp_path / "m.gguf", file_type="Q4_0"))
    found = tensors_of(path)
    assert found.keys() == expected.keys()
    assert all(found[n][0] == kind and torch.equal(found[n][1], values) for n, (kind, values) in expected.items())


def run_in_process(model: Path, recipe: Path, out: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
    import sys
    {textwrap.indent(textwrap.dedent(before), "    ").strip()}
    sys.argv = ["qwench", "run", {str(recipe)!r}, "--model", {str(model)!r}, "--out", {str(out)!r}]
    from qwench.cli import main
    main()
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=False
    )


STOP_IN_THE_SECOND_FILE = """
import os, signal
from qwench.formats import gguf_writer
real, seen = gguf_writer.matrices, set()
def stopping(source, tensor, slot):
    if tensor.name == "output_norm.weight":
        seen.add(len(seen))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGNAL)
    yield from real(source, tensor, slot)
gguf_writer.matrices = stopping
"""


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGINT"])
def test_a_stopped_run_goes_on_with_the_files_that_are_whole(stop: str, tmp_path: Path) -> None:
    recipe, model = tmp_path / "small.yaml", checkpoint("dense")
    recipe.write_text(SMALL)
    run_recipe(parse_recipe(SMALL, "t"), str(model), tmp_path / "whole", 1, QUIET)
    stopped = run_in_process(model, recipe, tmp_path / "out", STOP_IN_THE_SECOND_FILE.replace("SIGNAL", stop))
    assert stopped.returncode == (-signal.SIGKILL if stop == "SIGKILL" else 2), stopped.stderr
    assert "Traceback" not in stopped.stderr and not (tmp_path / "out").exists()
    finished = run_in_process(model, recipe, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert "resumed: 1 of 3 files are kept" in finished.stderr
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert names == {p.name for p in (tmp_path / "out").iterdir()}
    for name in names - {"result.json", "README.md", "provenance.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_importance_is_observed_written_and_used(tmp_path: Path) -> None:
    model = checkpoint("moe")
    result = run_recipe(parse_recipe(OBSERVED, "t"), str(model), tmp_path / "out", 1, QUIET)
    found = read_importance(tmp_path / "out" / "imatrix.gguf")
    (path,) = (tmp_path / "out").glob("*Q4_K_M.gguf")
    quantized = {t.name for t in gguf.GGUFReader(path).tensors if t.tensor_type.name not in ("F32", "BF16")}
    assert found.entries.keys() >= quantized - {"token_embd.weight"}
    head = f"blk.{json.loads((model / 'config.json').read_text())['text_config']['num_hidden_layers']}."
    assert any(name.startswith(head) for name in found.entries), "llama.cpp's own tool never sees the MTP head"
    assert (found.rows, found.length) == (4, 64)
    tokens = {float(entry.counts.sum()) for name, entry in found.entries.items() if name.endswith("attn_q.weight")}
    assert max(tokens) == 4 * 64
    assert result.calibration is not None and result.calibration.rows == 4
    without = tensors_of(make_gguf(model, tmp_path / "m.gguf", file_type="Q4_K_M"))
    used = tensors_of(path)
    assert any(not torch.equal(used[n][1], without[n][1]) for n in quantized - {"token_embd.weight"} if n in without)


def test_a_number_that_is_none_is_named_and_nothing_appears(tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][7, 5] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity, so blk.2.ffn_up.weight cannot be written"):
        run_recipe(parse_recipe(SMALL, "t"), str(model), tmp_path / "out", 1, QUIET)
    assert not (tmp_path / "out").exists()


def test_a_taken_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="is not empty"):
        run_recipe(parse_recipe(SMALL, "t"), str(checkpoint("dense")), tmp_path / "out", 1, QUIET)


def test_progress_counts_the_bytes_of_all_files(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []

    class Listening(Report):
        def __call__(self, done: int, total: int, what: str) -> None:
            heard.append((done, total))

    run_recipe(parse_recipe(SMALL, "t"), str(checkpoint("dense")), tmp_path / "out", 1, Listening("t", "bytes", None))
    assert heard[-1][0] <= heard[-1][1] and heard[-1][0] / heard[-1][1] > 0.99
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(heard))


def test_an_importance_file_can_be_given(tmp_path: Path) -> None:
    model = checkpoint("moe")
    run_recipe(parse_recipe(OBSERVED, "t"), str(model), tmp_path / "one", 1, QUIET)
    given = OBSERVED.partition("calibration")[0].replace("importance: true", f"importance: {tmp_path}/one/imatrix.gguf")
    result = run_recipe(parse_recipe(given, "t"), str(model), tmp_path / "two", 1, QUIET)
    assert result.calibration is None
    for path in (tmp_path / "one").glob("*.gguf"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert "with the importance matrix `imatrix.gguf`" in (tmp_path / "two" / "README.md").read_text(encoding="utf-8")


def test_importance_of_another_model_is_refused_before_any_work(tmp_path: Path) -> None:
    run_recipe(parse_recipe(OBSERVED, "t"), str(checkpoint("moe")), tmp_path / "one", 1, QUIET)
    given = OBSERVED.partition("calibration")[0].replace("importance: true", f"importance: {tmp_path}/one/imatrix.gguf")
    with pytest.raises(
        CheckpointError, match=r"imatrix.gguf has \[.*\] experts and channels for blk.*, the model has"
    ) as caught:
        run_recipe(parse_recipe(given, "t"), str(checkpoint("dense")), tmp_path / "two", 1, QUIET)
    assert "use the importance matrix of this very model" in caught.value.mend
    missing = given.replace("one/imatrix", "none/imatrix")
    with pytest.raises(CheckpointError, match=r"none/imatrix.gguf is no importance matrix"):
        run_recipe(parse_recipe(missing, "t"), str(checkpoint("moe")), tmp_path / "two", 1, QUIET)
    assert not (tmp_path / "two").exists()
