"""Which engine a release is verified in where nobody names one: the one whose own format it is in.

`compressed-tensors`, block FP8 and unquantized folders open in transformers, which is always installed; the `gptq` and `auto-round` containers in the libraries that they are named after
(transformers reads them through these too); GGUF in llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from qwench.checkpoint.folder import read_config
from qwench.steps.gguf.verify import is_gguf

BY_METHOD = {"gptq": "gptqmodel", "auto-round": "auto-round"}
"""By `quant_method`; all others open in transformers."""


def natural_engine(release: Path) -> str:
    """The name in `ENGINES`. Raises CheckpointError where the folder has no config.json."""
    if is_gguf(release):
        return "llama.cpp"
    quantization = read_config(release).get("quantization_config") or {}
    return BY_METHOD.get(str(quantization.get("quant_method")), "transformers")
