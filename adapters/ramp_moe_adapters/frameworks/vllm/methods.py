"""The methods of vLLM's that are replaced. Needs vLLM."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 import (  # noqa: E501
    CompressedTensorsW8A8Fp8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

from .method import DispatchedCompressedFp8Method, DispatchedFp8Method, DispatchedUnquantizedMethod
from .packed import DispatchedInt4Method

METHODS: dict[type, Any] = {
    UnquantizedFusedMoEMethod: DispatchedUnquantizedMethod,
    Fp8MoEMethod: DispatchedFp8Method,
    CompressedTensorsW8A8Fp8MoEMethod: DispatchedCompressedFp8Method,
    CompressedTensorsWNA16MoEMethod: DispatchedInt4Method,
}
"""By vLLM's method, ours. `of(method, layer, moe)` makes it in the place of vLLM's. `keys(method)` are vLLM's names of
how weights and activations are quantised; it raises KernelError for what no kernel computes."""
