"""The table of vLLM's rules against vLLM itself: which parameters it builds, which tensors it takes, what it leaves uninitialized, where it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwench.checkpoint.reader import Checkpoint
from qwench.loading import vllm
from qwench.loading.modelopt import effective
from qwench.loading.parts import Load, Model
from qwench.loading.placing import CACHE_SCALE
from qwench.loading.reading import unread
from qwench.steps.checks.mend import mended
from tests.loading import others
from tests.loading.cases import CASES, make, variant
from tests.loading.vllm_asked import vllm_loads

STARTS_WITH_VALUES = ("_scale", "_zero_point", "w13_bias", "w2_bias")
"""Ends of the names of parameters that no checkpoint of ours fills: those of a quantized cache, and biases that GPTQ experts are given."""


@pytest.mark.engine("vllm")
def test_table_and_vllm_agree_on_good_and_on_broken_files(tmp_path: Path) -> None:
    """One process loads all of them: most of the time is the import."""
    agree({name: make(tmp_path, name) for name in CASES}, tmp_path)


@pytest.mark.engine("vllm")
def test_they_agree_in_formats_of_other_writers(tmp_path: Path) -> None:
    agree({name: others.make(tmp_path, name) for name in others.OTHERS}, tmp_path)


def agree(folders: dict[str, Path], tmp_path: Path) -> None:
    """That table and vLLM say the same of every folder, and of every one that can be mended, mended."""
    cured = {
        f"{name}, mended": copy
        for name, folder in folders.items()
        if (copy := mended_copy(folder, tmp_path / "mended" / folder.name))
    }
    assert len(cured) >= 8
    folders = folders | cured
    (tmp_path / "room").mkdir()
    answers = vllm_loads(list(folders.values()), tmp_path / "room")
    differing = {
        name: found for (name, folder), real in zip(folders.items(), answers, strict=True) if (found := compared(folder, real))
    }
    assert not differing
    broken = [
        name for name, real in zip(folders, answers, strict=True) if any(r["refused"] or r.get("uninitialized") for r in real)
    ]
    assert len(broken) > 10  # that there was something to disagree about
    assert not {name for name in broken if "a16" not in name} & set(cured)


def compared(folder: Path, real: list[dict[str, Any]]) -> list[str]:
    """How vLLM's account of a folder differs from the table's."""
    with Checkpoint.open(folder) as opened:
        source = effective(opened)
        if unread("vllm", source.config):
            return [] if real[0]["refused"] else ["vLLM reads it"]
        models = vllm.models_of(source.config, source.tensors)
        loads = vllm.loads_of(models, source.config, source.tensors)
    assert loads
    return [d for model, load, seen in zip(models, loads, real, strict=False) for d in differences(model, load, seen)]


def mended_copy(folder: Path, out: Path) -> Path | None:
    """A copy with the config that `qwench doctor --fix` would write, where it would write one and vLLM would load it."""
    with Checkpoint.open(folder) as source:
        found = mended(source)

    def change(config: dict[str, Any]) -> None:
        config.clear()
        config.update(found.config)

    return variant(folder, out, change) if found.told and found.after["vllm"].good else None


def differences(model: Model, load: Load, seen: dict[str, Any]) -> list[str]:
    """How vLLM's account of a model differs from the table's."""
    stops = bool(load.refusals or load.misfits)
    if bool(seen["refused"]) != stops:
        return [f"{load.model}: vLLM says {seen['refused']!r}, the table {load.refusals[:2]} {list(load.misfits.items())[:2]}"]
    if stops:
        return []
    named = {
        n
        for n in seen["parameters"]
        if not (".attn." in n and n.endswith(STARTS_WITH_VALUES)) and not n.endswith(STARTS_WITH_VALUES[2:])
    }
    unread = {n for n in named if n.endswith("input_global_scale")} - set(model.parameters)
    unread_of_ours = {name for name, parameter in model.parameters.items() if not parameter.needed}
    cache = {name for name in seen["consumed"] if CACHE_SCALE.search(name)}
    sides = {
        "built": (named - unread, set(model.parameters)),
        "consumed": (set(seen["consumed"]) - cache, load.consumed),
        "uninitialized": (set(seen["uninitialized"]) - unread - unread_of_ours, set(load.unfilled)),
    }
    wrong = [
        f"{load.model}: {what}: vLLM alone {sorted(r - t)[:3]}, table alone {sorted(t - r)[:3]}"
        for what, (r, t) in sides.items()
        if r != t
    ]
    return wrong + ([] if load.model == seen["model"] else [f"{load.model} is {seen['model']}"])
