"""GPTQModel: GPTQ, and EoRA on top of it."""

from __future__ import annotations

import gc
import os
from typing import Any

import measured

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own count on two cores is one, fewer than its loader asks for

import torch
import transformers.models.qwen3_5.modeling_qwen3_5
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe  # noqa: F401
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from transformers import AutoProcessor, AutoTokenizer


def quantize(job: measured.Job, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    config = QuantizeConfig(
        bits=4, group_size=128, sym=True, desc_act=settings["desc_act"], dynamic=settings["dynamic"], device="cpu",
        offload_to_disk=False,
    )  # fmt: skip
    model = GPTQModel.load(str(job.model), config)
    model.quantize(rows, batch_size=1)
    model.save(str(job.out))


def correct(job: measured.Job, rows: list[dict[str, Any]], rank: int) -> None:
    """The adapter goes where our reader looks for one: below the release."""
    gc.collect()
    GPTQModel.adapter.generate(
        adapter=Lora(path=str(job.out / "eora"), rank=rank), model_id_or_path=str(job.model), quantized_model_id_or_path=str(job.out),
        calibration_dataset=rows, calibration_dataset_concat_size=0, batch_size=1,
    )  # fmt: skip


def main() -> None:
    start = measured.begin()
    job = measured.job()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    AutoProcessor.from_pretrained = classmethod(lambda cls, *_, **__: measured.TextProcessor(tokenizer))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.rows]
    quantize(job, rows, job.settings)
    if job.method == "eora":
        correct(job, rows, job.settings["rank"])
    measured.finish(start, ("gptqmodel", "torch", "transformers"))


if __name__ == "__main__":
    main()
    measured.leave()
