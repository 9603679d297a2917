"""llama.cpp reads what we write: every tensor, its numbers, its MTP head, its tower; and refuses what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from qwench.checkpoint.reader import Checkpoint
from qwench.demo import checkpoint, text
from qwench.engines import llama_cpp
from qwench.engines.base import Answer, Request
from qwench.errors import EngineError
from qwench.formats.gguf_source import GgufSource
from qwench.models import map_of
from qwench.models.run import Trunk
from tests.support.gguf_files import make_gguf
from tests.support.oracle import cycle_row, write_oracle, write_runnable

pytestmark = pytest.mark.engine("llama.cpp")
LENGTH = 40


def rows(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, vocabulary, (count, LENGTH), generator=generator).tolist()


def text_rows(folder: Path, count: int) -> list[list[int]]:
    """Rows of held-out text: a network is sure of its routes there, whereas after random tokens the rounding of activations to BF16 decides between experts."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with text("held").open(encoding="utf-8") as lines:
        return [tokenizer.encode(json.loads(line)["text"]).ids[:LENGTH] for line, _ in zip(lines, range(count), strict=False)]


def divergence(folder: Path, asked: list[list[int]], answer: Answer) -> float:
    """Mean KL of the engine's log-probabilities from the checkpoint's in float32, nats."""
    with Checkpoint.open(folder) as source:
        return divergence_from(Trunk(source, map_of(source)), asked, answer)


def divergence_from(trunk: Trunk, asked: list[list[int]], answer: Answer) -> float:
    with torch.no_grad():
        ours = torch.log_softmax(trunk.logits(trunk.forward(torch.tensor(asked))).double(), -1)[:, :-1]
    theirs = torch.from_numpy(np.stack([logprobs for _, logprobs in answer.logprobs])).double()
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize(("which", "bound"), [("dense", 1e-4), ("moe", 1e-3)])
def test_demo_checkpoints_say_the_same(which: str, bound: float, tmp_path: Path) -> None:
    folder = checkpoint(which)  # type: ignore[arg-type]
    path = make_gguf(folder, tmp_path / "model.gguf")
    make_gguf(folder, tmp_path / "mmproj.gguf", content="vision")
    asked = text_rows(folder, 4)
    answer = llama_cpp.run(Request(tmp_path, asked, generate=4))
    assert answer.refused is None
    assert sorted(answer.consumed) == sorted(t.name for t in gguf.GGUFReader(path).tensors)
    assert not answer.ignored
    assert len(answer.generated) == 4
    assert divergence(folder, asked, answer) < bound
    assert answer.image is not None and answer.image["differs"]
    assert answer.image["tokens"] == (288 // 32) * (320 // 32) + 2  # a token for 32x32 pixels, and the two that enclose them


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_M"])
def test_quantized_files_mean_the_same_to_both(file_type: str, tmp_path: Path) -> None:
    """Our reading of the file against llama.cpp's, which rounds activations to 8 bits before quantized matrices."""
    folder = checkpoint("dense")
    path = make_gguf(folder, tmp_path / "model.gguf", file_type=file_type)
    source = GgufSource(path, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    asked = text_rows(folder, 4)
    answer = llama_cpp.run(Request(path, asked, generate=1, image=False))
    assert answer.refused is None
    assert divergence_from(Trunk(source, source.map), asked, answer) < 1e-3


@pytest.mark.parametrize("moe", [False, True])
def test_random_norms_and_heads_say_the_same(moe: bool, tmp_path: Path) -> None:
    folder = write_runnable(tmp_path / "m", moe=moe)
    path = make_gguf(folder, tmp_path / "model.gguf", file_type="F32", content="trunk")
    asked = rows(2, 1400)
    answer = llama_cpp.run(Request(path, asked, generate=1, image=False))
    assert answer.refused is None
    assert divergence(folder, asked, answer) < 1e-5


@pytest.mark.parametrize("moe", [False, True])
def test_every_draft_of_a_right_head_is_accepted(moe: bool, tmp_path: Path) -> None:
    path = make_gguf(write_oracle(tmp_path / "m", moe=moe), tmp_path / "model.gguf")
    answer = llama_cpp.run(Request(path, [cycle_row(LENGTH)], generate=12, speculate=2, image=False))
    assert answer.generated == cycle_row(LENGTH + 12)[LENGTH:]
    assert answer.speculation is not None
    assert answer.speculation["accepted"] == answer.speculation["drafted"] > 6


def test_no_draft_of_a_wrong_head_is_accepted(tmp_path: Path) -> None:
    path = make_gguf(write_oracle(tmp_path / "m", swap_halves=True), tmp_path / "model.gguf")
    answer = llama_cpp.run(Request(path, [cycle_row(LENGTH)], generate=12, speculate=2, image=False))
    assert answer.generated == cycle_row(LENGTH + 12)[LENGTH:]
    assert answer.speculation is not None
    assert answer.speculation["accepted"] == 0 < answer.speculation["drafted"]


def test_top_k_are_the_most_likely(tmp_path: Path) -> None:
    path = make_gguf(checkpoint("dense"), tmp_path / "model.gguf")
    asked = rows(1, 1000)
    whole = llama_cpp.run(Request(path, asked, generate=1, image=False)).logprobs[0][1]
    tokens, best = llama_cpp.run(Request(path, asked, generate=1, image=False, top_k=5)).logprobs[0]
    assert tokens is not None and tokens.shape == best.shape == (LENGTH - 1, 5)
    assert np.array_equal(best, -np.sort(-whole, -1)[:, :5])
    assert np.array_equal(np.take_along_axis(whole, tokens, -1), best)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = make_gguf(checkpoint("dense"), tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    answer = llama_cpp.run(Request(path, rows(1, 1000), generate=1, image=False))
    assert answer.refused is not None and not answer.logprobs


def test_two_models_in_a_folder_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    answer = llama_cpp.run(Request(tmp_path, rows(1, 1000)))
    assert answer.refused is not None and "2 GGUF models: a.gguf, b.gguf; name the file" in answer.refused


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    with pytest.raises(EngineError, match=r"no llama.cpp in this environment"):
        llama_cpp.run(Request(Path("x"), [[1, 2]]))
