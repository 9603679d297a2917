"""auto-round: its W4A16 scheme, tuned."""

from __future__ import annotations

import measured
import torch
import transformers.models.qwen3_5.modeling_qwen3_5
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe  # noqa: F401
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer


def main() -> None:
    start = measured.begin()
    job = measured.job()
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(job.model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in map(torch.tensor, job.rows)]
    tuner = AutoRound(
        model, tokenizer=tokenizer, processor=measured.TextProcessor(tokenizer), scheme="W4A16", layer_config=job.settings["kept"] or None,
        dataset=DataLoader(rows, batch_size=1), iters=job.settings["iterations"], batch_size=job.settings["batch"],
        nsamples=len(rows), seqlen=len(job.rows[0]), device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    beside = job.out.with_name("written")
    tuner.quantize_and_save(output_dir=str(beside), format="auto_round")
    next(beside.rglob("config.json")).parent.rename(job.out)  # it makes a folder of its own inside of the one that it is given
    measured.finish(start, ("auto-round", "torch", "transformers"))


if __name__ == "__main__":
    main()
    measured.leave()
