"""Records of releases for tests of the card: made up, with numbers that occur nowhere else."""

from typing import Any

from qwench.result import (
    Acceptance,
    Divergence,
    Estimate,
    Evaluation,
    FileFact,
    PrecisionRow,
    Result,
    RunFacts,
    SourceFacts,
    TensorError,
    Verification,
)


def estimate(mean: float, standard_error: float) -> Estimate:
    return Estimate(mean=mean, standard_error=standard_error)


def evaluation(**changes: Any) -> Evaluation:
    values: dict[str, Any] = dict(
        text="modules held out", text_sha256="ab" * 32, ids_sha256="cd" * 32, documents=7, length=97, tokens=672, compute_dtype="float32",
        divergence=Divergence(
            mean=estimate(0.021337, 0.00114), p99=0.2317, p999=0.8941, max=3.917,
            histogram_edges=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], histogram_counts=[12, 300, 330, 29, 1],
        ),
        perplexity_source=estimate(6.2134, 0.313), perplexity_release=estimate(6.3187, 0.324), top1_agreement=estimate(0.94313, 0.0041),
        loss_increase=estimate(0.016871, 0.00213),
        acceptance_source=Acceptance(by_position=[estimate(0.8712, 0.011), estimate(0.6934, 0.012)]),
        acceptance_release=Acceptance(by_position=[estimate(0.8613, 0.011), estimate(0.6798, 0.012)]),
        hidden_error_by_layer=[0.031, 0.042, 0.047, 0.059],
    )  # fmt: skip
    return Evaluation(**values | changes)


def weight(
    role: str, layer: int | None, scheme: str = "nvfp4 g16", mean: float = 8e-4, largest: float = 0.05, relative: float = 0.09
) -> TensorError:
    return TensorError(
        module=f"m.{layer}.{role}", role=role, layer=layer, scheme=scheme, mean_abs=mean, max_abs=largest, relative_rms=relative
    )


def row(component: str, stored: str, size: int, before: int | None) -> PrecisionRow:
    return PrecisionRow(component=component, stored=stored, tensors=3, parameters=7000, bytes=size, source_bytes=before)


def release(**changes: Any) -> Result:
    values: dict[str, Any] = dict(
        recipe={"name": "nvfp4a16", "about": "by rounding.", "steps": [{"export": {"format": "compressed-tensors"}}]},
        source=SourceFacts(
            name="Somebody/Base-9B", revision="0123abc", model_type="qwen3_5", layout="conditional", parameters=35_000, tensors=15,
            bytes=70_000, license="apache-2.0",
        ),
        files=[FileFact(name="model-00001-of-00002.safetensors", bytes=31_000), FileFact(name="model-00002-of-00002.safetensors", bytes=6_500)],
        precision=[
            row("attention", "nvfp4 g16", 4_000, 14_000), row("attention", "BF16", 100, 100), row("mlp", "nvfp4 g16", 4_100, 14_100),
            row("mtp", "BF16", 14_200, 14_200), row("vision", "BF16", 14_300, 14_300),
        ],
        errors=[
            weight("mlp.gate", 0, mean=7e-4, largest=0.041), weight("mlp.gate", 3, mean=9e-4, largest=0.058),
            weight("attention.q", 3, largest=0.0333),
        ],
        run=RunFacts(seconds=65.2, peak_rss=2_100_000_000, threads=2),
        evaluation=evaluation(),
        verifications=[],
    )  # fmt: skip
    return Result(**values | changes)


def verification(engine: str, outcome: str, **changes: Any) -> Verification:
    return Verification(**dict(engine=engine, version="9.87", outcome=outcome, consumed=1234) | changes)
