"""Routed experts as vLLM itself makes, loads and runs them, for one rank of a layer of random weights.

If vLLM finds no GPU, or none of its compiled operators, it is told that it runs on Hopper. Experts like ours do without
these operators. vLLM is told after its modules are imported, since some of them ask the operators for their
capabilities. Import this before vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.platforms
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks.engine_calibration import LoadedModel
from vllm import logger as vllm_logger
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Hopper(Platform):
    _enum = PlatformEnum.UNSPECIFIED
    device_name = "cuda"
    device_type = DEVICE
    dispatch_key = DEVICE.upper()

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def supports_fp8(cls) -> bool:
        return True

    @classmethod
    def import_kernels(cls) -> None:
        pass


try:
    found = vllm.platforms.current_platform.is_cuda()
except ImportError:
    found = False
if not found:
    vllm.platforms._current_platform = Hopper()

import vllm.model_executor.layers.quantization.online.fp8  # noqa: E402
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.fused_moe.config import (  # noqa: E402
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config  # noqa: E402
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading  # noqa: E402
from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized  # noqa: E402

Hopper._enum = PlatformEnum.CUDA
if DEVICE == "cpu":
    torch.accelerator.empty_cache = lambda: None  # torch raises where there is no accelerator


def experts_of(
    full: MoEWeights,
    top_k: int,
    tp: tuple[int, int] = (1, 0),
    ep: tuple[int, int] = (1, 0),
    dtype: torch.dtype = torch.bfloat16,
    moe_options: dict[str, Any] | None = None,
    parallel_options: dict[str, Any] | None = None,
    load_format: str = "auto",
    compressed: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """vLLM's routed experts of a rank, with its part of the weights loaded. `tp` and `ep` are pairs (size, rank).

    compressed: scheme of a compressed-tensors checkpoint (see `scheme`); None for vLLM's own fp8, or 16 bits.
    """
    if not is_workspace_manager_initialized():
        init_workspace_manager(torch.device(DEVICE))
    experts, hidden, inter = full.sizes
    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel.tp_size, parallel.tp_rank = tp
    parallel.ep_size, parallel.ep_rank = ep
    parallel.use_ep = ep[0] > 1
    for name, value in (parallel_options or {}).items():
        setattr(parallel, name, value)
    activation = {"swiglu": MoEActivation.SILU, "gelu_tanh": MoEActivation.GELU_TANH}[full.activation]
    whole = VllmConfig(load_config=LoadConfig(load_format=load_format))
    with set_current_vllm_config(whole), torch.device(DEVICE), ExitStack() as ranks:
        for module in ("vllm.distributed", "vllm.model_executor.layers.quantization.fp8"):
            name = f"{module}.get_tensor_model_parallel_world_size"
            ranks.enter_context(mock.patch(name, return_value=tp[0]))
        manager = ExpertMapManager(8192, top_k, experts, 0, None, parallel, "linear", False)
        config = FusedMoEConfig(
            num_experts=experts, experts_per_token=top_k, hidden_dim=hidden, intermediate_size=inter,
            num_local_experts=manager.local_num_experts, num_logical_experts=experts, activation=activation,
            device=DEVICE, routing_method=RoutingMethodType.Default, moe_parallel_config=parallel, in_dtype=dtype,
            has_bias=full.gate_up_bias is not None, max_capture_size=512, **(moe_options or {}),
        )  # fmt: skip
        quant: Any = None if full.gate_up_scale is None else Fp8Config(weight_block_size=[128, 128])
        if compressed is not None:
            quant = CompressedTensorsConfig.from_config(compressed)
        routed = RoutedExperts("layer", dtype, config, quant, expert_map_manager=manager, **options)
        record_metadata_for_reloading(routed)
        load(routed, full)
        routed.quant_method.process_weights_after_loading(routed)
    return routed


def scheme(weights: dict[str, Any], activations: dict[str, Any] | None, format: str) -> dict[str, Any]:
    """The quantization_config of a compressed-tensors checkpoint whose linear layers all have one scheme."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    if activations is not None:
        group["input_activations"] = {"symmetric": True, "dynamic": True, **activations}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": []}


def serve(monkeypatch: pytest.MonkeyPatch, builder: Builder | None = None) -> LoadedModel:
    """Has vLLM load another model from now on, whose layers the builder makes."""
    from ramp_moe_adapters.frameworks.vllm import calibrate

    found = LoadedModel(calibrate.ENGINE, builder or Builder("auto" if DEVICE == "cuda" else "h200"))
    monkeypatch.setattr(calibrate, "model", lambda: found)
    return found


def load(routed: Any, full: MoEWeights) -> None:
    """Load each projection of each expert by vLLM's loader, as from a checkpoint."""
    scale = "weight_scale_inv" if hasattr(routed, "w13_weight_scale_inv") else "weight_scale"
    weights = full.gate_up, full.down
    packed = hasattr(routed, "w13_weight_packed")
    if packed:
        weights = full.gate_up.view(torch.int32), full.down.view(torch.int32)
    given = {"weight_packed" if packed else "weight": weights, scale: (full.gate_up_scale, full.down_scale)}
    for kind, (gate_up, down) in given.items():
        if gate_up is None:
            continue
        for expert in range(len(gate_up)):
            gate, up = gate_up[expert].chunk(2)
            for shard, tensor in (("w1", gate), ("w3", up), ("w2", down[expert])):
                name = f"{'w2' if shard == 'w2' else 'w13'}_{kind}"
                parameter = getattr(routed, name)
                parameter.weight_loader(parameter, tensor, f"experts.{name}", shard, expert)
    if full.gate_up_bias is not None and full.down_bias is not None:
        for expert in range(len(full.gate_up_bias)):
            gate, up = full.gate_up_bias[expert].chunk(2)
            for shard, tensor in (("w1", gate), ("w3", up), ("w2", full.down_bias[expert])):
                parameter = routed.w2_bias if shard == "w2" else routed.w13_bias
                parameter.weight_loader(parameter, tensor, f"experts.{shard}_bias", shard, expert)


@contextmanager
def said_by_plugin(level: int = logging.INFO) -> Iterator[list[str]]:
    """The messages that the plugin logs through vLLM's logger from now on, at `level` or above."""
    found: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.ramp_moe")
    vllm_logger._print_warning_once.cache_clear()
    vllm_logger._print_info_once.cache_clear()
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(before)


@torch.inference_mode()
def run(routed: Any, batch: Batch) -> torch.Tensor:
    return routed.forward_modular(x=batch.hidden_states, topk_weights=batch.topk_weights, topk_ids=batch.topk_ids)
