"""Our side of each pair: the same roles and bits as a recipe, methods with the settings that our bundled recipes give them."""

from __future__ import annotations

from typing import Any, Literal

Model = Literal["dense", "moe"]
Weights = Literal["A", "B", "C", "-"]

MLP = {"dense": ["mlp.*"], "moe": ["expert.*", "shared.gate", "shared.up", "shared.down"]}
MIXERS = ["delta.qkv", "delta.z", "delta.out"]
SETS = {
    "A": "MLPs of layers 1 and up, 4 bits",
    "B": "all linear layers of the text, full attention in INT8, the rest in INT4",
    "C": "all linear layers of the text, INT4",
    "-": "nothing quantized",
}
"""Which weights; groups of 128. Routers, decay gates, embedding, head, MTP and vision are no part of any set."""
FOLDS = {"dense": ["norm.post", "mlp.up"], "moe": ["norm.post", "expert.up", "shared.up"]}


def rules(weights: Weights, model: Model, scheme: str, search: str) -> list[dict[str, Any]]:
    """The rules of a set."""
    chosen = {"scheme": scheme, "search": search}
    if weights == "A":
        return [{"roles": MLP[model], "layers": "1..", **chosen}]
    attention = {"roles": ["attention.*"], "scheme": "int8" if weights == "B" else scheme, "search": search}
    return [attention, {"roles": [*MIXERS, *MLP[model]], **chosen}]


def recipe(
    name: str, weights: Weights, model: Model, method: str, settings: dict[str, Any], rows: int, length: int
) -> dict[str, Any]:
    """A recipe as data.

    Args:
        method: `rtn`, `awq`, `gptq`, `autoround`, or `prune`, which quantizes nothing.
        settings: `scheme`, `search`, `rank` of a correction, `format`; `gptq` or `autoround`: the method's own; `prune`: that step's; `gate`: measure the MTP head
            before the release may be finished, which is what our recipes do unless told not to, and no peer does.
        rows, length: what it is calibrated on.
    """
    steps: list[dict[str, Any]] = []
    if "prune" in settings:
        steps.append({"prune": settings["prune"]})
    if method == "awq":
        steps.append({"smooth": {"folds": FOLDS[model], "layers": "1.." if weights == "A" else "all", "clip": True}})
    if method != "prune":
        own = {key: settings[key] for key in ("gptq", "autoround") if key in settings}
        said = "rtn" if method == "awq" else method
        found = rules(weights, model, settings.get("scheme", "int4"), settings.get("search", "none"))
        steps.append({"quantize": {"method": said, **own, "rules": found}})
    if "rank" in settings:
        steps.append({"correct": {"rank": settings["rank"]}})
    steps.append({"export": {"format": settings.get("format", "compressed-tensors")}})
    calibration = (
        {"calibration": {"samples": rows, "length": length}} if method != "rtn" or settings.keys() & {"rank", "prune"} else {}
    )
    gate = {} if settings.get("gate") else {"acceptance": "off"}
    return {"name": name, **calibration, **gate, "steps": steps}
