"""GGUF releases in llama.cpp, and measured by our own reading: agreement of both, of drafts too; what is broken is noticed; what cannot be asked is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwench.demo import checkpoint
from qwench.display import Report
from qwench.engines import ENGINES, Answer, Request
from qwench.errors import CheckpointError, EngineError
from qwench.evaluation.rounds import Counters
from qwench.measuring import evaluate_gguf_release, verify_gguf_release
from qwench.recipe import parse_recipe
from qwench.result import Verification, read_result
from qwench.run import run_recipe
from qwench.steps.cards.card import write_card
from qwench.steps.gguf.verify import counters_agree, files_to_verify, is_gguf, refuse_gguf_questions, verify_gguf
from tests.support.gguf_files import make_gguf
from tests.test_cli import call

QUIET = Report("test", "bytes", None)


def made(which: str, out: Path, types: str, content: str = "[model]") -> Path:
    recipe = f"name: t\nacceptance: off\nsteps:\n- export: {{format: gguf, types: {types}, content: {content}}}\n"
    run_recipe(parse_recipe(recipe, "t"), f"demo:{which}", out, 1, QUIET)
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("dense", tmp_path_factory.mktemp("gguf") / "dense", "[BF16, Q4_K_M]")


@pytest.mark.engine("llama.cpp")
def test_the_dense_demo_agrees_with_us_and_with_transformers(dense: Path) -> None:
    found = {str(v.file): v for v in verify_gguf_release(dense, "llama.cpp", None, "demo:dense")}
    plain, quantized = found["demo-dense-BF16.gguf"], found["demo-dense-Q4_K_M.gguf"]
    for one in (plain, quantized):
        assert one.outcome == "agrees", one.notes
        assert not one.unconsumed and one.consumed == 124
        assert one.speculation is not None and one.image is not None and "changes what it says" in one.image
        assert one.speculation["drafted"] > 50
        assert abs(one.speculation["accepted"] - one.speculation["ours accepted"]) <= 2
        assert "without speculation it writes the same" in one.notes
    assert plain.original_kl is not None and plain.original_kl < 1e-4 and plain.original_tolerance_kl == 1e-4
    assert quantized.original_kl is None
    assert [v.file for v in read_result(dense).verifications] == list(found)


@pytest.mark.engine("llama.cpp")
def test_the_moe_demo_and_a_draft_file(tmp_path: Path) -> None:
    release = made("moe", tmp_path / "moe", "[BF16]", "[model, trunk-only, mtp-only]")
    whole, trunk = verify_gguf(release, source=checkpoint("moe"))
    assert (whole.outcome, trunk.outcome) == ("agrees", "agrees"), (whole.notes, trunk.notes)
    assert whole.original_kl is not None and whole.original_kl < 1e-3
    assert "drafted with the draft file beside it" in trunk.notes
    assert whole.speculation == trunk.speculation, "the head drafts the same from a file of its own"


@pytest.mark.engine("llama.cpp")
def test_a_file_that_is_another_network_than_we_read_disagrees(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is given the file, our reader one with other weights: nothing but the numbers can tell."""
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((dense / name).read_bytes())
    make_gguf(checkpoint("dense"), tmp_path / "m.gguf", file_type="Q3_K_S")
    real = ENGINES["llama.cpp"]

    def other(request: Request) -> Answer:
        from dataclasses import replace

        return real(replace(request, folder=dense / "demo-dense-BF16.gguf", image=False))

    monkeypatch.setitem(ENGINES, "llama.cpp", other)
    (found,) = verify_gguf(tmp_path)
    assert found.outcome == "disagrees" and found.mean_kl is not None and found.mean_kl > 1e-3


def test_judgement() -> None:
    expected = Counters(rounds=50, drafted=98, accepted=60, by_position=(36, 24))
    assert counters_agree(expected, {"drafted": 100, "accepted": 58})
    assert not counters_agree(expected, {"drafted": 100, "accepted": 0}), "a dead head"
    assert not counters_agree(expected, {"drafted": 60, "accepted": 60})


def test_a_refusal_is_a_failure(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "llama.cpp", lambda request: Answer(version="0", refused="no such architecture"))
    found = verify_gguf(dense, "demo-dense-BF16.gguf")
    assert [v.outcome for v in found] == ["failed"] and "no such architecture" in found[0].notes[0]


def test_a_tensor_that_is_of_no_use_is_a_failure(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> Answer:
        logprobs = np.full((len(request.rows[0]) - 1, 5000), -9.0, np.float32)
        found = Answer(version="0", consumed=["a"], ignored={"blk.0.odd": "no use"})
        found.logprobs = [(np.zeros((127, 1), np.int64), logprobs[:, :1])] * len(request.rows)
        return found

    monkeypatch.setitem(ENGINES, "llama.cpp", answer)
    (found,) = verify_gguf(dense, "demo-dense-BF16.gguf")
    assert found.outcome == "failed" and found.unconsumed == ["blk.0.odd"]


def test_a_truncated_file_is_one_message(dense: Path, tmp_path: Path) -> None:
    for path in dense.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "demo-dense-Q4_K_M.gguf"
    broken.write_bytes(broken.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"demo-dense-Q4_K_M.gguf cannot be read as GGUF"):
        verify_gguf(tmp_path)
    with pytest.raises(CheckpointError, match=r"demo-dense-Q4_K_M.gguf cannot be read as GGUF"):
        evaluate_gguf_release(tmp_path, "demo:dense", None, 2, 32, QUIET)


def test_a_file_without_a_config_beside_it(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes((dense / "demo-dense-Q4_K_M.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        verify_gguf(tmp_path)


def test_engines_and_releases_that_do_not_fit(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("dense"))
    for arguments, said in (
        (("verify", str(dense), "--engine", "vllm"), "is a GGUF release, and vllm is asked to read it"),
        (("verify", folder, "--engine", "llama.cpp"), "holds no GGUF file of a language model"),
        (("verify", folder, "--file", "x.gguf"), "--file x.gguf is for GGUF releases"),
        (("verify", folder, "--against", "y"), "--against y is for GGUF releases"),
        (("verify", str(dense), "--file", "demo-dense-Q4_KM.gguf"), "did you mean 'demo-dense-Q4_K_M.gguf'?"),
        (("verify", str(dense / "none.gguf")), "there is no file"),
    ):
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert code == 2 and said in err.replace("\n", " ") and "Traceback" not in err, (arguments, err)


def test_what_is_verified(dense: Path) -> None:
    assert [p.name for p in files_to_verify(dense)] == ["demo-dense-BF16.gguf", "demo-dense-Q4_K_M.gguf"]
    assert files_to_verify(dense / "demo-dense-BF16.gguf") == [dense / "demo-dense-BF16.gguf"]
    assert is_gguf(dense) and not is_gguf(checkpoint("dense"))
    with pytest.raises(EngineError):
        refuse_gguf_questions(checkpoint("dense"), "llama.cpp", None, None)
    refuse_gguf_questions(checkpoint("dense"), "vllm", None, None)


def test_every_file_is_measured_and_the_card_is_a_ladder(dense: Path, tmp_path: Path) -> None:
    measured = evaluate_gguf_release(dense, "demo:dense", None, 3, 48, QUIET)
    plain, quantized = measured["demo-dense-BF16.gguf"], measured["demo-dense-Q4_K_M.gguf"]
    assert abs(plain.divergence.mean.mean) < 1e-6 < 1e-4 < quantized.divergence.mean.mean < 0.05
    assert plain.acceptance_release == plain.acceptance_source and quantized.acceptance_release is not None
    record = read_result(dense)
    assert {f.name: f.evaluation for f in record.files if f.evaluation} == measured
    record.verifications = [
        Verification(
            engine="llama.cpp", file="demo-dense-Q4_K_M.gguf", version="9.8.7", outcome="agrees", consumed=124, mean_kl=1.7e-4, tolerance_kl=1e-3,
            speculation={"drafts": 61.0, "drafted": 119.0, "accepted": 60.0, "ours drafted": 118.0, "ours accepted": 61.0},
        )
    ]  # fmt: skip
    (dense / "result.json").write_text(record.model_dump_json())
    text = write_card(dense).read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `demo-dense-Q4_K_M.gguf` | 5.08"))
    assert f"{quantized.acceptance_release.by_position[0].mean:.0%}"[:2] in row and "agrees" in row
    assert "llama-server -m demo-dense-Q4_K_M.gguf --mmproj mmproj-demo-dense-BF16.gguf" in text
    assert "--spec-type draft-mtp" in text and "60 of 119" in text and "61 of 118" in text
    assert text.startswith("---\n") and "library_name: gguf" in text


def test_the_command_line_shows_the_ladder(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(
        monkeypatch, capsys, "eval", str(dense), "--against", "demo:dense", "--documents", "2", "--length", "24", "--json"
    )
    assert code == 0 and set(json.loads(out)) == {"demo-dense-BF16.gguf", "demo-dense-Q4_K_M.gguf"}
