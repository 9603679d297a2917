"""What engines did with a release, or would do."""

from __future__ import annotations

from pydantic import Field

from qwench.result.record import Record


class Verification(Record):
    """What one engine did with the finished folder.

    Attributes:
        outcome: `agrees`, `loads` (numerics not proved, `notes` says why), `disagrees`, `failed`.
        consumed, unconsumed: tensors of the files that the engine used, and the names of those it did not.
        mean_kl, max_abs_logprob: our reading of the file against the engine's, on `positions` positions.
        file: the file, where a release has several networks (GGUF).
        adapter: the name of the folder of corrections (EoRA) that were added on both sides; None for the release alone.
        original_kl: transformers on the source against this engine on the file, where someone gave the source and the file is unquantized; agreement
            needs it to be at most `original_tolerance_kl`.
    """

    engine: str
    file: str | None = None
    adapter: str | None = None
    version: str
    outcome: str
    consumed: int
    unconsumed: list[str] = Field(default_factory=list)
    uninitialized: list[str] = Field(default_factory=list)
    positions: int = 0
    mean_kl: float | None = None
    max_abs_logprob: float | None = None
    tolerance_kl: float | None = None
    original_kl: float | None = None
    original_tolerance_kl: float | None = None
    generated: str | None = None
    image: str | None = None
    speculation: dict[str, float] | None = None
    notes: list[str] = Field(default_factory=list)


class LoadFinding(Record):
    """One thing that an engine would stumble over, told from headers and config.

    Attributes:
        level: `refuses`, `random`, `wrong`, `lost`, `note`; see `qwench.loading.findings`.
        rule: what the engine does, and the file of its public repository where that is written.
        names: the tensors or modules that it is about.
    """

    level: str
    what: str
    mend: str
    rule: str = ""
    names: list[str] = Field(default_factory=list)


class LoadProof(Record):
    """How an engine would load the folder, played through without it (`qwench verify --offline`).

    Attributes:
        good: every tensor reaches its place and every parameter is filled.
        models: the engine's classes.
        consumed: stored tensors that reach a parameter.
    """

    engine: str
    version: str
    good: bool
    models: list[str] = Field(default_factory=list)
    consumed: int = 0
    findings: list[LoadFinding] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
