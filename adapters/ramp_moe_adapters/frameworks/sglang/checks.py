"""Checks which servers, layers and batches of SGLang ramp_moe computes. Needs SGLang."""

from __future__ import annotations

from typing import Any

from ramp_moe.plugin import SCALE_BLOCK, KernelError
from sglang.srt.environ import envs
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.runtime_context import get_exec, get_lora, get_parallel

from ..known_fields import misfit
from .fields import BATCH, ROUTING, RUNNER, WEIGHTS

ACTIVATIONS = {"silu": "swiglu", "gelu_tanh": "gelu_tanh"}


def refusal() -> str | None:
    """Why ramp_moe may compute no layer of the model; None if it may."""
    options, lora = get_exec(), get_lora()
    reasons = {
        "LoRA changes the values between the two projections": lora.enable_lora or lora.lora_paths,
        "EPLB moves experts between ranks": options.moe.enable_eplb,
        "experts are paged": options.moe.enable_paged_experts,
        "weights are offloaded": options.offload.cpu_offload_gb or options.offload.offload_group_size > 0,
        "torch.compile needs to see the experts' weights": options.graph.enable_torch_compile,
        "a choice by the whole batch is not deterministic": options.deterministic.enable_deterministic_inference,
        "CUDA graphs that share executables cannot switch kernels": envs.SGLANG_ENABLE_CUDA_GRAPH_DEDUP.get(),
        "the dispatcher of another a2a backend is not supported": options.moe.moe_a2a_backend != "none",
        "weights are fetched from other ranks (DWDP)": get_parallel().dwdp_size > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_batch(given: Any) -> None:
    """Raises KernelError, with the reason, if ramp_moe does not compute a batch."""
    if not given.format.is_standard() or not TopKOutputChecker.format_is_standard(given.topk_output):
        raise KernelError("tokens are dispatched or routed in another format than SGLang's standard")
    if given.hidden_states_scale is not None:
        raise KernelError("hidden states come quantised")
    if reason := misfit(given, BATCH) or misfit(given.topk_output, ROUTING):
        raise KernelError(reason)


def check_layer(config: MoeRunnerConfig, info: Any) -> None:
    """Raises KernelError, with the reason, if ramp_moe does not compute a layer."""
    limits = (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
    if config.activation not in ACTIVATIONS or not config.is_gated or any(limit is not None for limit in limits):
        raise KernelError(f"the activation is {config.activation}, gated {config.is_gated}, limits {limits}")
    if config.no_combine or config.apply_router_weight_on_input:
        raise KernelError("router weights are not applied to each expert's output before the sum")
    if not isinstance(info, TritonMoeQuantInfo) or info.fuse_swiglu_interleaved:
        raise KernelError("the weights are in another form than gate rows before up rows")
    other = (info.use_mxfp8, info.use_int8_w8a8, info.use_int8_w8a16, info.use_int4_w4a16, info.per_channel_quant)
    if any(other) or (info.use_fp8_w8a8 and list(info.block_shape or ()) != [SCALE_BLOCK, SCALE_BLOCK]):
        raise KernelError("the experts are quantised in another way than fp8 with scales of [128, 128] blocks")
    if info.a13_scale is not None or info.a2_scale is not None:
        raise KernelError("fp8 activations have static scales")
    if reason := misfit(config, RUNNER) or misfit(info, WEIGHTS):
        raise KernelError(reason)
