"""What vLLM's worker brings along, without vLLM: the ledger of writes, and the decoding of its stand-ins."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from qwench import numerics
from qwench.engines.process import WORKERS
from qwench.formats import compressed_tensors
from qwench.numerics import SCHEMES


def worker_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(WORKERS) / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


ledger = worker_module("vllm_ledger")
stand_ins = worker_module("vllm_stand_ins")


class Joined(nn.Module):
    """Two stored tensors in one parameter, one in another, a scale that has a value from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(5, 24, dtype=torch.bfloat16), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
        self.k_scale = nn.Parameter(torch.ones(1), requires_grad=False)


def load(book: Any, model: Joined, weights: dict[str, torch.Tensor]) -> Any:
    """Load as engines do: from an iterator, with slices; names that it does not know are dropped in silence."""

    def run() -> None:
        places = {
            "q": (model.qk, slice(0, 3)),
            "k": (model.qk, slice(3, 5)),
            "gate": (model.scales, (slice(None), 0)),
            "up": (model.scales, (slice(None), 1)),
        }
        for name, tensor in weights.items():
            book.loads[-1].given.append(name)
            if name in places:
                parameter, place = places[name]
                parameter.data[place].copy_(tensor)

    book.watch(model, run)
    return book.loads[-1]


WEIGHTS = {"q": torch.randn(3, 24), "k": torch.randn(2, 24), "gate": torch.randn(3), "up": torch.randn(3)}


def test_everything_taken() -> None:
    model = Joined()
    record = load(ledger.Ledger(), model, WEIGHTS)
    assert record.consumed == set(WEIGHTS) and record.uninitialized == ["k_scale"]
    assert torch.equal(model.qk[3:].float(), WEIGHTS["k"].bfloat16().float()) and model.k_scale.item() == 1


@pytest.mark.parametrize(("missing", "parameter"), [("q", "qk"), ("k", "qk"), ("gate", "scales"), ("up", "scales")])
def test_a_tensor_under_another_name_is_missed_on_both_sides(missing: str, parameter: str) -> None:
    weights = {(f"other.{name}" if name == missing else name): tensor for name, tensor in WEIGHTS.items()}
    record = load(ledger.Ledger(), Joined(), weights)
    assert f"other.{missing}" in record.given and f"other.{missing}" not in record.consumed
    assert parameter in record.uninitialized


def test_a_load_that_raises_is_still_recorded() -> None:
    book, model = ledger.Ledger(), Joined()

    def run() -> None:
        book.loads[-1].given.append("q")
        model.qk.data[:3].copy_(WEIGHTS["q"])
        raise ValueError("no such parameter")

    with pytest.raises(ValueError, match="no such"):
        book.watch(model, run)
    assert book.consumed == ["q"] and "Joined: scales" in book.uninitialized


@pytest.mark.parametrize("name", ["int4", "int4-asym", "int8", "int8-asym", "nvfp4"])
def test_stand_ins_decode_as_we_do(name: str) -> None:
    """Two readers of one format, written apart: the engine's side knows nothing of ours."""
    weight = torch.randn(48, 384, generator=torch.Generator().manual_seed(5))
    quantized = numerics.encode(weight, SCHEMES[name])
    stored = {key.removeprefix("m."): tensor for key, tensor in compressed_tensors.pack("m", quantized).items()}
    if name == "nvfp4":
        found = stand_ins.nvfp4_values(stored["weight_packed"], stored["weight_scale"], 1 / stored["weight_global_scale"])
    else:
        found = stand_ins.integer_values(
            stored["weight_packed"], stored["weight_scale"], stored.get("weight_zero_point"), SCHEMES[name].bits
        )
    torch.testing.assert_close(found, quantized.dequantize(), rtol=1e-6, atol=0)
