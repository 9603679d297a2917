"""The verdict on an engine: what counts as agreement, what as a lost tensor, and where an engine's own fault is named instead of a tolerance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.engines import ENGINES, Answer, Request
from qwench.errors import EngineError
from qwench.models import map_of
from qwench.steps.checks.known_readers import wrong_reader
from qwench.steps.checks.verify import TOLERANCES, Comparison, compare, judge, row_divergence, verify
from tests.support.oracle import write_runnable
from tests.support.releases import release
from tests.support.tiny import write_tiny

ROWS = [[(7 * i + j * j) % 300 + 8 for j in range(23)] for i in range(2)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("verify") / "dense")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("verify") / "moe", moe=True, vision=False, layout="causal")


def logprobs(seed: int) -> torch.Tensor:
    return torch.log_softmax(3 * torch.randn(11, 40, generator=torch.Generator().manual_seed(seed)), -1)


def test_divergence_of_whole_distributions_is_kl() -> None:
    ours, theirs = logprobs(1), logprobs(2)
    found, largest = row_divergence(ours, None, theirs.numpy())
    expected = torch.nn.functional.kl_div(theirs.double(), ours.double(), log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert largest == pytest.approx(float((ours - theirs).abs().max()), rel=1e-6)


def test_the_most_likely_tokens_bound_it_from_below() -> None:
    ours, theirs = logprobs(1), logprobs(2)
    whole, _ = row_divergence(ours, None, theirs.numpy())
    before = np.zeros(11)
    for k in (1, 5, 20):
        best, tokens = theirs.topk(k)
        found, _ = row_divergence(ours, tokens.numpy(), best.numpy())
        assert (found >= before - 1e-5).all() and (found <= whole + 1e-5).all()
        before = found


def test_agreement_is_zero() -> None:
    best, tokens = logprobs(3).topk(6)
    assert np.abs(row_divergence(logprobs(3), tokens.numpy(), best.numpy())[0]).max() < 1e-9


def answer_for(checkpoint: Checkpoint, **changes: Any) -> Answer:
    return Answer(**({"version": "9", "consumed": list(checkpoint.tensors), "generated": [17, 4]} | changes))


CLOSE, FAR = Comparison(44, 1e-5, 0.02), Comparison(44, 0.05, 2.0)


@pytest.mark.parametrize(
    ("changes", "compared", "wrong", "outcome", "says"),
    [
        ({}, CLOSE, None, "agrees", "computed in"),
        ({}, FAR, None, "disagrees", "computed in"),
        ({}, Comparison(44, float("nan"), float("nan")), None, "disagrees", "computed in"),
        ({"stand_ins": ["NVFP4 linear layers"]}, CLOSE, None, "loads", "not proved"),
        ({"stand_ins": ["NVFP4 linear layers"]}, FAR, None, "disagrees", "not proved"),
        ({"refused": "ValueError: no kernel"}, None, None, "failed", "no kernel"),
        ({}, None, None, "failed", "computed in"),
        ({"uninitialized": ["layers.3.qkv_proj.weight"]}, CLOSE, None, "failed", "computed in"),
        ({"image": {"tokens": 9, "generated": [1], "differs": False}}, CLOSE, None, "disagrees", "computed in"),
        ({}, None, "transformers drops the global scale", "loads", "drops"),
        ({"uninitialized": ["a.experts.gate_up_proj"]}, None, "random experts", "loads", "random"),
        ({"uninitialized": ["layers.3.q_proj.weight"]}, None, "random experts", "failed", "random"),
    ],
)
def test_outcomes(
    changes: dict[str, Any], compared: Comparison | None, wrong: str | None, outcome: str, says: str, dense: Path
) -> None:
    checkpoint = Checkpoint.open(dense)
    found = judge(
        "an engine", Request(dense, ROWS), map_of(checkpoint), checkpoint, answer_for(checkpoint, **changes), compared, wrong
    )
    assert found.outcome == outcome and any(says in note for note in found.notes)
    assert found.tolerance_kl == TOLERANCES["bfloat16", False]


def test_a_tensor_that_reached_nothing_fails_it_unless_the_engine_skips_it_by_design(dense: Path) -> None:
    checkpoint = Checkpoint.open(dense)
    lost = "mtp.fc.weight"
    rest = [name for name in checkpoint.tensors if name != lost]
    for ignored, outcome in (({}, "failed"), ({lost: "has no MTP"}, "agrees")):
        answer = answer_for(checkpoint, consumed=rest, ignored=ignored)
        found = judge("an engine", Request(dense, ROWS), map_of(checkpoint), checkpoint, answer, CLOSE, None)
        assert (found.outcome, found.unconsumed, found.consumed) == (outcome, [lost], len(rest))


def test_an_unknown_engine_gets_a_suggestion(dense: Path) -> None:
    with pytest.raises(EngineError, match="did you mean 'transformers'") as caught:
        verify(dense, "transfomers")
    assert "vllm" in caught.value.mend


@pytest.mark.parametrize("recipe", ["nvfp4a16", "int4"])
def test_transformers_agrees_with_our_reading_of_a_dense_release(recipe: str, dense: Path, tmp_path: Path) -> None:
    found = verify(release(dense, recipe, tmp_path / "out"), "transformers", ROWS, threads=1)
    assert found.outcome == "agrees", found.notes
    assert found.positions == 44 and found.uninitialized == [] and all(name.startswith("mtp.") for name in found.unconsumed)
    assert found.image is not None and "changes what it says" in found.image and found.generated


def test_and_of_symmetric_integer_experts(moe: Path, tmp_path: Path) -> None:
    found = verify(release(moe, "int4", tmp_path / "out"), "transformers", ROWS, threads=1)
    assert found.outcome == "agrees" and found.image is None, found.notes


def test_a_wrong_reading_disagrees(dense: Path, tmp_path: Path) -> None:
    """Were the tolerance loose enough for one exchanged pair of scales, it would prove nothing."""
    from safetensors.torch import load_file, save_file

    from qwench.formats.release import open_source
    from qwench.models.run import Trunk

    out = release(dense, "int4", tmp_path / "out")
    answer = ENGINES["transformers"](Request(out, ROWS, dtype="float32", image=False))
    path = next(
        p for p in sorted(out.glob("*.safetensors")) if any("layers.1.mlp.gate_proj.weight_scale" in n for n in load_file(p))
    )
    tensors = load_file(path)
    name = "model.language_model.layers.1.mlp.gate_proj.weight_scale"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    source = open_source(out)
    assert compare(Trunk(source, map_of(source)), ROWS, answer).mean_kl > 2 * TOLERANCES["float32", False]


def test_nvfp4_experts_load_in_transformers_and_the_reason_is_named(moe: Path, tmp_path: Path) -> None:
    out = release(moe, "nvfp4a16", tmp_path / "out")
    found = verify(out, "transformers", ROWS, threads=1)
    assert found.outcome == "loads" and found.mean_kl is None
    assert "drops the global scale" in found.notes[0]


def names_of(folder: Path, names: list[str], quantized: bool = True) -> Checkpoint:
    """A checkpoint with such names, one byte each."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {}} if quantized else {}))
    save_file({name: torch.zeros(1, dtype=torch.uint8) for name in names}, folder / "model.safetensors")
    return Checkpoint.open(folder)


EXPERT = "model.layers.2.mlp.experts.4.up_proj."


@pytest.mark.parametrize(
    ("names", "uninitialized", "reason"),
    [
        ([EXPERT + "weight_packed", EXPERT + "weight_global_scale"], [], "global scale"),
        ([EXPERT + "weight_packed", EXPERT + "weight_zero_point"], [], "zero points"),
        ([EXPERT + "weight_packed", EXPERT + "weight_scale"], [], None),
        ([EXPERT + "weight"], ["model.layers.2.mlp.experts.gate_up_proj"], "random values"),
        ([EXPERT + "weight"], ["model.layers.2.self_attn.q_proj.weight"], None),
        (["model.layers.2.mlp.shared_expert.up_proj.weight_global_scale"], [], None),
        (["model.layers.2.mlp.up_proj.weight_zero_point"], [], None),
        (["mtp.layers.0.mlp.experts.4.up_proj.weight_global_scale"], [], None),
    ],
)
def test_known_wrong_readers(names: list[str], uninitialized: list[str], reason: str | None, tmp_path: Path) -> None:
    checkpoint = names_of(tmp_path / "m", names)
    found = wrong_reader("transformers", checkpoint, uninitialized)
    assert (found is None) if reason is None else (found is not None and reason in found)
    assert wrong_reader("vllm", checkpoint, uninitialized) is None
    assert wrong_reader("transformers", names_of(tmp_path / "plain", names, quantized=False), uninitialized) is None
