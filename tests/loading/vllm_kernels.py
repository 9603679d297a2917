"""Kernels that a CPU lacks, as empty shells: vLLM chooses one while it builds a layer in FP8, AWQ or ModelOpt's formats, and here only building and loading are looked at.

Runs inside of vLLM's environment, after `vllm_stand_ins`; what comes after loading (repacking, arithmetic) is not to be asked for.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from vllm_stand_ins import NoExperts


def install() -> None:
    """Where vLLM would look for a kernel, hand it a shell."""
    from vllm.model_executor.layers.quantization import auto_awq, fp8, modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8,
        compressed_tensors_moe_w8a8_int8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8,
        compressed_tensors_w8a8_int8,
        compressed_tensors_w8a16_fp8,
    )

    for module, names in (
        (fp8, ("init_fp8_linear_kernel",)),
        (compressed_tensors_w8a8_fp8, ("init_fp8_linear_kernel", "expose_input_quant_key")),
        (compressed_tensors_w8a8_int8, ("init_int8_linear_kernel",)),
        (compressed_tensors_w8a16_fp8, ("init_wfp8_a16_linear_kernel",)),
        (
            modelopt,
            ("init_fp8_linear_kernel", "init_nvfp4_linear_kernel", "init_mxfp8_linear_kernel", "expose_input_quant_key"),
        ),
    ):
        for name in names:
            setattr(module, name, lambda *arguments, **named: MagicMock())
    for module, name in (
        (fp8, "select_fp8_moe_backend"),
        (compressed_tensors_moe_w8a8_fp8, "select_fp8_moe_backend"),
        (compressed_tensors_moe_w8a8_int8, "select_int8_moe_backend"),
        (modelopt, "select_fp8_moe_backend"),
        (modelopt, "select_nvfp4_moe_backend"),
        (auto_awq, "select_wna16_moe_backend"),
    ):
        setattr(module, name, lambda *arguments, **named: (None, NoExperts))
    modelopt.is_global_sf_supported_for_nvfp4_backend = lambda backend: False
    auto_awq.choose_mp_linear_kernel = lambda config: Kernel


class Kernel:
    """A kernel of a layer in integers."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass
