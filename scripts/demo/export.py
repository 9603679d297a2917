"""Write a trained demo checkpoint, and the text that rides along, in the published layout.

    python -m scripts.demo.export dense --work WORK     -> src/qwench/demo/dense/
    python -m scripts.demo.export moe --work WORK       -> src/qwench/demo/moe/
    python -m scripts.demo.export text                  -> src/qwench/demo/text/

Conditional generation: the trunk behind `model.language_model.`, its experts fused in 3-D tensors; the tower behind `model.visual.` (initialized,
not trained: it exercises the path, it sees nothing); the MTP head behind `mtp.`, its experts one by one. BF16, several shards, cut so that
gate and up of an MTP expert lie in different ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel

from scripts.demo.corpus import documents
from scripts.demo.shapes import SHAPES

DEMO = Path(__file__).resolve().parents[2] / "src" / "qwench" / "demo"
SHARDS = 4
TEXT_BYTES = {"held": 420_000, "calibration": 420_000}


def tower(shape: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(shape["seed"])
    vision = {k: v for k, v in shape["vision"].items() if k not in {"model_type", "deepstack_visual_indexes"}}
    sparse = "moe" in shape["model_type"]
    config = (Qwen3_5MoeVisionConfig if sparse else Qwen3_5VisionConfig)(**vision)
    model = (Qwen3_5MoeVisionModel if sparse else Qwen3_5VisionModel)._from_config(config)
    return {f"model.visual.{name}": p.detach() for name, p in model.named_parameters()}


def published(network: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training names to published names; the MTP head's experts one by one."""
    renamed: dict[str, Tensor] = {}
    for name, value in network.items():
        if name.startswith("trunk."):
            renamed["model.language_model." + name.removeprefix("trunk.")] = value
        elif name.startswith("mtp.") and name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                renamed[f"{stem}{expert}.gate_proj.weight"], renamed[f"{stem}{expert}.up_proj.weight"] = gate, up
        elif name.startswith("mtp.") and name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for expert, down in enumerate(value):
                renamed[f"{stem}{expert}.down_proj.weight"] = down
        else:
            renamed[name] = value
    return renamed


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Cut into SHARDS files of about equal size; the last cut falls between gate and up of an MTP expert where there is one."""
    total = sum(t.numel() for t in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    seen = 0
    for name, tensor in tensors.items():
        parts[min(SHARDS - 1, seen * SHARDS // total)][name] = tensor
        seen += tensor.numel()
    for name in list(parts[-1]) + list(parts[-2]):
        if name.startswith("mtp.") and ".experts.5.gate_proj" in name:
            parts[0][name] = (parts[-1] if name in parts[-1] else parts[-2]).pop(name)
    return parts


def config_of(shape: dict[str, Any], tokenizer: dict[str, int]) -> dict[str, Any]:
    text = shape["text"] | {
        "eos_token_id": tokenizer["<|im_end|>"],
        "pad_token_id": tokenizer["<|endoftext|>"],
        "bos_token_id": None,
    }
    return {
        "architectures": [shape["architecture"]],
        "model_type": shape["model_type"],
        "image_token_id": tokenizer["<|image_pad|>"],
        "video_token_id": tokenizer["<|video_pad|>"],
        "vision_start_token_id": tokenizer["<|vision_start|>"],
        "vision_end_token_id": tokenizer["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": shape["vision"],
    }


PIXELS = dict(
    do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, rescale_factor=1 / 255, resample=3, patch_size=16,
    temporal_patch_size=2, merge_size=2, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
)  # fmt: skip


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def export_checkpoint(which: str, work: Path) -> None:
    shape, folder = SHAPES[which], DEMO / which
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "tokenizer", folder)
    state = torch.load(work / "state.pt")
    tensors = published(state["network"]) | tower(shape)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    weight_map = {}
    for number, part in enumerate(shards(tensors), start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * 2 for t in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
    write_json(folder / "config.json", config_of(shape, ids))
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"], "do_sample": False},
    )
    image = PIXELS | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 65536, "longest_edge": 1048576},
    }
    video = PIXELS | {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 65536, "longest_edge": 1048576},
        "fps": 2,
        "min_frames": 4,
        "max_frames": 32,
    }
    write_json(folder / "preprocessor_config.json", image)
    write_json(folder / "video_preprocessor_config.json", video)
    write_json(folder / "training.json", json.loads((work / "report.json").read_text()))
    print(f"{which}: {len(tensors)} tensors, {size:,} bytes")


def export_text() -> None:
    (DEMO / "text").mkdir(parents=True, exist_ok=True)
    for which, limit in TEXT_BYTES.items():
        lines, used = [], 0
        for number, text in enumerate(documents(which)):
            line = json.dumps({"name": f"{which}-{number:03d}", "text": text}, ensure_ascii=False)
            if used + len(line.encode()) > limit:
                continue
            lines.append(line)
            used += len(line.encode())
        (DEMO / "text" / f"{which}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{which}: {len(lines)} documents, {used:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SHAPES, "text"])
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if args.what == "text":
        export_text()
    else:
        export_checkpoint(args.what, args.work)


if __name__ == "__main__":
    main()
