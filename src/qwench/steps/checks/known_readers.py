"""Engines that are known to read a file wrongly, and say nothing: found by running them, detected here from names alone.

transformers (5.23; `integrations/compressed_tensors.py`) decodes the experts of a MoE layer from `weight_packed`, `weight_scale` and `weight_shape` only:

- NVFP4 experts come out without their global scale, too large by a factor of thousands;
- experts in asymmetric integers come out without their zero points.

NVFP4 loads without a complaint. With compressed-tensors 0.20, asymmetric integers are refused aloud, dense ones too: it expects their zero points unpacked.
And where a compressed-tensors file has experts that are not quantized and stored one by one, it leaves their fused parameters at random values, with
only a line in its loading report. NVFP4 outside of experts is read rightly, and so are symmetric integers everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwench.checkpoint.reader import Checkpoint

EXPERT = re.compile(r"^(?!mtp\.).*\.experts\.\d+\.\w+\.(\w+)$")
DROPPED = {
    "weight_global_scale": "the global scale of NVFP4 experts",
    "weight_zero_point": "the zero points of asymmetric experts",
}


def wrong_reader(engine: str, checkpoint: Checkpoint, uninitialized: Iterable[str]) -> str | None:
    """Why an engine's numbers for this folder mean nothing; None where no such case is known."""
    if engine != "transformers" or "quantization_config" not in checkpoint.config:
        return None
    parts = {match[1] for name in checkpoint.tensors if (match := EXPERT.match(name))}
    for part, what in DROPPED.items():
        if part in parts:
            return f"numerics not proved: transformers drops {what} when it loads them. Do not use it for this release."
    if "weight" in parts and any(".experts." in name for name in uninitialized):
        return "numerics not proved: transformers leaves unquantized experts that are stored one by one at random values. Do not use it for this release."
    return None
