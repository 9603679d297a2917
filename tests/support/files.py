"""Small checkpoint folders, sound ones written with the safetensors library and broken ones written byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwench.checkpoint.header import FileLayout
from qwench.checkpoint.source import DTYPE_CODE, TensorSpec

INDEX = "model.safetensors.index.json"


def sample_tensors(seed: int = 0) -> dict[str, Tensor]:
    """One tensor of every dtype that can be stored, besides a scalar, an empty one and a 3-D one; no two of one shape."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def whole(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, 100, shape, generator=generator).to(dtype)

    tensors = {
        "f64": noise(3, 5).double(),
        "f32": noise(7, 2),
        "bf16": noise(4, 6, 10).bfloat16(),
        "f16": noise(9).half(),
        "e4m3": noise(5, 3).to(torch.float8_e4m3fn),
        "e5m2": noise(11, 1).to(torch.float8_e5m2),
        "e8m0": whole(13, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "bool": whole(3, 3, dtype=torch.uint8) > 50,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 8),
    }
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        tensors[str(dtype).removeprefix("torch.")] = whole(2 + dtype.itemsize, 3, dtype=dtype)
    return tensors


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bytes (NaNs and signed zeros included)."""
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(tensor: Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def write_folder(folder: Path, files: Mapping[str, Mapping[str, Tensor]], *, index: bool | None = None) -> Path:
    """A sound folder; an index by default where there are several files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    if index or (index is None and len(files) > 1):
        write_index(folder, {name: file for file, tensors in files.items() for name in tensors})
    write_json(folder / "config.json", {"model_type": "qwen3_5"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file whose header (a table, or raw bytes) and length field may be any nonsense."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def item(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One line of a header's table."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def layouts(files: Mapping[str, Mapping[str, Tensor]]) -> tuple[FileLayout, ...]:
    """The plan that writes these tensors."""
    return tuple(
        FileLayout(file, tuple(TensorSpec(name, DTYPE_CODE[t.dtype], tuple(t.shape)) for name, t in tensors.items()))
        for file, tensors in files.items()
    )
