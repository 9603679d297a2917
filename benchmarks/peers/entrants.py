"""Who takes part: a tool, a method, a set of weights, and whom of ours it is held against.

Settings are what each tool recommends or defaults to, at the same bits and group size. Where a tool has two ways that its users take, both are here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.recipes import Model, Weights

OURS = "qwench"
BOTH: tuple[Model, ...] = ("dense", "moe")


@dataclass(frozen=True)
class Entrant:
    """One line of the table.

    Attributes:
        name: its own.
        who: the tool: `qwench`, or the name of its environment and worker.
        weights: the set, see `recipes.SETS`.
        method: what its worker calls it.
        settings: of the method, see the worker.
        rival: the entrant of ours that does the same.
        models: the checkpoints that it makes sense for.
        tuned: takes the iterations, the batch and the fewer rows of a tuned method.
        after: the entrant whose release it begins with; None: the checkpoint.
    """

    name: str
    who: str
    weights: Weights
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    rival: str | None = None
    models: tuple[Model, ...] = BOTH
    tuned: bool = False
    after: str | None = None


IGNORED = [
    "re:.*lm_head", "re:.*visual.*", "re:.*mtp.*", r"re:.*linear_attn.*", r"re:.*self_attn.*", r"re:.*layers\.0\..*",
    r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$",
]  # fmt: skip
"""llm-compressor's way to say set A."""
ATTENTION_INT8 = {r"+:.*self_attn\..*": {"bits": 8}}
"""GPTQModel's way to say set B."""
ROUTERS_KEPT = {r"mlp\.gate$": {"bits": 16}, r"shared_expert_gate$": {"bits": 16}}


FLOAT32 = {"compute": "float32"}
"""Ours in the numbers of processors that do not multiply bfloat16; without it, in those that suit the processor, as all others do."""
GROUPED = {"gptq": {"order": "grouped"}, "search": "mse", "format": "gptq"}
FROM_ROUNDING, FROM_GPTQ = ({"format": "auto-round", "autoround": {"start": start}} for start in ("rounding", "gptq"))


def _llm_compressor(method: str, rival: str, scheme: str = "W4A16", **other: Any) -> Entrant:
    return Entrant(
        f"llm-compressor-{method}", "llm-compressor", "A", method, {"scheme": scheme, "ignore": IGNORED}, rival, **other
    )


def _gptqmodel(name: str, method: str, rival: str, desc_act: bool, **settings: Any) -> Entrant:
    told = {"desc_act": desc_act, "dynamic": ATTENTION_INT8, **settings}
    return Entrant(f"gptqmodel-{name}", "gptqmodel", "B", method, told, rival)


def _pruned(percent: int) -> tuple[Entrant, Entrant]:
    ours = Entrant(f"reap-{percent}", OURS, "-", "prune", {"prune": {"ratio": percent / 100}}, models=("moe",))
    theirs = Entrant(
        f"llm-compressor-reap-{percent}", "llm-compressor", "-", "reap", {"ratio": percent / 100}, ours.name, ("moe",)
    )
    return ours, theirs


ENTRANTS = (
    Entrant("a-rtn", OURS, "A", "rtn"),
    Entrant("a-rtn-gated", OURS, "A", "rtn", {"gate": True}),
    _llm_compressor("rtn", "a-rtn"),
    Entrant("a-awq", OURS, "A", "awq"),
    Entrant("a-awq-float32", OURS, "A", "awq", FLOAT32),
    _llm_compressor("awq", "a-awq"),
    Entrant("a-gptq", OURS, "A", "gptq"),
    Entrant("a-gptq-searched", OURS, "A", "gptq", {"search": "mse"}),
    Entrant("a-gptq-searched-float32", OURS, "A", "gptq", {"search": "mse", **FLOAT32}),
    _llm_compressor("gptq", "a-gptq-searched"),
    Entrant("a-nvfp4", OURS, "A", "rtn", {"scheme": "nvfp4"}),
    Entrant("a-nvfp4-searched", OURS, "A", "rtn", {"scheme": "nvfp4", "search": "mse"}),
    _llm_compressor("nvfp4a16", "a-nvfp4", "NVFP4A16"),
    Entrant("b-rtn", OURS, "B", "rtn", {"format": "gptq"}),
    Entrant("b-gptq", OURS, "B", "gptq", GROUPED),
    Entrant("b-gptq-float32", OURS, "B", "gptq", {**GROUPED, **FLOAT32}),
    _gptqmodel("gptq", "gptq", "b-gptq", desc_act=False),
    _gptqmodel("gptq-desc-act", "gptq", "b-gptq", desc_act=True),
    Entrant("b-gptq-eora", OURS, "B", "gptq", {**GROUPED, "rank": 64}),
    _gptqmodel("gptq-eora", "eora", "b-gptq-eora", desc_act=False, rank=64),
    Entrant("c-rtn", OURS, "C", "rtn", {"format": "auto-round"}),
    Entrant("c-autoround", OURS, "C", "autoround", FROM_ROUNDING, tuned=True),
    Entrant("c-autoround-from-gptq", OURS, "C", "autoround", FROM_GPTQ, tuned=True),
    Entrant("c-autoround-float32", OURS, "C", "autoround", {**FROM_ROUNDING, **FLOAT32}, tuned=True),
    Entrant("auto-round", "auto-round", "C", "w4a16", {"kept": {}}, "c-autoround", ("dense",), tuned=True),
    Entrant("auto-round-moe", "auto-round", "C", "w4a16", {"kept": ROUTERS_KEPT}, "c-autoround", ("moe",), tuned=True),
    *_pruned(25),
    *_pruned(50),
)  # fmt: skip


def chosen(model: Model, sets: list[str], only: list[str]) -> list[Entrant]:
    """The entrants of a run; `only`: names, or none for all."""
    return [e for e in ENTRANTS if model in e.models and e.weights in sets and (not only or e.name in only)]
