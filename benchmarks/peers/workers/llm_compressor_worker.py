"""llm-compressor: rounding, AWQ, GPTQ, NVFP4 weights, REAP."""

from __future__ import annotations

from typing import Any

import measured
import torch
import transformers.models.qwen3_5.modeling_qwen3_5
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe  # noqa: F401
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils import load_context
from transformers import AutoModelForImageTextToText, AutoTokenizer


def steps(method: str, settings: dict[str, Any]) -> list[Any]:
    """The modifiers of a method."""
    if method == "reap":
        return [REAPPruningModifier(sparsity=settings["ratio"])]
    target = {"targets": "Linear", "scheme": settings["scheme"], "ignore": settings["ignore"]}
    if method == "gptq":
        return [GPTQModifier(**target)]
    return [*([AWQModifier()] if method == "awq" else []), QuantizationModifier(**target)]


def main() -> None:
    start = measured.begin()
    job = measured.job()
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # AWQ pins its cache whatever the device, which raises where there is no accelerator
        IntermediatesCache.pin_memory = lambda self, value: None
    with load_context(AutoModelForImageTextToText):
        model = AutoModelForImageTextToText.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = Dataset.from_dict({"input_ids": job.rows, "attention_mask": [[1] * len(row) for row in job.rows]})
    oneshot(
        model=model, dataset=rows, recipe=steps(job.method, job.settings), processor=tokenizer,
        max_seq_length=len(job.rows[0]), num_calibration_samples=len(job.rows), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(str(job.out), save_compressed=True)
    tokenizer.save_pretrained(str(job.out))
    measured.finish(start, ("llmcompressor", "compressed-tensors", "torch", "transformers"))


if __name__ == "__main__":
    main()
    measured.leave()
