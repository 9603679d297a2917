"""The tokenizer of a checkpoint as GGUF metadata: llama.cpp has byte-level BPE of its own, and wants tokens, their types, the merges and the special ids.

The split before BPE is compiled into llama.cpp and chosen by name: `qwen35` stands for the pattern of Qwen3.5's tokenizer.json, marks included. A tokenizer.json with
another pattern would be read with the wrong splits without a word, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from qwench.errors import CheckpointError
from qwench.formats.gguf_fields import Field

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The pattern that llama.cpp's pre-tokenizer `qwen35` follows."""

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask"}
"""Special tokens as configs call them and as GGUF does (its spelling)."""
WHOLE = "fetch the checkpoint's tokenizer files again"


def tokenizer_fields(folder: Path, config: Mapping[str, Any], vocabulary: int) -> list[Field]:
    """The `tokenizer.*` metadata.

    Args:
        folder: holds tokenizer.json, and where they exist tokenizer_config.json and the chat template.
        config: the checkpoint's `config.json`.
        vocabulary: rows of the embedding; ids without a token become unused ones.

    Raises:
        CheckpointError: a file is missing or damaged, or llama.cpp has no such tokenizer.
    """
    data = _json(folder / "tokenizer.json")
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    model = data.get("model") or {}
    if model.get("type") != "BPE" or SPLIT not in json.dumps(data.get("pre_tokenizer"), ensure_ascii=False).replace(
        "\\\\", "\\"
    ):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} is not the byte-level BPE of Qwen3.5, which llama.cpp knows as 'qwen35'",
            "use the tokenizer that the checkpoint was published with",
        )
    tokens, kinds = _tokens(model["vocab"], data.get("added_tokens") or [], vocabulary, folder)
    merges = [
        m if isinstance(m, str) else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in m) for m in model["merges"]
    ]
    return [
        Field("tokenizer.ggml.model", "string", "gpt2"),
        Field("tokenizer.ggml.pre", "string", "qwen35"),
        Field("tokenizer.ggml.tokens", "strings", tokens),
        Field("tokenizer.ggml.token_type", "int32s", kinds),
        Field("tokenizer.ggml.merges", "strings", merges),
        *_special(tokens, settings, config),
        *_template(folder, settings),
    ]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, and a GGUF file carries its tokenizer", WHOLE) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", WHOLE) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no mapping", WHOLE)
    return data


def _tokens(base: Mapping[str, int], added: list[dict[str, Any]], vocabulary: int, folder: Path) -> tuple[list[str], list[int]]:
    """Every token by id, and what kind it is."""
    highest = max([*base.values(), *(int(a["id"]) for a in added)], default=-1)
    if highest >= vocabulary:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has tokens up to id {highest}, the embedding has {vocabulary} rows",
            "use the tokenizer that belongs to this checkpoint",
        )
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocabulary
    for token, number in base.items():
        tokens[number], kinds[number] = token, int(gguf.TokenType.NORMAL)
    for entry in added:
        text, number = str(entry["content"]), int(entry["id"])
        control = bool(entry.get("special")) or (text.startswith("<|") and text.endswith("|>"))
        tokens[number] = text
        kinds[number] = int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    return tokens, kinds


def _special(tokens: list[str], settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[Field]:
    """Ids of special tokens, by their text in tokenizer_config.json or else by the config's ids, and whether texts begin or end with one."""
    fields = []
    for name, called in SPECIAL.items():
        number = _id_by_text(tokens, settings.get(f"{name}_token"))
        if number is None:
            number = _id_by_config(config, name, len(tokens))
        if number is not None:
            fields.append(Field(f"tokenizer.ggml.{called}_token_id", "uint32", number))
    for name in ("bos", "eos"):
        if isinstance(settings.get(f"add_{name}_token"), bool):
            fields.append(Field(f"tokenizer.ggml.add_{name}_token", "bool", settings[f"add_{name}_token"]))
    return fields


def _id_by_text(tokens: list[str], stated: Any) -> int | None:
    text = stated.get("content") if isinstance(stated, dict) else stated
    return tokens.index(text) if isinstance(text, str) and text in tokens else None


def _id_by_config(config: Mapping[str, Any], name: str, vocabulary: int) -> int | None:
    for part in (config, config.get("text_config") or {}):
        number = part.get(f"{name}_token_id")
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < vocabulary:
            return number
    return None


def _template(folder: Path, settings: Mapping[str, Any]) -> list[Field]:
    """The chat template, wherever it is kept; several of them have names, and `default` is the one that counts."""
    stated: Any = settings.get("chat_template")
    if stated is None and (folder / "chat_template.jinja").is_file():
        stated = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if stated is None and (folder / "chat_template.json").is_file():
        stated = _json(folder / "chat_template.json").get("chat_template")
    if isinstance(stated, list):
        named = {t["name"]: t["template"] for t in stated}
        stated = named.get("default", next(iter(named.values()), None))
    return [Field("tokenizer.chat_template", "string", stated)] if isinstance(stated, str) else []
