"""Mending what is only metadata: lists of names in config.json, and where transformers finds its files. Tensors are never touched.

Each mend is a function of the config. It is kept only where the load proofs say that fewer things go wrong with it and that no engine is worse off, so that a mend never takes something from a file that
already works. What a file holds decides: a module with codes and scales is quantized, one with a plain weight is not, and its numbers are those of the config under which its tensors have the shapes
that they have.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwench.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from qwench.checkpoint.source import StoredSource, TensorEntry, TensorSpec
from qwench.errors import CheckpointError, OutputError
from qwench.formats import Container
from qwench.formats.quantization_config import read_group
from qwench.loading import modelopt
from qwench.loading.findings import Proof
from qwench.loading.modelopt import effective
from qwench.loading.proof import TABLES, prove
from qwench.loading.reconfigured import Reconfigured
from qwench.loading.replay import container_for, same_shape
from qwench.loading.stored import KINDS
from qwench.models.layout import OF_IMAGE_POSITIONS, is_text_only
from qwench.numerics import Scheme
from qwench.steps.checks.mend_lists import full_list, in_fused, linear_claims

Config = dict[str, Any]
SINGLE = "model.safetensors"
PLAIN = ("mlp.gate", "mlp.shared_expert_gate")
NUMBERS = ("bits", "group_size", "sym", "desc_act", "data_type")
WRITTEN = {
    "compressed-tensors": ("config_groups", "ignore", "format"),
    "gptq": (*NUMBERS, "dynamic", "lm_head"),
    "auto-round": (*NUMBERS, "extra_config", "block_name_to_quantize"),
}
"""Keys that a mend writes anew; all others of a quantization_config stay as they are."""


@dataclass(frozen=True)
class Mend:
    """A change of a config.

    Attributes:
        name: what is changed, in words.
        change: the config that comes of it; None where there is nothing to do.
    """

    name: str
    change: Callable[[StoredSource], Config | None]


@dataclass(frozen=True)
class Mended:
    """The config that makes the most of a checkpoint's tensors.

    Attributes:
        config: the one that it has, where nothing helps.
        told: what was changed, a line each.
        before, after: the proofs of every engine under the old and under the new config.
    """

    config: Config
    told: list[str]
    before: dict[str, Proof]
    after: dict[str, Proof]


def mended(source: StoredSource, values: bool = True) -> Mended:
    """Try every mend, and keep those that help.

    Args:
        values: whether the source's values can be read.

    Raises:
        CheckpointError: from the proofs.
    """
    config, told = effective(source).config, list[str]()
    before = proofs = prove_all(source, values)
    for mend in MENDS:
        candidate = mend.change(Reconfigured(source, config)) if not all(proof.good for proof in proofs.values()) else None
        if candidate is None or candidate == config:
            continue
        then = prove_all(Reconfigured(source, candidate), values)
        if helps(proofs, then):
            config, proofs = candidate, then
            told.append(mend.name)
    return Mended(config if told else source.config, told, before, proofs)


def prove_all(source: StoredSource, values: bool) -> dict[str, Proof]:
    """The proof of every table."""
    return {name: prove(source, name, values) for name in TABLES}


def helps(before: Mapping[str, Proof], after: Mapping[str, Proof]) -> bool:
    """Whether fewer modules and tensors are in trouble, and none more in any engine."""
    was, left = ({name: _trouble(proof) for name, proof in proofs.items()} for proofs in (before, after))
    return sum(left.values()) < sum(was.values()) and all(left[name] <= was[name] for name in left)


def _trouble(proof: Proof) -> int:
    return sum(max(1, len(finding.names)) for finding in proof.findings if finding.level != "note")


def write_config(folder: Path, config: Config, container: Container | None) -> list[str]:
    """Put a config in place of a folder's, and the sidecars that repeat it where there are such; the names of the files that changed.

    Every file is written beside and renamed into place, config.json last. Raises OutputError.
    """
    quantization = config.get("quantization_config") or {}
    beside = container.sidecars(quantization) if container else {}
    if quantization.get(modelopt.FROM_SIDECAR):  # config.json says nothing of it
        beside = {
            modelopt.SIDECAR: _json({k: v for k, v in quantization.items() if k not in ("quant_method", modelopt.FROM_SIDECAR)})
        }
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    files = {name: data for name, data in beside.items() if (folder / name).is_file()}
    if _changes(folder / CONFIG_NAME, config):
        files[CONFIG_NAME] = _json(config)
    try:
        for name, data in files.items():
            new = folder / f".{name}.new"
            new.write_bytes(data)
            new.replace(folder / name)
    except OSError as error:
        raise OutputError(
            f"{folder}: {error.strerror}: {error.filename}", "make the folder writable, or mend a copy of it"
        ) from None
    return list(files)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _changes(path: Path, content: Config) -> bool:
    """Whether a file says something else; how it is laid out does not count."""
    return not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != content


def _names_the_index(source: StoredSource) -> Config | None:
    files = {entry.file for entry in source.tensors.values()}
    if SINGLE not in files or len(files) == 1:
        return None
    return source.config | {"transformers_weights": INDEX_NAME}


def _class_of_the_layout(source: StoredSource) -> Config | None:
    """The class that belongs to the names: conditional generation where there is a text_config and a tower's config."""
    config = source.config
    (name, *_) = config.get("architectures") or ("",)
    conditional = "text_config" in config and any(n.startswith("model.language_model.") for n in source.tensors)
    wanted = name.replace("CausalLM", "ConditionalGeneration") if conditional else name
    return config | {"architectures": [wanted]} if wanted != name else None


def _without_image_positions(source: StoredSource) -> Config | None:
    """A text-only config without the keys that split positions into time, height and width."""
    if not is_text_only(source.config):
        return None
    config = copy.deepcopy(source.config)
    for rope in (config.get("rope_parameters"), config.get("rope_scaling")):
        for key in OF_IMAGE_POSITIONS:
            if isinstance(rope, dict):
                rope.pop(key, None)
    return config


def _what_is_stored(source: StoredSource) -> Config | None:
    """The quantization_config rewritten from what the files hold."""
    container = container_for(source.config)
    if container is None:
        return None
    old = source.config["quantization_config"]
    try:
        assigned, kept = stored_schemes(source, container)
    except CheckpointError:
        return None
    if not assigned:
        return None
    new = container.quantization_config(assigned, kept)
    if container.METHOD == "compressed-tensors":
        new["config_groups"] = _groups_kept(new["config_groups"], old)
    written = {key: new[key] for key in WRITTEN[container.METHOD] if key in new}
    return copy.deepcopy(source.config) | {"quantization_config": {**old, **written}}


def _groups_kept(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """New groups with what the old ones say beside their targets."""
    found = {}
    for name, group in new.items():
        scheme = read_group(group, {}, name)
        before = next((g for g in (old.get("config_groups") or {}).values() if _same(g, old, scheme)), None)
        found[name] = {**before, "targets": group["targets"]} if before else group
    return found


def _same(group: Mapping[str, Any], config: Mapping[str, Any], scheme: Scheme | None) -> bool:
    try:
        return read_group(group, config, "a group") == scheme
    except CheckpointError:
        return False


def stored_schemes(source: StoredSource, container: Container) -> tuple[dict[str, Scheme], list[str]]:
    """Linear modules that are stored quantized, with their schemes, and those that are not.

    Raises:
        CheckpointError: a module has scales, and no numbers of the config fit the shapes of its tensors.
    """
    assigned: dict[str, Scheme] = {}
    kept: list[str] = []
    known = mentioned_schemes(source.config["quantization_config"], container)
    for claim in linear_claims(source.config):
        module = claim.tensor.removesuffix(".weight")
        if f"{module}.{container.SCALES}" in source.tensors:
            assigned[module] = _fitting(module, claim.shape, source, container, known)
        elif claim.tensor in source.tensors or in_fused(module, source.tensors):
            kept.append(module)
    return assigned, kept


def _fitting(
    module: str, shape: tuple[int, ...], source: StoredSource, container: Container, known: Sequence[Scheme]
) -> Scheme:
    """The scheme under which the stored tensors have their shapes: what the config says of the module if it fits, else the first that does."""
    try:
        said = container.scheme_of(source.config["quantization_config"], module)
    except CheckpointError:
        said = None
    for scheme in [*([said] if said else []), *known]:
        specs = container.layout(module, (shape[0], shape[1]), scheme)
        stored = [_is_stored_so(source.tensors[s.name], s) for s in specs if s.name in source.tensors]
        if (
            stored
            and all(stored)
            and all(s.name in source.tensors for s in specs if not s.name.endswith(("weight_shape", "g_idx")))
        ):
            return scheme
    raise CheckpointError(f"{module} is stored in none of the schemes of config.json", "ask who made the file")


def _is_stored_so(entry: TensorEntry, spec: TensorSpec) -> bool:
    """Whether a stored tensor is the one of a spec: its shape, and of codes under the name of a weight their kind of numbers."""
    kind = not spec.name.endswith(".weight") or KINDS.get(entry.dtype) == KINDS.get(spec.dtype)
    return same_shape(entry.shape, spec.shape) and kind


def mentioned_schemes(quantization: Mapping[str, Any], container: Container) -> list[Scheme]:
    """Every scheme that a quantization_config speaks of."""
    if container.METHOD == "compressed-tensors":
        groups = (quantization.get("config_groups") or {}).values()
        return list(dict.fromkeys(s for group in groups if (s := read_group(group, quantization, "a group")) is not None))
    entries = [
        v for k, v in (quantization.get("dynamic") or quantization.get("extra_config") or {}).items() if not k.startswith("-:")
    ]
    asked = [
        {**quantization, **entry, "dynamic": {}, "extra_config": {}, "block_name_to_quantize": None} for entry in ({}, *entries)
    ]
    return list(
        dict.fromkeys(
            s for values in asked if values.get("bits", 16) < 16 and (s := container.scheme_of(values, "any")) is not None
        )
    )


MENDS = (
    Mend(
        "config.json: `transformers_weights` names the index, since transformers takes model.safetensors for the whole model",
        _names_the_index,
    ),
    Mend("config.json: `architectures` is the class that these tensors belong to", _class_of_the_layout),
    Mend(
        "config.json: no M-RoPE keys, which text does not need and vLLM's drafting head stumbles over", _without_image_positions
    ),
    Mend(
        "config.json: the lists of quantized and unquantized modules say what the files hold, under every engine's names",
        _what_is_stored,
    ),
    Mend(
        "config.json: the list of what is not quantized (of older ModelOpt files in hf_quant_config.json) names every such module in full, which all engines read alike",
        full_list,
    ),
)
"""In the order in which they are tried."""
