"""The type of every tensor in every mix against what llama.cpp's quantizer chose for four networks (data/gguf_types.json, made once with `llama_model_quantize`)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from qwench.formats.gguf import plan_gguf
from qwench.formats.gguf_types import FILE_TYPES, UNQUANTIZED, fitting, more_bits, tensor_bytes
from qwench.models import map_of, sketch
from tests.support.tiny import tiny_config

CHOSEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "gguf_types.json").read_text(encoding="utf-8")
)
NETWORKS: dict[str, dict[str, Any]] = {
    "deepgqa4": dict(moe=False, layers=32, heads=8, keys=2, hidden=256, wide=512),
    "odd": dict(moe=False, layers=16, heads=5, keys=1, hidden=128, wide=320),
    "moe8": dict(moe=True, layers=8, heads=6, keys=2, hidden=256, experts=8),
    "deepmoe": dict(moe=True, layers=24, heads=6, keys=2, hidden=256, experts=12),
}


def config(moe: bool, layers: int, heads: int, keys: int, hidden: int, wide: int = 0, experts: int = 0) -> dict[str, Any]:
    whole = tiny_config(moe=moe, vision=False)
    text = whole["text_config"]
    text |= dict(
        num_hidden_layers=layers, layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (layers // 4), hidden_size=hidden,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=32, vocab_size=1504,
    )  # fmt: skip
    text |= (
        dict(num_experts=experts, moe_intermediate_size=256, shared_expert_intermediate_size=256)
        if moe
        else dict(intermediate_size=wide)
    )
    return whole


def exceptions(name: str, file_type: str, importance: bool) -> dict[str, dict[str, str]]:
    """Tensors that have neither the mix's default nor F32: type -> name within the block -> blocks."""
    source = sketch(config(**NETWORKS[name]))
    plan = plan_gguf(source, map_of(source), file_type=file_type, importance=importance)
    found: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for planned in plan.tensors:
        if planned.type not in (FILE_TYPES[file_type][1], "F32"):
            place = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)\.weight", planned.tensor.name)
            assert place is not None
            found[planned.type][place[2]] += [int(place[1])] if place[1] else []
    return {kind: {stem: span(blocks) for stem, blocks in stems.items()} for kind, stems in found.items()}


def span(numbers: list[int]) -> str:
    """`0-3,6`"""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_mix_is_llama_cpps(name: str) -> None:
    assert len(CHOSEN[name]) == 2 * (len(FILE_TYPES) - len(UNQUANTIZED))
    for variant, chosen in CHOSEN[name].items():
        file_type, _, importance = variant.partition("+")
        expected = CHOSEN[name][file_type] if chosen == "same" else chosen
        assert exceptions(name, file_type, bool(importance)) == expected, variant


def test_layers_with_more_bits() -> None:
    assert [i for i in range(33) if more_bits(i, 33)] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31, 32]


def test_fallbacks() -> None:
    assert [fitting(k, 320) for k in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "IQ4_XS")] == ["Q8_0", "Q5_1", "Q5_0", "Q4_0", "IQ4_NL"]
    assert [fitting(k, 336) for k in ("Q6_K", "Q8_0", "IQ4_NL", "BF16")] == ["F16", "F16", "F16", "BF16"]
    assert fitting("Q4_K", 512) == "Q4_K"


def test_bytes() -> None:
    assert tensor_bytes("Q4_K", (3, 5, 512)) == 15 * 2 * 144
    assert tensor_bytes("Q8_0", (7, 96)) == 7 * 3 * 34
    assert tensor_bytes("F32", (11,)) == 44
