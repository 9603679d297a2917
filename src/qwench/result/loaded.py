"""What engines did with a release, or would do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qwench.result.record import Nats, Record, Tensors, unit


class Verification(Record):
    """What one engine did with the finished folder (`qwench verify`)."""

    engine: str
    """`transformers`, `vllm`, `gptqmodel`, `auto-round`, `llama.cpp`."""
    file: str | None = None
    """Which file, where a release has several networks (GGUF)."""
    adapter: str | None = None
    """Folder of the corrections (EoRA) that were added on both sides; null for the release alone."""
    version: str
    """The engine's, and those of what it computes with."""
    outcome: str
    """`agrees`, `loads` (numerics not proved, `notes` says why), `disagrees`, `failed`."""
    consumed: Tensors
    """Of the files, what the engine used."""
    unconsumed: list[str] = Field(default_factory=list)
    """Names of stored tensors that it did not use."""
    uninitialized: list[str] = Field(default_factory=list)
    """Names of its parameters that no file filled."""
    positions: Annotated[int, unit("positions")] = 0
    """Where the two distributions were compared."""
    mean_kl: Nats | None = None
    """KL(our reading of the file || the engine's), mean over the positions."""
    max_abs_logprob: Annotated[float, unit("nats")] | None = None
    """Largest difference of one log-probability."""
    tolerance_kl: Nats | None = None
    """`agrees` asks for a `mean_kl` of at most this."""
    original_kl: Nats | None = None
    """KL of transformers on the source from this engine on the file, where someone gave the source and the file is unquantized."""
    original_tolerance_kl: Nats | None = None
    """`agrees` asks for an `original_kl` of at most this."""
    generated: str | None = None
    """What it wrote after the first row."""
    image: str | None = None
    """What became of an image; null where none was shown."""
    speculation: Annotated[dict[str, float], unit("tokens, or rounds, as named")] | None = None
    """The engine's own counters of speculative decoding; null where it drafted nothing."""
    notes: list[str] = Field(default_factory=list)
    """What a person should know."""


class LoadFinding(Record):
    """One thing that an engine would stumble over, told from headers and config."""

    level: str
    """`refuses` (stops with an error), `random` (a parameter holds whatever memory held), `wrong` (computes something else), `lost` (a tensor is not used), `unknown` (the engine reads the format and was not played through for it), `note`."""
    what: str
    """In words, with names and numbers."""
    mend: str
    """What to do about it."""
    rule: str = ""
    """What the engine does, and the file of its public repository where that is written."""
    names: list[str] = Field(default_factory=list)
    """The tensors or modules that it is about."""


class LoadProof(Record):
    """How an engine would load the folder, played through without it (`qwench verify --offline`)."""

    engine: str
    """Whose rules were played through."""
    version: str
    """The version that the rules are of."""
    good: bool
    """Every tensor reaches its place and every parameter is filled."""
    models: list[str] = Field(default_factory=list)
    """The engine's classes."""
    consumed: Tensors = 0
    """Stored tensors that reach a parameter."""
    findings: list[LoadFinding] = Field(default_factory=list)
    """What would go wrong, worst first."""
    notes: list[str] = Field(default_factory=list)
    """What could not be looked at."""
