"""The extension of vLLM's worker by which the engine is measured. Importing it installs the measurements."""

from __future__ import annotations

from typing import Any

import in_worker
import torch
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as compressed_fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as compressed_int4,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader


class Extension:
    """Methods of the worker that `collective_rpc` calls by name."""

    def serving(self, what: str, *args: Any) -> Any:
        return in_worker.answer(what, args, self.get_model())  # type: ignore[attr-defined]


def _load_weights(self: Any, model: Any, model_config: Any) -> None:
    in_worker.draw(model)


def _no_experts(self: Any, layer: Any, x: Any, *args: Any, **options: Any) -> Any:
    return torch.zeros_like(x)


DummyModelLoader.load_weights = _load_weights
FusedMoERouter.select_experts = in_worker.routing(FusedMoERouter.select_experts)
torch.cuda.CUDAGraph.replay = in_worker.timed(torch.cuda.CUDAGraph.replay, "graph")  # type: ignore[method-assign]
if in_worker.without_experts():
    UnquantizedFusedMoEMethod.apply = Fp8MoEMethod.apply = _no_experts
    compressed_fp8.CompressedTensorsW8A8Fp8MoEMethod.apply = _no_experts
    compressed_int4.CompressedTensorsWNA16MoEMethod.apply = _no_experts
