"""What a person sees on the command line who asks for the impossible of a mixture of experts, or has a damaged one: one message, names and numbers in it, no traceback, nothing written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.demo import checkpoint
from tests.support.tiny import write_tiny
from tests.test_cli import call

Told = Callable[..., str]
QUANTIZED = "  - quantize: {rules: [{roles: [ROLES], scheme: {kind: int, bits: 4, group: 32}}]}\n"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """What `qwench run` and `qwench plan` say to a recipe on a model, on one line; both must refuse."""

    def told(model: str, steps: str, words: tuple[str, ...] = ("plan", "run"), calibration: str = "") -> str:
        recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
        recipe.write_text(
            f"name: t\n{calibration}steps:\n{steps}  - export: {{format: compressed-tensors}}\n", encoding="utf-8"
        )
        said = ""
        for word in words:
            where = ["--out", str(out)] if word == "run" else []
            code, _, err = call(monkeypatch, capsys, word, str(recipe), "--model", model, *where)
            assert code != 0 and "Traceback" not in err and "mend" in err, err
            assert not out.exists()
            said = " ".join(err.split())
        return said

    return told


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        ("{ratio: 0}", "0 of the experts would go: a ratio lies above 0 and below 1"),
        ("{ratio: 1}", "1 of the experts would go: a ratio lies above 0 and below 1"),
        ("{ratio: 1.75}", "1.75 of the experts would go"),
        ("{ratio: -0.5}", "-0.5 of the experts would go"),
        ("{ratio: .nan}", "nan of the experts would go"),
        ("{ratio: 0.75}", "prune keeps 3 of 12 experts (ratio: 0.75), and the router sends every token to 4"),
        ("{experts: 3}", "prune keeps 3 of 12 experts (experts: 3), and the router sends every token to 4"),
        ("{experts: 12}", "prune keeps 12 of 12 experts (experts: 12): none would go"),
    ],
)
def test_ratios_and_counts(told: Told, prune: str, says: str) -> None:
    assert says in told("demo:moe", f"  - prune: {prune}\n")


def test_recipes_of_a_mixture_on_a_dense_model_and_the_reverse(told: Told) -> None:
    assert "prune leaves experts out, and this model is dense: it has none" in told("demo:dense", "  - prune: {ratio: 0.5}\n")
    assert "rule 1 (expert.*) names no weight of this qwen3_5 model" in told(
        "demo:dense", QUANTIZED.replace("ROLES", "expert.*")
    )
    assert "rule 1 (mlp.*) names no weight of this qwen3_5_moe model" in told("demo:moe", QUANTIZED.replace("ROLES", "mlp.*"))


def test_bundled_recipes_say_it_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in ("reap50", "reap50-autoround-int4", "reap50-autoround-int4-mtp"):
        code, _, err = call(monkeypatch, capsys, "plan", recipe, "--model", "demo:dense")
        assert code != 0 and "this model is dense" in " ".join(err.split())


def damaged(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> str:
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(tensors, config.get("text_config", config))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


ROUTER = "model.layers.2.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, c: c.update(num_experts=8), "the numbers of experts disagree: config.json 8, mlp.gate.weight 6, experts stored one by one 6"),
        (lambda t, c: t.update({ROUTER: t[ROUTER][:4].clone()}), "layers.2: the numbers of experts disagree: config.json 6, mlp.gate.weight 4"),
        (lambda t, c: [t.pop(n) for n in list(t) if "layers.1.mlp.experts.3." in n], "layers.1: the numbers of experts disagree: config.json 6, mlp.gate.weight 6, experts stored one by one 5"),
        (lambda t, c: t.pop("model.layers.3.mlp.experts.0.down_proj.weight"), "missing: model.layers.3.mlp.experts.0.down_proj.weight"),
        (lambda t, c: t.pop("mtp.layers.0.mlp.experts.5.gate_proj.weight"), "missing: mtp.layers.0.mlp.experts.5.gate_proj.weight"),
    ],
    ids=["config", "router", "a layer without an expert", "an expert without a matrix", "the head's"],
)  # fmt: skip
def test_experts_that_do_not_add_up(told: Told, tmp_path: Path, change: Any, says: str) -> None:
    folder = write_tiny(tmp_path / "m", moe=True, layout="causal", trunk_experts="single", mtp="single", vision=False)
    assert says in told(damaged(folder, change), "  - prune: {ratio: 0.5}\n")


def test_a_saliency_that_is_not_a_number(told: Told, tmp_path: Path) -> None:
    """Found out by the walk: the run stops there, says whose it is, and finishes nothing."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint("moe"), folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("layers.1.mlp.experts.down_proj"):
                tensor[7] = torch.full_like(tensor[7], math.nan)
        save_file(tensors, path, metadata={"format": "pt"})
    said = told(str(folder), "  - prune: {ratio: 0.5}\n", ("run",), "acceptance: off\ncalibration: {samples: 4, length: 64}\n")
    assert (
        "layer 1: expert 7 puts out NaN or infinity for each of the" in said
        and "that are sent to it, so that it has no saliency" in said
    )
