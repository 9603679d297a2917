"""The two layouts of one network: conditional generation, and text-only causal LM.

    conditional generation                           text-only causal LM
    model.language_model.layers.3. ...               model.layers.3. ...
    model.visual. ...                                (stays behind)
    lm_head.weight, mtp. ...                         the same
    Qwen3_5ForConditionalGeneration, qwen3_5         Qwen3_5ForCausalLM, qwen3_5_text
    decoder's numbers under text_config              at the top level

The decoder computes the same in both. The second is what loaders of text models expect, and the only one without a tower that loads: the classes of conditional generation build
a tower whatever the files hold, and fill it with random numbers where they hold none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from qwench.models.geometry import text_config
from qwench.models.tables import CAUSAL, CONDITIONAL, MTP
from qwench.models.vision import PREFIX as VISION

PREFIXES = {"mtp": MTP, "vision": VISION}
"""What the names of a component's tensors begin with, in either layout."""

OF_IMAGES = {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
"""Keys of a config that speak of images."""
OF_IMAGE_POSITIONS = ("mrope_section", "mrope_interleaved")
"""Keys of rotary embeddings that split positions into time, height and width, which are one number in text. vLLM takes them out of a text-only model's config and leaves
them in that of its MTP head: the two then disagree on the shape of positions, and the engine writes past its memory (0.32, seen). Without them both count alike."""
MTP_LAYERS = "mtp_num_hidden_layers"


def is_text_only(config: Mapping[str, Any]) -> bool:
    """Whether a config is of the text-only layout."""
    return "text_config" not in config


def text_only_name(name: str) -> str | None:
    """What a tensor is called in the text-only layout; None where it stays behind."""
    if name.startswith(VISION):
        return None
    return CAUSAL + name.removeprefix(CONDITIONAL) if name.startswith(CONDITIONAL) else name


def text_only_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same decoder as a text-only causal LM; as it is where it is one already.

    What the top level says beside the decoder's numbers stays (tied embeddings, end tokens, versions), and wins over `text_config` where both speak: readers take it first.
    """
    if is_text_only(config):
        return copy.deepcopy(dict(config))
    name = "Qwen3_5Moe" if "moe" in str(config.get("model_type", "")) else "Qwen3_5"
    own = {"text_config", "architectures", "model_type", *OF_IMAGES}
    top = {key: value for key, value in config.items() if key not in own}
    text = {**copy.deepcopy(dict(text_config(config))), **copy.deepcopy(top)}
    text["model_type"] = "qwen3_5_moe_text" if name.endswith("Moe") else "qwen3_5_text"
    for rope in (text.get("rope_parameters"), text.get("rope_scaling")):
        for key in OF_IMAGE_POSITIONS:
            if isinstance(rope, dict):
                rope.pop(key, None)
    return {"architectures": [f"{name}ForCausalLM"], **text}


def config_with_mtp(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config with so many MTP layers announced, everywhere readers look: in `text_config`, and at the top level, which vLLM asks first."""
    changed = copy.deepcopy(dict(config))
    if not is_text_only(config):
        changed["text_config"][MTP_LAYERS] = layers
    changed[MTP_LAYERS] = layers
    return changed
