"""Transformers, really run: what it takes of a file, and what it says about one that is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qwench.engines import ENGINES, Request
from tests.support.oracle import write_runnable
from tests.support.releases import rewrite
from tests.support.tiny import write_tiny

ROWS = [[(7 * i + j * j) % 300 + 8 for j in range(19)] for i in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("transformers") / "dense")


def test_all_tensors_but_the_mtp_head_and_images(model: Path) -> None:
    answer = ENGINES["transformers"](Request(model, ROWS, generate=3, dtype="float32"))
    assert answer.refused is None and answer.uninitialized == []
    assert {name.split(".")[0] for name in answer.ignored} == {"mtp"} and len(answer.ignored) == 15
    assert not set(answer.consumed) & set(answer.ignored) and len(answer.consumed) == 104 - 15 + 0
    assert answer.image is not None and answer.image["tokens"] == 90 and answer.image["differs"]
    assert len(answer.generated) == 3
    for tokens, logprobs in answer.logprobs:
        assert tokens is None and logprobs.shape == (18, 1504)
        assert np.allclose(np.exp(logprobs.astype(np.float64)).sum(-1), 1, atol=1e-4)


def test_a_causal_checkpoint_and_the_most_likely_tokens(tmp_path: Path) -> None:
    answer = ENGINES["transformers"](Request(write_tiny(tmp_path / "m", layout="causal", mtp=None), ROWS, generate=2, top_k=7))
    assert answer.refused is None and answer.ignored == {} and answer.image is None
    tokens, logprobs = answer.logprobs[1]
    assert tokens is not None and tokens.shape == logprobs.shape == (18, 7)
    assert (np.diff(logprobs) <= 0).all()


def test_a_renamed_tensor_is_neither_taken_nor_made_up(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    right, wrong = (f"model.language_model.layers.3.self_attn.{name}.weight" for name in ("k_proj", "key_proj"))
    rewrite(broken, {right: wrong})
    answer = ENGINES["transformers"](Request(broken, ROWS, generate=1, image=False))
    assert wrong not in answer.consumed and right not in answer.consumed
    assert right in answer.uninitialized


def test_a_refusal_is_an_answer(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text.replace('"model_type": "qwen3_5"', '"model_type": "qwen99"'))
    answer = ENGINES["transformers"](Request(broken, ROWS, image=False))
    assert answer.refused is not None and "qwen99" in answer.refused
