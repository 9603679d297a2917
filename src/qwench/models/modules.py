"""The transformers classes that a network is run with, built without weights.

Modules are made on the meta device, once for each kind, and lent their weights for one call (`torch.func.functional_call`): the model is never built as a
whole. The classes themselves are used as they are, so what we run is what transformers runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from qwench.errors import CheckpointError
from qwench.models.geometry import LayerKind, text_config
from qwench.models.kernels import kernels_for, quiet
from qwench.models.map import ModelMap

DROPPED = {"quantization_config", "architectures", "model_type", "dtype", "torch_dtype", "layer_types"}
"""Keys of a text config that say how a file is stored, or that we set ourselves."""


class Modules:
    """Weightless modules of one network, by kind.

    Args:
        config: the checkpoint's `config.json`.
        map: its map.

    Raises:
        CheckpointError: transformers refuses the config.
    """

    def __init__(self, config: Mapping[str, Any], map: ModelMap) -> None:
        self._moe = map.model_type == "qwen3_5_moe"
        self._kinds = [block.kind for block in map.blocks]
        self._config = config
        settings = self._settings(self._kinds)
        with quiet():
            self.rotary: nn.Module = (moe.Qwen3_5MoeTextRotaryEmbedding if self._moe else dense.Qwen3_5TextRotaryEmbedding)(
                settings
            )
            with torch.device("meta"):
                norm = moe.Qwen3_5MoeRMSNorm if self._moe else dense.Qwen3_5RMSNorm
                self.norm: nn.Module = norm(settings.hidden_size, eps=settings.rms_norm_eps)
        self._layers: dict[LayerKind, nn.Module] = {}

    def layer(self, kind: LayerKind) -> nn.Module:
        """The decoder layer with this mixer, on the meta device; the same one for every call."""
        if kind not in self._layers:
            self._layers[kind] = self.new_layer(kind)
        return self._layers[kind]

    def new_layer(self, kind: LayerKind) -> nn.Module:
        """A decoder layer of its own, on the meta device."""
        with torch.device("meta"):
            made: nn.Module = (moe.Qwen3_5MoeDecoderLayer if self._moe else dense.Qwen3_5DecoderLayer)(
                self._settings([kind]), 0
            )
        return made.eval()

    def rope(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, length, rotary] of positions [3, rows, length] (time, height, width), in the dtype and on the device of `like`."""
        cosine, sine = self.rotary(like, positions.to(like.device))
        return cosine, sine

    def _settings(self, kinds: list[LayerKind]) -> Any:
        text = {k: v for k, v in text_config(self._config).items() if k not in DROPPED}
        text |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
        try:
            settings = (Qwen3_5MoeTextConfig if self._moe else Qwen3_5TextConfig)(**text)
        except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
            said = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"transformers refuses config.json: {said}", "take config.json from the original checkpoint"
            ) from None
        settings._attn_implementation, settings._experts_implementation = "sdpa", "eager"
        return settings


def lend(module: nn.Module, weights: Mapping[str, Tensor], *inputs: Tensor, **named: Any) -> Tensor:
    """Call a weightless module with these weights; it keeps none of them."""
    with kernels_for(inputs[0]):
        result: Tensor = functional_call(module, dict(weights), inputs, named, strict=True)
    return result


def text_positions(length: int) -> Tensor:
    """Positions of text, where time, height and width are the same number: int64 [3, 1, length]."""
    return torch.arange(length).expand(3, 1, length)
