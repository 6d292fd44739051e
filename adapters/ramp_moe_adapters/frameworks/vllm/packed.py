"""vLLM 0.33's methods for 4-bit experts, with a dispatched layer in place of the experts. Needs vLLM.

vLLM loads the weights as the checkpoint has them, and repacks them for the experts that it takes. Here a layer is made
of what was loaded. If its kernels hold the weights in formats of their own, the loaded tensors are given up: one copy
remains. While a layer is loaded, it takes one copy more; the first of its kind also what is timed on it.

If no layer can be made, vLLM repacks the weights as ever. Afterwards no path of vLLM's can compute a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import KernelError, MoEWeights
from ramp_moe.runtime.release import WEIGHTS, repacked
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.oracle import mxfp4
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as compressed_int4,
)
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4MoEMethod

from ..engine_weights import Parameters, Repacked
from ..known_fields import misfit
from .experts import RampExperts, parameters_of
from .fields import LAYER, PARALLEL
from .method import Dispatched

if TYPE_CHECKING:
    from ramp_moe.runtime.layer import LayerRuntime
    from torch import Tensor

LIKE = {"HUMMING": frozenset({"humming"}), "MARLIN": frozenset({"humming", "marlin"})}
"""By vLLM's backend, the kernels that are no slower on Hopper."""
ROUNDING = ("HUMMING",)
"""Backends that round activations to fp8 if the checkpoint asks for it."""
GROUPS = (32, 128)
"""Columns that share a scale, of the formats int4-g32 and int4-g128."""


class Packed(Dispatched):
    """Mixin for vLLM's methods whose weights are packed. Hidden states stay as they are."""

    experts_cls: Any
    format: str
    names: tuple[str, str] | None = None
    """Names of the packed parameters, if vLLM gives them to experts under others."""
    transposed = False
    """Whether vLLM loads weights and scales with the columns before the rows."""

    @property
    def like(self) -> frozenset[str]:  # type: ignore[override]
        return LIKE.get(getattr(self, self.backend).name, frozenset())

    untimed = "its own experts are not timed on 4-bit weights"

    def _install(self, layer: Any) -> None:
        self.moe_quant_config, self.moe_kernel = FUSED_MOE_UNQUANTIZED_CONFIG, self._kernel

    def _held(self, layer: Any, made: LayerRuntime) -> Parameters | Repacked:
        self._kernel = self._modular(layer)  # what fails is still left to vLLM
        tensors = parameters_of(layer)
        if not (self.transposed or repacked(made)):
            return Parameters(layer, made, tensors)
        return Repacked(made, self.moe.in_dtype, tensors, self._maker(layer))

    def _modular(self, layer: Any) -> Any:
        """vLLM's modular kernel with our experts."""
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=FUSED_MOE_UNQUANTIZED_CONFIG,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        if prepare_finalize is None:
            raise KernelError("vLLM has no way to prepare batches of this layer")
        return FusedMoEKernel(prepare_finalize, RampExperts(self.moe, FUSED_MOE_UNQUANTIZED_CONFIG))

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        if self.experts_cls is RampExperts and self.names is not None:
            layer.w13_weight, layer.w2_weight = (getattr(layer, name) for name in self.names)

    def _maker(self, layer: Any) -> Callable[[Mapping[str, Tensor]], MoEWeights]:
        make = super()._maker(layer)
        return partial(_of_transposed, make) if self.transposed else make

    def _misfit(self, layer: Any) -> str | None:
        known = (self.moe, LAYER), (self.moe.moe_parallel_config, PARALLEL)
        return next((reason for reason in (misfit(*pair) for pair in known) if reason), None)


class DispatchedInt4Method(Packed, compressed_int4.CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """compressed-tensors' pack-quantized INT4, symmetric, in groups of 32 or 128 columns.

    vLLM itself refuses columns that are reordered.
    """

    backend, names = "wna16_backend", ("w13_weight_packed", "w2_weight_packed")

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"int4-g{self.group_size}"

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(method.weight_quant, method.input_quant, moe)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        _refuse_override()
        if method.num_bits != 4:
            raise KernelError(f"packed weights have {method.num_bits} bits, not 4")
        if not method.symmetric:
            raise KernelError("INT4 weights have zero points")
        if method.strategy != "group" or method.group_size not in GROUPS:
            raise KernelError(f"INT4 scales are of groups of {method.group_size}, not of 32 or 128 columns")
        return None, None


class DispatchedGptqMethod(Packed, AutoGPTQMoEMethod):  # type: ignore[misc]
    """GPTQ's symmetric INT4 in groups of 32 or 128 columns. The words of eight columns are those of compressed-tensors.

    vLLM loads the columns before the rows, so a layer is made of a copy.
    """

    backend, names, transposed = "wna16_moe_backend", ("w13_qweight", "w2_qweight"), True

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"int4-g{self.quant_config.group_size}"

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(method.quant_config, moe)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        _refuse_override()
        found = method.quant_config
        if found.weight_bits != 4:
            raise KernelError(f"packed weights have {found.weight_bits} bits, not 4")
        if not found.is_sym:
            raise KernelError("INT4 weights have zero points")
        if found.desc_act:
            raise KernelError("the columns of INT4 weights are reordered (act-order)")
        if found.group_size not in GROUPS:
            raise KernelError(f"INT4 scales are of groups of {found.group_size}, not of 32 or 128 columns")
        return None, None

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in ("w13_bias", "w2_bias"):  # vLLM makes both, for checkpoints that have them
            if name not in layer._loaded_expert_biases:
                layer.register_parameter(name, None)
        super().process_weights_after_loading(layer)


class DispatchedMxfp4Method(Packed, Mxfp4MoEMethod):  # type: ignore[misc]
    """MXFP4 with the gate rows first, as DeepSeek-V4 has it.

    If the checkpoint asks for MXFP8 activations, vLLM's Humming experts round them to fp8 on Hopper, with a scale for
    each group of 128. Then ours may do so, too.
    """

    backend, format, clamps = "mxfp4_backend", "mxfp4", True

    @property
    def activations(self) -> str | None:  # type: ignore[override]
        return "fp8" if self.activation_key is not None and self.mxfp4_backend.name in ROUNDING else None

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(moe, activation_key=method.activation_key)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        _refuse_override()
        return None, None


def _refuse_override() -> None:
    """Raises KernelError if a person has told vLLM how to round activations."""
    model = get_current_vllm_config().model_config
    asked = model is not None and mxfp4._user_moe_activation_override() is not None
    if asked or envs.VLLM_HUMMING_INPUT_QUANT_CONFIG or envs.VLLM_MARLIN_INPUT_DTYPE:
        raise KernelError("vLLM was told how to round the activations of experts")


def _of_transposed(make: Callable[[Mapping[str, Tensor]], MoEWeights], tensors: Mapping[str, Tensor]) -> MoEWeights:
    """Copies of weights and scales `[E, columns, rows]`, with the rows first."""
    return make({k: t.detach().transpose(1, 2).contiguous() if k in WEIGHTS else t for k, t in tensors.items()})
