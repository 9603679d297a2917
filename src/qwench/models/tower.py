"""Running the vision tower: images as patches -> the embeddings that take the places of image tokens.

The module is that of transformers, built without weights. Its blocks are given theirs one after the other, while they run: in memory are one block, and the
patches of some images.

Letters in names: P patches, F numbers in a patch, D hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

from qwench.checkpoint.source import TensorSource
from qwench.errors import CheckpointError
from qwench.models.grid import Grid, tokens_of
from qwench.models.kernels import quiet
from qwench.models.map import ModelMap
from qwench.models.place import CPU, Place
from qwench.models.vision import PREFIX
from qwench.models.weights import read_slot


class Tower:
    """The tower of a checkpoint; it keeps no weights between two calls.

    Raises:
        CheckpointError: the checkpoint has none, or transformers refuses its config.
    """

    def __init__(self, source: TensorSource, map: ModelMap, place: Place = CPU) -> None:
        vision = source.config.get("vision_config")
        if not map.has_vision or not isinstance(vision, Mapping):
            raise CheckpointError(
                f"{source.folder} has no vision tower to embed images with",
                "leave images out (images: text), or graft the tower",
            )
        self.source, self.map, self.place = source, map, place
        self.module = _module(vision, map.model_type == "qwen3_5_moe", place.device)
        self.merge = int(vision["spatial_merge_size"])

    @torch.no_grad()
    def embed(self, patches_PF: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """The tokens of some images, [tokens, D] each, in main memory.

        Args:
            patches_PF: of all images, one after the other, as an image processor makes them.
            grids: of each.

        Raises:
            CheckpointError: from the source.
        """
        here = patches_PF.to(self.place.device, self.place.dtype)
        with quiet(), self._weights():
            out = self.module(here, grid_thw=torch.tensor(grids, device=self.place.device))
        merged = out.pooler_output if hasattr(out, "pooler_output") else out
        return list(merged.cpu().split([tokens_of(grid, self.merge) for grid in grids]))

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """While it lasts, whatever of the module runs has its weights: blocks only while they run."""
        blocks = [(f"blocks.{number}.", block) for number, block in enumerate(self.module.get_submodule("blocks").children())]
        handles = []
        for stem, block in blocks:
            handles.append(block.register_forward_pre_hook(lambda module, _, stem=stem: self._fill(module, stem)))
            handles.append(block.register_forward_hook(lambda module, *_: _empty(module)))
        self._fill(self.module, "")
        try:
            yield
        finally:
            _empty(self.module)
            for handle in handles:
                handle.remove()

    def _fill(self, module: nn.Module, stem: str) -> None:
        """Give a module its parameters; the whole tower all but its blocks'."""
        for slot in self.map.others:
            name = slot.tensor.removeprefix(PREFIX)
            if not slot.role.startswith("vision.") or not name.startswith(stem) or (not stem and name.startswith("blocks.")):
                continue
            holder, _, parameter = name.removeprefix(stem).rpartition(".")
            value = read_slot(self.source, slot, self.place.dtype, self.place.device)
            _put(module.get_submodule(holder), parameter, value)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _empty(module: nn.Module) -> None:
    """Take a module's parameters back."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            _put(part, name, torch.empty_like(parameter, device="meta"))


def _module(vision: Mapping[str, Any], is_moe: bool, device: torch.device) -> nn.Module:
    """The weightless tower of transformers; what is no parameter (frequencies of positions) is real, and on the device."""
    settings = {key: value for key, value in vision.items() if key != "model_type"}
    try:
        config = (Qwen3_5MoeVisionConfig if is_moe else Qwen3_5VisionConfig)(**settings)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        said = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"transformers refuses vision_config: {said}", "take config.json from the original checkpoint"
        ) from None
    config._attn_implementation = "sdpa"
    with quiet(), init_empty_weights(include_buffers=False):
        made: nn.Module = (moe.Qwen3_5MoeVisionModel if is_moe else dense.Qwen3_5VisionModel)(config)
    for part in made.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, nn.Buffer(buffer.to(device), persistent=False))
    return made.eval()
