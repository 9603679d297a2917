"""Arithmetic for the formats that vLLM has no CPU kernel for, so that everything around the kernel can still be run and compared.

A quantized layer of vLLM is: parameters in the file's format (`create_weights`), a loader that joins the file's tensors into them, a step that reads what the joined
parameters mean, and a kernel. Only the last is missing on a CPU. A stand-in takes the joined parameters as vLLM loaded them, decodes them to the model's
dtype and multiplies as for an unquantized layer. What agrees with our own reading after that proves names, fusing, order, scales and the one outer scale
that vLLM keeps of several; it proves nothing about the kernel that a GPU runs, and whoever reports must say so.

Where a layer's inputs are rounded too, they are rounded by vLLM's own emulation (`nvfp4_emulation_utils`), with the divisors that vLLM loaded, and multiplied likewise.

A stand-in is used only where vLLM's own choice of a kernel fails. Runs inside of the engine's environment: no import of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

used: list[str] = []
"""What was stood in for in this process."""


def note(what: str) -> None:
    if what not in used:
        used.append(what)


def nvfp4_values(packed: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    """float32 [..., out, in] from nibbles uint8 [..., out, in/2] (low nibble first), block scales [..., out, in/16] and a factor that broadcasts."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    blocks = values.view(*values.shape[:-1], -1, 16) * scales.float().unsqueeze(-1)
    decoded: Tensor = blocks.flatten(-2) * factor
    return decoded


def rounded_inputs(x: Tensor, divisor: Tensor) -> Tensor:
    """Activations [..., in] rounded to NVFP4 over a divisor, as vLLM emulates it."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

    rounded: Tensor = ref_nvfp4_quant_dequant(x.reshape(-1, x.shape[-1]), divisor, block_size=16)
    return rounded.view(x.shape)


def integer_values(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """float32 [..., out, in] from codes packed along `in` into int32, lowest first, and scales [..., out, groups]; zeros are packed along `out`."""
    codes = unpack(packed, bits)
    offset = (
        torch.full(scales.shape, 1 << (bits - 1)) if zeros is None else unpack(zeros.transpose(-1, -2), bits).transpose(-1, -2)
    )
    groups = codes.view(*scales.shape, -1) - offset.unsqueeze(-1)
    decoded: Tensor = (groups * scales.float().unsqueeze(-1)).flatten(-2)
    return decoded


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [..., n] to its codes int32 [..., n * 32 / bits], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def install() -> None:
    """Offer the stand-ins where vLLM finds nothing."""
    _linear_nvfp4()
    _linear_integer()
    _experts_nvfp4()
    _experts_integer()
    _experts_gptq()
    _auto_round()


def _linear_nvfp4() -> None:
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4 as module

    class StandIn(NvFp4LinearKernel):  # type: ignore[misc]
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            values = nvfp4_values(layer.weight.data, layer.weight_scale.data, layer.weight_global_scale.data)
            layer.weight = nn.Parameter(values.to(torch.get_default_dtype()), requires_grad=False)

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            divisor = getattr(layer, "input_global_scale_inv", None)
            return nn.functional.linear(x if divisor is None else rounded_inputs(x, divisor), layer.weight, bias)

    choose = module.init_nvfp4_linear_kernel

    def choose_or_stand_in(use_a16: bool = False) -> Any:
        try:
            return choose(use_a16=use_a16)
        except (ValueError, AttributeError):
            note("NVFP4 linear layers" + ("" if use_a16 else " with 4-bit inputs"))
            return StandIn(NvFp4LinearLayerConfig())

    module.init_nvfp4_linear_kernel = choose_or_stand_in


def _linear_integer() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    class StandIn(MPLinearKernel):  # type: ignore[misc]
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            packed, scales, zeros = self._get_weight_params(layer)
            bits = self.config.weight_type.size_bits
            if packed.input_dim == 0:  # GPTQ: [in, out]
                values = integer_values(packed.data.t(), scales.data.t(), None, bits)
            else:
                values = integer_values(packed.data, scales.data, zeros.data if self.config.zero_points else None, bits)
            layer.weight = nn.Parameter(values.to(scales.dtype), requires_grad=False)

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return nn.functional.linear(x, layer.weight, bias)

    choose = compressed_tensors_wNa16.choose_mp_linear_kernel

    def choose_or_stand_in(config: Any) -> Any:
        try:
            kernel = choose(config)
            missing = kernel.__name__.startswith("CPU") and not hasattr(torch.ops._C, "cpu_gemm_wna16")
        except (ValueError, NotImplementedError, AttributeError):
            missing, kernel = True, None
        if missing:
            note(f"INT{config.weight_type.size_bits} linear layers")
            return StandIn
        return kernel

    compressed_tensors_wNa16.choose_mp_linear_kernel = auto_gptq.choose_mp_linear_kernel = choose_or_stand_in
    auto_gptq.verify_marlin_supported = lambda *arguments, **named: None  # the choice of a kernel finds out


class NoExperts:
    """In the place of the class of a fused-experts kernel, until the decoded weights go to the unquantized one."""

    @staticmethod
    def is_monolithic() -> bool:
        return False


def _run_unquantized(method: Any, layer: Any, gate_up: Tensor, down: Tensor) -> None:
    """Give a quantized experts layer the unquantized kernel, with decoded weights [experts, 2 * width, hidden] and [experts, hidden, width]."""
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    for name, values in (("w13_weight", gate_up), ("w2_weight", down)):
        setattr(layer, name, nn.Parameter(values.to(layer.params_dtype), requires_grad=False))
    plain = UnquantizedFusedMoEMethod(method.moe)
    plain.process_weights_after_loading(layer)
    method.moe_quant_config, method.moe_kernel = plain.moe_quant_config, plain.moe_kernel


def _run_rounded(method: Any, layer: Any, gate_up: Tensor, down: Tensor) -> None:
    """Give an experts layer whose inputs are rounded to 4 bits a forward pass in torch; arguments as in `_run_unquantized`.

    Of gate's and up's divisors the smaller one stands for both, as in vLLM's kernels that keep one for each expert.
    """
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

    gate_up, down = gate_up.to(layer.params_dtype), down.to(layer.params_dtype)
    read, inner = layer.w13_input_global_scale.data.amin(1), layer.w2_input_global_scale.data

    def apply(*, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **_others: Any) -> Tensor:
        total = torch.zeros_like(x)
        for expert in torch.unique(topk_ids).tolist():
            token, rank = torch.where(topk_ids == expert)
            gate, up = nn.functional.linear(rounded_inputs(x[token], read[expert]), gate_up[expert]).chunk(2, -1)
            middle = rounded_inputs(nn.functional.silu(gate) * up, inner[expert])
            out = nn.functional.linear(middle, down[expert]) * topk_weights[token, rank, None].to(x.dtype)
            total.index_add_(0, token, out)
        return total

    method.apply, method.moe_quant_config = apply, FUSED_MOE_UNQUANTIZED_CONFIG


def _offer_experts(module: Any, cls: Any, select: str, what: str, decode: Any, run: Any = _run_unquantized) -> None:
    """Where `select` finds no backend, let the layer load in the file's format and run on what `decode` makes of it."""
    choose, process = getattr(module, select), cls.process_weights_after_loading

    def choose_or_stand_in(*arguments: Any, **named: Any) -> Any:
        try:
            return choose(*arguments, **named)
        except (ValueError, NotImplementedError, AttributeError):
            note(what)
            return None, NoExperts

    def decode_or_process(method: Any, layer: Any) -> None:
        if method.experts_cls is NoExperts:
            run(method, layer, *decode(method, layer))
        else:
            process(method, layer)

    setattr(module, select, choose_or_stand_in)
    cls.process_weights_after_loading = decode_or_process


def _experts_nvfp4() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as module,
    )

    def decode(method: Any, layer: Any) -> tuple[Tensor, Tensor]:
        # As vLLM does for its own kernels: the gate's outer scale stands for the up projection's too.
        gate = 1.0 / layer.w13_weight_global_scale.data[:, 0]
        down = 1.0 / layer.w2_weight_global_scale.data
        return (
            nvfp4_values(layer.w13_weight_packed.data, layer.w13_weight_scale.data, gate[:, None, None]),
            nvfp4_values(layer.w2_weight_packed.data, layer.w2_weight_scale.data, down[:, None, None]),
        )

    def run(method: Any, layer: Any, gate_up: Tensor, down: Tensor) -> None:
        if not method.use_a16:
            note("4-bit inputs of experts")
        (_run_unquantized if method.use_a16 else _run_rounded)(method, layer, gate_up, down)

    _offer_experts(module, module.CompressedTensorsW4A4Nvfp4MoEMethod, "select_nvfp4_moe_backend", "NVFP4 experts", decode, run)


def _experts_integer() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as module,
    )

    def decode(method: Any, layer: Any) -> tuple[Tensor, Tensor]:
        def values(part: str) -> Tensor:
            zeros = getattr(layer, f"{part}_weight_zero_point", None)
            packed, scales = getattr(layer, f"{part}_weight_packed").data, getattr(layer, f"{part}_weight_scale").data
            return integer_values(packed, scales, None if zeros is None else zeros.data, method.num_bits)

        return values("w13"), values("w2")

    _offer_experts(module, module.CompressedTensorsWNA16MoEMethod, "select_wna16_moe_backend", "integer experts", decode)


def _experts_gptq() -> None:
    from vllm.model_executor.layers.quantization import auto_gptq as module

    def decode(method: Any, layer: Any) -> tuple[Tensor, Tensor]:
        def values(part: str) -> Tensor:
            packed, scales = (getattr(layer, f"{part}_{name}").data.transpose(1, 2) for name in ("qweight", "scales"))
            return integer_values(packed, scales, None, method.quant_config.quant_type.size_bits)

        return values("w13"), values("w2")

    _offer_experts(module, module.AutoGPTQMoEMethod, "select_wna16_moe_backend", "integer experts", decode)


def _auto_round() -> None:
    """On a CPU vLLM refuses auto-round's INT8 layers and takes its experts for unquantized ones; elsewhere it reads both as GPTQ's."""
    from vllm.model_executor.layers.quantization.inc.inc_linear import INCLinearMethod
    from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_linear, inc_wna16_scheme

    linear = inc_wna16_scheme.INCWna16Scheme.get_linear_method

    def linear_or_gptq(scheme: Any, config: Any, layer: Any, prefix: str, layer_config: Any) -> Any:
        try:
            return linear(scheme, config, layer, prefix, layer_config)
        except NotImplementedError:
            return INCLinearMethod(inc_wna16_linear.INCWNA16LinearScheme(layer_config))

    def experts_as_gptq(scheme: Any, config: Any, layer: Any, prefix: str, layer_config: Any) -> Any:
        return inc_wna16_scheme._resolve_gptq_moe(layer, layer_config)

    inc_wna16_linear.check_marlin_supported = lambda *arguments, **named: True
    inc_wna16_scheme.INCWna16Scheme.get_linear_method = linear_or_gptq
    inc_wna16_scheme.INCWna16Scheme.get_moe_method = experts_as_gptq
