"""REAP as its paper writes it: run every expert on every token that was sent to it, one at a time, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Vector = Sequence[float]


def route(logits: Vector, top_k: int) -> dict[int, float]:
    """Chosen experts and their weights: softmax over all, the largest few, renormalised."""
    largest = max(logits)
    exponentials = [math.exp(v - largest) for v in logits]
    probabilities = [e / sum(exponentials) for e in exponentials]
    chosen = sorted(range(len(logits)), key=lambda j: (-probabilities[j], j))[:top_k]
    return {j: probabilities[j] / sum(probabilities[i] for i in chosen) for j in chosen}


def contributions(
    tokens: Sequence[Vector], logits: Sequence[Vector], experts: Sequence[Callable[[Vector], Vector]], top_k: int
) -> list[list[tuple[float, float]]]:
    """For each expert, for each of its tokens, (router weight, norm of its output)."""
    seen: list[list[tuple[float, float]]] = [[] for _ in experts]
    for token, row in zip(tokens, logits, strict=True):
        for j, weight in route(row, top_k).items():
            seen[j].append((weight, math.sqrt(sum(v * v for v in experts[j](token)))))
    return seen


def saliency(seen: list[list[tuple[float, float]]], criterion: str) -> list[float]:
    def score(pairs: list[tuple[float, float]]) -> float:
        if not pairs:
            return 0.0
        return {
            "reap": sum(g * n for g, n in pairs) / len(pairs),
            "frequency": float(len(pairs)),
            "weight_sum": sum(g for g, _ in pairs),
            "norm_mean": sum(n for _, n in pairs) / len(pairs),
            "norm_sum": sum(n for _, n in pairs),
            "contribution_sum": sum(g * n for g, n in pairs),
            "norm_max": max(n for _, n in pairs),
        }[criterion]

    return [score(pairs) for pairs in seen]
