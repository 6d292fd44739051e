"""vLLM 0.33's methods for 4-bit experts, with a dispatched layer in place of the experts. Needs vLLM.

vLLM loads the weights as the checkpoint has them, and repacks them for the experts that it takes. Here a layer is made
of what was loaded. If its kernels hold the weights in formats of their own, the loaded tensors are given up: one copy
remains. While a layer is loaded, it takes one copy more; the first of its kind also what is timed on it.

If no layer can be made, vLLM repacks the weights as ever. Afterwards no path of vLLM's can compute a batch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import KernelError
from ramp_moe.runtime.release import repacked
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as compressed_int4,
)

from ..engine_weights import Parameters, Repacked
from ..known_fields import misfit
from .experts import RampExperts, parameters_of
from .fields import LAYER, PARALLEL
from .method import Dispatched, weights_of

if TYPE_CHECKING:
    from ramp_moe.runtime.layer import LayerRuntime

LIKE = {"HUMMING": frozenset({"humming"}), "MARLIN": frozenset({"humming", "marlin"})}
"""By vLLM's backend, the kernels that are no slower on Hopper."""
GROUPS = (32, 128)
"""Columns that share a scale, of the formats int4-g32 and int4-g128."""


class Packed(Dispatched):
    """Mixin for vLLM's methods whose weights are packed. Hidden states stay as they are."""

    experts_cls: Any
    format: str

    @property
    def like(self) -> frozenset[str]:  # type: ignore[override]
        return LIKE.get(getattr(self, self.backend).name, frozenset())

    untimed = "its own experts are not timed on 4-bit weights"

    def _install(self, layer: Any) -> None:
        self.moe_quant_config, self.moe_kernel = FUSED_MOE_UNQUANTIZED_CONFIG, self._kernel

    def _held(self, layer: Any, made: LayerRuntime) -> Parameters | Repacked:
        self._kernel = self._modular(layer)  # what fails is still left to vLLM
        tensors = parameters_of(layer)
        if not repacked(made):
            return Parameters(layer, made, tensors)
        make = partial(weights_of, activation=layer.activation, format=self.format)
        return Repacked(made, self.moe.in_dtype, tensors, make)

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

    def _misfit(self, layer: Any) -> str | None:
        known = (self.moe, LAYER), (self.moe.moe_parallel_config, PARALLEL)
        return next((reason for reason in (misfit(*pair) for pair in known) if reason), None)


class DispatchedInt4Method(Packed, compressed_int4.CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """compressed-tensors' pack-quantized INT4, symmetric, in groups of 32 or 128 columns.

    vLLM itself refuses columns that are reordered.
    """

    backend = "wna16_backend"

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"int4-g{self.group_size}"

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(method.weight_quant, method.input_quant, moe)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        if method.num_bits != 4:
            raise KernelError(f"packed weights have {method.num_bits} bits, not 4")
        if not method.symmetric:
            raise KernelError("INT4 weights have zero points")
        if method.strategy != "group" or method.group_size not in GROUPS:
            raise KernelError(f"INT4 scales are of groups of {method.group_size}, not of 32 or 128 columns")
        return None, None

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        if self.experts_cls is RampExperts:  # under the names by which vLLM gives weights to experts
            layer.w13_weight, layer.w2_weight = layer.w13_weight_packed, layer.w2_weight_packed
