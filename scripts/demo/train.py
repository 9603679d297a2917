"""Train one demo checkpoint from nothing: `python -m scripts.demo.train dense --steps 1500`.

Deterministic given the Python version, the seed and the number of threads. The state goes to `--work` every 200 steps, so a killed
training continues. `scripts.demo.export` then writes it in the published layout.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from scripts.demo.corpus import documents
from scripts.demo.network import Network, losses
from scripts.demo.shapes import SHAPES
from scripts.demo.tokens import save_tokenizer, train_tokenizer


def pack(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """All documents, separated by <|endoftext|>, cut into rows of `length` tokens."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text)["input_ids"] + [end]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).view(rows, length)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, flat, then linear decay over the last 40%."""
    return min(1.0, (step + 1) / 50, max(0.02, (steps - step) / (0.4 * steps)))


@torch.no_grad()
def evaluate(network: Network, rows: torch.Tensor) -> dict[str, float]:
    network.eval()
    totals = torch.zeros(5, dtype=torch.float64)
    batches = rows.split(4)
    for batch in batches:
        _, cross, agree = losses(network, batch)
        totals += torch.tensor(cross + agree, dtype=torch.float64)
    network.train()
    names = ["loss_trunk", "loss_mtp_1", "loss_mtp_2", "acceptance_1", "acceptance_2"]
    return {n: round(float(v) / len(batches), 4) for n, v in zip(names, totals, strict=True)}


def optimizer_for(network: Network, rate: float) -> torch.optim.Optimizer:
    decayed = [p for n, p in network.named_parameters() if p.dim() >= 2 and "norm" not in n]
    plain = [p for n, p in network.named_parameters() if p.dim() < 2 or "norm" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=SHAPES)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()

    shape = SHAPES[args.which]
    torch.manual_seed(shape["seed"])
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = documents("train") + documents("calibration"), documents("held")
    tokenizer = train_tokenizer(train_texts, shape["tokens"])
    save_tokenizer(tokenizer, args.work / "tokenizer")
    rows, held = pack(tokenizer, train_texts, args.length), pack(tokenizer, held_texts, args.length)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(math.ceil(args.steps * args.rows / len(rows)))])
    held = held[torch.randperm(len(held))[:48]]

    network = Network(shape["text"])
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(rows):,} rows of {args.length}", flush=True)
    optimizer = optimizer_for(network, args.rate)
    state_file, first, spent = args.work / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]

    started = time.monotonic() - spent
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * learning_rate(step, args.steps)
        batch = rows[order[step * args.rows : (step + 1) * args.rows]]
        total, cross, agree = losses(network, batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seconds = time.monotonic() - started
        if step % 20 == 0:
            speed = (step + 1) * batch.numel() / seconds
            print(
                f"{step} {[round(c, 3) for c in cross]} {[round(a, 3) for a in agree]} {speed:.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            report = evaluate(network, held) | {
                "steps": step + 1, "tokens": (step + 1) * batch.numel(), "seconds": round(seconds), "seed": shape["seed"],
                "threads": args.threads, "rate": args.rate, "rows": args.rows, "length": args.length,
            }  # fmt: skip
            print(json.dumps(report), flush=True)
            (args.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            beside = state_file.with_suffix(".new")
            torch.save(
                {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds},
                beside,
            )
            beside.replace(state_file)


if __name__ == "__main__":
    main()
