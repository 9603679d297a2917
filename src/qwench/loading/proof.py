"""The proof for one engine, and the table of engines: replay, agreement, and what an engine is known to compute wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwench.checkpoint.source import StoredSource, TensorEntry
from qwench.errors import EngineError, suggestion
from qwench.loading import sglang, transformers, vllm
from qwench.loading.agreement import Read, disagreements
from qwench.loading.findings import LEVELS, Finding, Proof, findings_of
from qwench.loading.modelopt import effective
from qwench.loading.parts import Load, Model, Rule
from qwench.loading.reading import method_of, reading, taken_for_plain, unread
from qwench.loading.replay import container_for
from qwench.models.claims import summary
from qwench.models.layout import OF_IMAGE_POSITIONS
from qwench.numerics import Scheme

Tensors = Mapping[str, TensorEntry]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """What is known of an engine in one version.

    Attributes:
        engine, version: whose it is.
        rules: what it does, and where that is written.
        models: the networks that it builds from a folder.
        loads: what comes of loading them.
        joins: whether members of joined modules must agree.
    """

    engine: str
    version: str
    rules: tuple[Rule, ...]
    models: Callable[[Config, Tensors], list[Model]]
    loads: Callable[[Sequence[Model], Config, Tensors], list[Load]]
    joins: bool = True


def _sglang(version: str) -> Table:
    return Table(
        "sglang", version, sglang.RULES, lambda config, tensors: sglang.models_of(config, tensors, version), sglang.loads_of
    )


TABLES: dict[str, Table] = {
    "vllm": Table("vllm", vllm.VERSION, vllm.RULES, vllm.models_of, vllm.loads_of),
    "sglang": _sglang(sglang.VERSION),
    "sglang-0.5.21": _sglang("0.5.21"),
    "sglang-0.5.19": _sglang("0.5.19"),
    "transformers": Table(
        "transformers", transformers.VERSION, transformers.RULES, transformers.models_of, transformers.loads_of, joins=False
    ),
}
"""By the name that a person types: an engine in its newest known version, or `engine-version`."""


def prove(source: StoredSource, name: str, values: bool = True) -> Proof:
    """Play through how an engine would load a checkpoint.

    Args:
        name: a key of `TABLES`.
        values: read the few bytes of global scales and orders of columns; False where only headers are at hand.

    Raises:
        EngineError: no such table.
        CheckpointError: the config cannot be read, or its quantization is of a kind that no table knows.
    """
    table, source = table_of(name), effective(source)
    if told := unread(table.engine, source.config):
        return Proof(table.engine, table.version, (), 0, (told,))
    models = table.models(source.config, source.tensors)
    loads = table.loads(models, source.config, source.tensors)
    ignored = reading(table.engine, source.config) == "ignored"
    found = [taken_for_plain(source.config, loads[0])] if ignored else findings_of(loads, table.rules)
    read: Read | None = source.read if values else None
    if table.joins:
        weight_only = any(
            isinstance(s, Scheme) and s.kind == "nvfp4" and s.activations == "none"
            for model in models
            for s in model.schemes.values()
        )
        stops = table.engine == "sglang" and weight_only  # rule nvfp4-one-global
        found += disagreements(models, source.tensors, source.config, container_for(source.config), read, stops)
    found += known_wrong(table, source.config, source.tensors)
    consumed = set().union(*(made.consumed for made in loads))
    notes = () if values else ("headers only: global scales and orders of columns were not compared",)
    ranked = tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))
    return Proof(table.engine, table.version, tuple(made.model for made in loads), len(consumed), ranked, notes)


def table_of(name: str) -> Table:
    """A table by its name. Raises EngineError."""
    if name not in TABLES:
        what = f"there are no rules of {name!r} for an offline proof{suggestion(name, TABLES)}"
        raise EngineError(what, f"use one of {', '.join(TABLES)}")
    return TABLES[name]


def known_wrong(table: Table, config: Config, tensors: Tensors) -> Iterator[Finding]:
    """What an engine loads whole and computes wrongly, told from names and config."""
    cited = {rule.name: f"{rule.says} ({rule.source})" for rule in table.rules}
    if table.engine == "vllm" and not vllm.is_conditional(config) and any(name.startswith("mtp.") for name in tensors):
        yield from _image_positions(config, cited)
    if table.engine == "transformers" and config.get("quantization_config"):
        yield from _nvfp4_experts(tensors, cited)
        yield from _inputs_of_experts(config, tensors, cited)
        if method_of(config) == "awq":
            what = "on a GPU transformers computes AWQ files in float16, whose range Gated DeltaNet leaves (read, not run)"
            yield Finding("note", "transformers", what, "use vLLM or SGLang, in bfloat16", (), cited["awq-float16"])


def _inputs_of_experts(config: Config, tensors: Tensors, cited: Mapping[str, str]) -> Iterator[Finding]:
    """FP8 experts with rounded inputs, which transformers runs as if their inputs were not."""
    container, seen = container_for(config), (n for n in tensors if ".mlp.experts." in n and not n.startswith("mtp."))
    first = next((name for name in seen if name.endswith(".weight_scale")), None)
    if first is None or method_of(config) != "compressed-tensors" or container is None:
        return
    scheme = container.scheme_of(config["quantization_config"], first.removesuffix(".weight_scale"))
    if scheme is not None and scheme.kind == "fp8" and scheme.activations != "none":
        what = f"inputs of experts are not rounded, where the release says {scheme.label}: its answers are those of the weights alone"
        yield Finding("note", "transformers", what, "nothing to do: vLLM and SGLang round them", (), cited["ct-experts-inputs"])


def _image_positions(config: Config, cited: Mapping[str, str]) -> Iterator[Finding]:
    ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := config.get(name), Mapping)]
    if keys := sorted({key for rope in ropes for key in OF_IMAGE_POSITIONS if key in rope}):
        what = f"drafting corrupts memory: config.json of this text-only model has {', '.join(keys)}, which main model and MTP head read differently"
        mend = (
            "take these keys out of config.json (text counts alike without them; `qwench doctor --fix` does), or do not draft"
        )
        yield Finding("wrong", "vLLM", what, mend, (), cited["text-positions"])


def _nvfp4_experts(tensors: Tensors, cited: Mapping[str, str]) -> Iterator[Finding]:
    names = [
        name
        for name in tensors
        if ".mlp.experts." in name and name.endswith(".weight_global_scale") and not name.startswith("mtp.")
    ]
    if names:
        what = f"NVFP4 experts come out too large by their global scale: {summary(names)}"
        mend = "do not run this release in transformers; vLLM reads it rightly"
        yield Finding("wrong", "transformers", what, mend, tuple(names), cited["nvfp4-experts"])
