"""What a checkpoint is, in numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwench.checkpoint.reader import Checkpoint
from qwench.models import sketch
from qwench.models.facts import RESERVE, Facts, facts, pattern_words
from tests.support.memory import tiny_source
from tests.support.tiny import write_tiny

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def published(name: str) -> Facts:
    return facts(sketch(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))))


def parameters(found: Facts) -> dict[str, int]:
    return {c.component: c.parameters for c in found.components}


def test_the_published_9b() -> None:
    found = published("qwen3.5-9b")
    assert found.pattern == "8 x (3 linear_attention, 1 full_attention)"
    assert (found.layout, found.experts, found.mtp, found.vision) == ("conditional generation", {}, "present", "present")
    assert found.tensors == 775 and found.bytes == 2 * found.parameters
    counts = parameters(found)
    assert counts["embed"] == counts["head"] == 248_320 * 4096
    assert counts["mlp"] == 32 * 3 * 4096 * 12288
    assert round(counts["mtp"] / 1e6) == 243
    assert {c.component: c.tensors for c in found.components}["mtp"] == 15


def test_the_published_35b_a3b() -> None:
    found = published("qwen3.5-35b-a3b")
    assert found.experts == {"trunk": "fused", "mtp": "one by one"}
    counts = parameters(found)
    assert counts["experts"] == 40 * 256 * 3 * 512 * 2048
    assert counts["shared"] == 40 * 3 * 512 * 2048
    assert counts["router"] == 40 * 257 * 2048
    assert {c.component: c.tensors for c in found.components}["mtp"] == 785


def test_memory_beside_the_weights() -> None:
    """9B: 8 layers x 2 x 4 heads x 256 channels a token; 24 layers x (32 heads x 128 x 128 floats + 8192 channels x 3 taps in BF16)."""
    found = published("qwen3.5-9b")
    assert found.kv_bytes(1000) == 8 * 2 * 4 * 256 * 2 * 1000
    assert found.kv_bytes(131_072, dtype="fp8_e4m3") == 2 * 2**30
    assert found.kv_bytes(10, batch=3, mtp=True) == 9 * 2 * 4 * 256 * 2 * 30
    assert found.state_bytes(5) == 5 * 24 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)


def test_what_fits_a_given_memory() -> None:
    found = published("qwen3.5-9b")
    needed = found.bytes + found.state_bytes(2) + RESERVE + found.kv_bytes(4096, 2)
    assert found.max_context(needed, 2) == 4096
    assert found.max_context(needed - 1, 2) == 4095
    assert found.max_context(needed, 2, "fp8_e4m3") == 8192
    assert (found.max_context(needed, 2, reserve=RESERVE // 2) or 0) > 4096
    assert found.max_context(found.bytes) is None
    assert found.max_context(10**12) == 262_144


def test_stored_bytes_are_counted_as_stored(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", shards=3, float32=("visual.", "A_log"))
    with Checkpoint.open(folder) as source:
        found = facts(source)
        total = sum(e.nbytes for e in source.tensors.values())
        vision = sum(e.nbytes for n, e in source.tensors.items() if "visual" in n)
    assert found.files == 3 and found.bytes == total == sum(found.dtypes.values())
    assert {c.component: c.bytes for c in found.components}["vision"] == vision == 4 * parameters(found)["vision"]
    assert list(found.dtypes) == ["BF16", "F32"]


@pytest.mark.parametrize(
    ("options", "mtp", "vision", "experts"),
    [
        (
            dict(moe=True, layout="causal", trunk_experts="single", mtp="fused"),
            "present",
            "none",
            {"trunk": "one by one", "mtp": "fused"},
        ),
        (dict(moe=True, mtp=None), "none", "present", {"trunk": "fused"}),
        (dict(vision=False), "present", "none", {}),
    ],
)
def test_what_is_there(options: dict[str, Any], mtp: str, vision: str, experts: dict[str, str]) -> None:
    found = facts(tiny_source(**options))
    assert (found.mtp, found.vision, found.experts) == (mtp, vision, experts)
    assert not found.complaints


def test_a_damaged_checkpoint_is_described_too() -> None:
    source = tiny_source(moe=True)
    del source.values["mtp.fc.weight"]
    source.values["stray"] = torch.zeros(7)
    source.values = {n: t for n, t in source.values.items() if not n.startswith("model.visual.")}
    found = facts(source)
    assert (found.mtp, found.vision) == ("incomplete", "missing")
    assert parameters(found)["other"] == 7
    assert len(found.complaints) == 2
    assert found.tensors == len(source.values)


def test_patterns_in_words() -> None:
    assert pattern_words(["a", "a", "b", "a", "a", "b"]) == "2 x (2 a, 1 b)"
    assert pattern_words(["a", "b", "b"]) == "1 x (1 a, 2 b)"
    assert pattern_words(["a"] * 5) == "5 x (1 a)"
