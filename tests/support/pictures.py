"""Records with images, beside images of noise in several shapes."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((192, 320), (288, 256), (256, 256), (320, 192))
"""Heights and widths: 60 to 72 tokens of the demo checkpoints' tower."""


def picture(seed: int, shape: tuple[int, int] | None = None) -> Image.Image:
    """Noise, in blocks of 8 pixels, so that resizing leaves something of it."""
    height, width = shape or SHAPES[seed % len(SHAPES)]
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def png(seed: int, shape: tuple[int, int] | None = None) -> bytes:
    held = BytesIO()
    picture(seed, shape).save(held, "PNG")
    return held.getvalue()


def words(seed: int, count: int) -> str:
    return " ".join(f"name_{(seed * 37 + i * 11) % 101} = self.value({i})" for i in range(count))


def write_records(folder: Path, images: int = 4, texts: int = 2) -> Path:
    """`chats.jsonl`: conversations about images in files beside it, and some without; paths are relative."""
    (folder / "pictures").mkdir(parents=True)
    records: list[dict[str, object]] = []
    for n in range(images):
        (folder / "pictures" / f"{n}.png").write_bytes(png(n))
        ask = [{"type": "image", "image": f"pictures/{n}.png"}, {"type": "text", "text": f"What is {words(n, 3)}?"}]
        records.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": words(n + 50, 40)}]})
    for n in range(texts):
        ask = words(n + 80, 20)
        records.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": words(n + 90, 40)}]})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
