"""vLLM 0.33's methods for unquantised and fp8 experts, with a dispatched layer in place of the experts. Needs vLLM.

vLLM loads the weights as for its Triton experts: gate rows first, and fp8 with float32 scales of [128, 128] blocks or
of rows. If no layer can be made from them, the experts that vLLM itself would choose take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import SCALE_BLOCK, KernelError, MoEWeights
from ramp_moe.runtime.calibrated_plan import Calibrated
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as compressed_fp8,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    create_fp8_quant_key,
    kFp8Dynamic128Sym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
)

from ..engine_errors import why
from ..engine_weights import Parameters, Repacked
from ..known_fields import misfit
from . import calibrate
from .experts import ACTIVATIONS, RampExperts, logger, parameters_of, say
from .fields import LAYER, PARALLEL, QUANTISATION, TENSORS

if TYPE_CHECKING:
    from ramp_moe.runtime.layer import LayerRuntime
    from torch import Tensor


def leave(reason: str) -> None:
    say("leaves experts to vLLM", reason)


class Dispatched:
    """Mixin for vLLM's methods: a LayerRuntime computes the experts, if one can be made from the loaded weights."""

    backend: str
    """Name of the attribute with vLLM's backend, for which vLLM converts the weights."""
    unconverted: Any
    """The backend for which vLLM leaves the weights as they were loaded."""
    format: str | None = None
    """Format of MoEWeights; None if the dtype of the weights says it."""
    experts_cls: Any
    moe_kernel: Any
    moe: Any
    like: frozenset[str] | None = None
    """See `LoadedLayer.like`; None if vLLM's Triton experts read the weights as they were loaded."""
    untimed = "ramp_moe is compared with its Triton experts alone"
    """What a person should know of the comparison, if vLLM would take other experts."""
    calibrated: Calibrated | None = None
    """What was measured of the layer's kind."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the layer from the loaded weights. If it exists already, have it compute with the newly loaded ones.

        CUDA graphs that were captured before then compute with those, too. Raises RampMoEError if new weights do not
        fit. The layer then computes no batch until fitting weights are loaded.
        """
        if self.experts_cls is RampExperts:
            self.moe_kernel.fused_experts.load(layer)
            return
        found = None if self.moe_kernel else self._made(layer)
        if found is None:
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        self.experts_cls = RampExperts
        self._install(layer)
        self.moe_kernel.fused_experts.take(layer, found, self.calibrated)

    def _install(self, layer: Any) -> None:
        """Have vLLM make its modular kernel with our experts."""
        setattr(self, self.backend, self.unconverted)
        super().process_weights_after_loading(layer)  # type: ignore[misc]

    def _made(self, layer: Any) -> Parameters | Repacked | None:
        """Make a layer from the loaded parameters, which share its memory from then on.

        Returns None, with a line in the log, if no layer can be made.
        """
        model = calibrate.model()
        notes, said = model.builder.notes, len(model.builder.notes)
        try:
            if reason := self._misfit(layer):
                raise KernelError(reason)
            ep_size = self.moe.num_experts // self.moe.num_local_experts
            weights = _weights(layer, self.moe, self.format)
            given = calibrate.layer_of(layer, self.moe, weights, ep_size, self.like)
            made = model.layer(given)
            self.calibrated = model.calibrated(made)
            found = self._held(layer, made)
        except Exception as e:  # whatever a kernel raises: vLLM's experts can have the weights
            with suppress(Exception):  # another layer than is known has no kind
                model.refuse(calibrate.kind_of(layer, self.moe))
            leave(why(e))
            return None
        for note in notes[said:]:  # a missing profile matters less if the layer was measured here
            (logger.warning if self.calibrated is None else logger.info)("ramp_moe: %s", note)
        kernels, layouts = ", ".join(made.configs()), " and ".join(made.layouts)
        logger.info_once("ramp_moe: %s by %s; weights in %s", made.shape.slug, kernels, layouts)
        if self.calibrated is not None and self.experts_cls not in (None, TritonExperts):
            name = self.experts_cls.__name__
            logger.info_once("ramp_moe: vLLM would take %s; %s", name, self.untimed)
        model.report(made)
        return found

    def _held(self, layer: Any, made: LayerRuntime) -> Parameters | Repacked:
        return Parameters(layer, made, parameters_of(layer))

    def _misfit(self, layer: Any) -> str | None:
        """Why ramp_moe does not compute the layer: a field of vLLM's configurations; None if every field fits."""
        converted = getattr(self, self.backend)
        setattr(self, self.backend, self.unconverted)
        try:
            quantisation = self.get_fused_moe_quant_config(layer)  # type: ignore[attr-defined]
        finally:
            setattr(self, self.backend, converted)
        tensors = [(getattr(quantisation, f"_{name}"), TENSORS[name]) for name in TENSORS]
        configurations = (self.moe, LAYER), (self.moe.moe_parallel_config, PARALLEL), (quantisation, QUANTISATION)
        reasons = (misfit(config, known) for config, known in (*configurations, *tensors))
        return next((reason for reason in reasons if reason), None)


class DispatchedUnquantizedMethod(Dispatched, UnquantizedFusedMoEMethod):  # type: ignore[misc]
    backend, unconverted = "unquantized_backend", UnquantizedMoeBackend.TRITON

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(moe)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        return None, None


class DispatchedFp8Method(Dispatched, Fp8MoEMethod):  # type: ignore[misc]
    backend, unconverted = "fp8_backend", Fp8MoeBackend.TRITON

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(method.quant_config, layer)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        if method.moe_block_shape is None:
            raise KernelError("fp8 weights have no block scales")
        return create_fp8_quant_key(static=True, group_shape=GroupShape(*method.moe_block_shape)), kFp8Dynamic128Sym


class DispatchedCompressedFp8Method(Dispatched, compressed_fp8.CompressedTensorsW8A8Fp8MoEMethod):  # type: ignore[misc]
    """compressed-tensors' fp8, whose scales are of rows or of [128, 128] blocks."""

    backend, unconverted = "fp8_backend", Fp8MoeBackend.TRITON

    @property
    def format(self) -> str | None:  # type: ignore[override]
        return None if self.block_quant else "fp8-channel"

    @classmethod
    def of(cls, method: Any, layer: Any, moe: Any) -> Any:
        return cls(method.weight_quant, method.input_quant, moe)

    @staticmethod
    def keys(method: Any) -> tuple[Any, Any]:
        if method.static_input_scales:
            raise KernelError("activations have scales of their own in the checkpoint")
        if method.block_quant:
            if [*method.weight_block_size] != [SCALE_BLOCK, SCALE_BLOCK]:
                raise KernelError(
                    f"fp8 scales are of blocks {method.weight_block_size}, not of {SCALE_BLOCK} by as many"
                )
            return kFp8Static128BlockSym, kFp8Dynamic128Sym
        if method.weight_quant.strategy != compressed_fp8.QuantizationStrategy.CHANNEL:
            raise KernelError("fp8 weights have a scale for each matrix, which vLLM merges for gate and up")
        return kFp8StaticChannelSym, kFp8DynamicTokenSym


def _weights(layer: Any, moe: Any, format: str | None) -> MoEWeights:
    """MoEWeights of the layer's parameters, in their memory. Raises KernelError or ShapeError if they cannot be
    used."""
    padded = moe.hidden_dim, moe.intermediate_size_per_partition
    if padded != (moe.hidden_dim_unpadded, moe.intermediate_size_per_partition_unpadded):
        raise KernelError(f"vLLM has padded the weights to {padded[0]} and {padded[1]}")
    given = parameters_of(layer)
    kind = given["gate_up"].dtype
    if kind.is_floating_point and kind.itemsize > 1 and kind != moe.in_dtype:
        raise KernelError(f"weights are {kind}, activations {moe.in_dtype}")
    if moe.has_bias and "gate_up_bias" not in given:
        raise KernelError("the layer has biases, which vLLM does not load in this format")
    return weights_of(given, layer.activation, format)


def weights_of(tensors: Mapping[str, Tensor], activation: Any, format: str | None) -> MoEWeights:
    """MoEWeights of parameters by field, in their memory."""
    given: dict[str, Any] = {field: t.detach() for field, t in tensors.items()}
    return MoEWeights(**given, activation=ACTIVATIONS[activation], format=format)
