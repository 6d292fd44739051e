"""The runner of SGLang 0.5 that `--moe-runner-backend ramp_moe` selects: experts computed by dispatched layers. Needs
SGLang.

To SGLang the backend is a Triton backend: weights lie, and layers are routed, as for `--moe-runner-backend triton`,
whose runner computes what ramp_moe does not, each reason logged once. Nothing happens where the user selects another
backend.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.device.build import Builder
from ramp_moe.device.contract import MoEWeights
from ramp_moe.device.routed import is_held
from ramp_moe.errors import KernelError, RampMoEError
from ramp_moe.shapes import SCALE_BLOCK
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices
from sglang.srt.distributed.device_communicators.pynccl_allocator import (
    is_symmetric_memory_enabled,
    use_symmetric_memory,
)
from sglang.srt.environ import envs
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig, register_moe_runner_core
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import MoeRunnerBackend, RegisteredMoeRunnerBackend, get_moe_runner_backend
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec, get_flags, get_lora, get_parallel

if TYPE_CHECKING:
    from ramp_moe.device import MoELayer
    from torch import Tensor

NAME = "ramp_moe"
_ACTIVATIONS = {"silu": "swiglu", "gelu_tanh": "gelu_tanh"}
_RESOLVE = "sglang.srt.layers.moe.utils.resolve_moe_runner_backend"
_UNQUANTISED = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.create_moe_runner"
_logger = logging.getLogger("ramp_moe")
_builder = Builder()
"""Of all layers of the process: they share profiles and workspaces."""
_said: set[str] = set()


@dataclass(frozen=True)
class Backend(RegisteredMoeRunnerBackend):  # type: ignore[misc]
    """What SGLang asks about a backend; answers as Triton's does."""

    def is_triton(self) -> bool:
        return True


BACKEND = Backend(NAME)


def install() -> None:
    """Make `ramp_moe` a choice of `--moe-runner-backend`. Again, it does nothing."""
    if NAME in MOE_RUNNER_BACKEND_CHOICES:
        return
    register_moe_runner_core(NAME, RampRunnerCore)
    add_moe_runner_backend_choices([NAME])
    HookRegistry.register(_RESOLVE, _resolved, HookType.AFTER)
    HookRegistry.register(_UNQUANTISED, _created, HookType.AFTER)


def _resolved(found: Any, *_: Any) -> Any:
    """SGLang's options, once they are read: the name's backend, or Triton's where the whole model must be computed by
    that."""
    if found.value != NAME:
        return None
    if reason := _refusal():
        _say(f"{reason}: every layer is left to SGLang's Triton runner")
        return MoeRunnerBackend.TRITON
    return BACKEND


def _created(_: None, method: Any, layer: Any, config: MoeRunnerConfig) -> None:
    """Unquantised experts, which name Triton's runner themselves, whatever backend like Triton's was asked for."""
    if get_moe_runner_backend() == BACKEND and method.runner.runner_backend is MoeRunnerBackend.TRITON:
        method.runner = MoeRunner(BACKEND, config)


def _refusal() -> str | None:
    """Why no layer of the model may be ramp_moe's."""
    options, lora = get_exec(), get_lora()
    reasons = {
        "LoRA changes what is between the two projections": lora.enable_lora or lora.lora_paths,
        "EPLB moves experts between ranks": options.moe.enable_eplb,
        "experts are paged": options.moe.enable_paged_experts,
        "weights are offloaded": options.offload.cpu_offload_gb or options.offload.offload_group_size > 0,
        "torch.compile is to see the experts' weights": options.graph.enable_torch_compile,
        "a choice by the whole batch is not deterministic": options.deterministic.enable_deterministic_inference,
        "CUDA graphs that share executables cannot switch kernels": envs.SGLANG_ENABLE_CUDA_GRAPH_DEDUP.get(),
        "the dispatcher of another a2a backend is not read": options.moe.moe_a2a_backend != "none",
        "weights are fetched from other ranks (DWDP)": get_parallel().dwdp_size > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class RampRunnerCore(DispatchMoeRunnerCore):  # type: ignore[misc]
    """One layer's experts. Its MoELayer is made when it first runs, of the weights as SGLang has them then.

    Weights that the layer holds in another order of rows are released: SGLang's parameter is empty from then on, so
    that there is one copy, and loading weights into it is an error.
    """

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self._stock = MoeRunner(MoeRunnerBackend.TRITON, config)
        self._layer: MoELayer | None = None
        self._weights: tuple[int, int] | None = None
        """Addresses of the weights that the layer, or the refusal to make one, is of."""

    @property
    def runner_backend(self) -> Backend:
        return BACKEND

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig, hooks: Any = None
    ) -> Any:
        """The weighted sum of this rank's experts `[T, H]` of hidden states `[T, H]` bf16 or fp16, ids `[T, k]` of this
        rank's experts, where -1 is skipped, and their weights float32 `[T, k]`. Raises RampMoEError where ramp_moe does
        not compute the batch, and SGLang cannot, since weights are released."""
        try:
            _check_batch(dispatch_output)
            layer = self._layer_of(dispatch_output, quant_info)
            if layer is not None:
                return StandardCombineInput(hidden_states=self._run(layer, dispatch_output))
        except RampMoEError as e:
            if _released(quant_info):
                raise
            _say(f"{e}: left to SGLang's Triton runner")
        if _released(quant_info):
            raise KernelError("SGLang has no weights of this layer: ramp_moe had moved them, and others came since")
        return self._stock.run(dispatch_output, quant_info)

    def _layer_of(self, given: Any, info: Any) -> MoELayer | None:
        """None where it was refused before. Raises RampMoEError with the reason where it is now."""
        if _addresses(info) != self._weights:
            if info.w13_weight.is_cuda and torch.cuda.is_current_stream_capturing():
                raise KernelError("the layer first ran in the capture of a CUDA graph")
            self._layer, self._weights = None, _addresses(info)
            _check(self.config, info)
            top_k, ranks = given.topk_output.topk_ids.shape[1], _ranks(self.config)
            self._layer = _made(info, _ACTIVATIONS[self.config.activation], top_k, ranks)
            self._weights = _addresses(info)
        return self._layer

    def _run(self, layer: MoELayer, given: StandardDispatchOutput) -> Tensor:
        x, topk = given.hidden_states.contiguous(), given.topk_output
        weights = topk.topk_weights.float().contiguous()
        if self.config.routed_scaling_factor is not None:
            weights = weights * self.config.routed_scaling_factor
        if len(x) and _before_capture(x):
            layer.warm_up(len(x), x.dtype)
            layer.ready(len(x), x.dtype)
        return layer(x, topk.topk_ids.int().contiguous(), weights, _output(x))


def _released(info: Any) -> bool:
    return not (info.w13_weight.numel() and info.w2_weight.numel())


def _ranks(config: MoeRunnerConfig) -> int:
    """Over how many the experts are spread."""
    known = config.num_experts and config.num_local_experts
    return int(config.num_experts // config.num_local_experts) if known else 1


def _output(x: Tensor) -> Tensor:
    """Like x `[T, H]`; in symmetric memory where SGLang's all-reduce wants it there."""
    symmetric = is_symmetric_memory_enabled() and is_allocation_symmetric()
    with use_symmetric_memory(get_parallel().tp_group) if symmetric else nullcontext():
        return torch.empty_like(x)


def _before_capture(x: Tensor) -> bool:
    """Whether SGLang runs what it is about to capture, as it does twice."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    return bool(get_is_capture_mode() or get_flags().dp.capturing_prefill_graph)


def _check_batch(given: Any) -> None:
    """Raises KernelError with the reason why ramp_moe does not compute a batch."""
    if not given.format.is_standard() or not TopKOutputChecker.format_is_standard(given.topk_output):
        raise KernelError("tokens are dispatched or routed in another format than SGLang's standard")
    if given.hidden_states_scale is not None:
        raise KernelError("hidden states come quantised")


def _check(config: MoeRunnerConfig, info: Any) -> None:
    """Raises KernelError with the reason why ramp_moe does not compute a layer."""
    limits = (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
    if config.activation not in _ACTIVATIONS or not config.is_gated or any(limit is not None for limit in limits):
        raise KernelError(f"the activation is {config.activation}, gated {config.is_gated}, limits {limits}")
    if config.no_combine or config.apply_router_weight_on_input:
        raise KernelError("router weights are not what each expert's output is multiplied by before the sum")
    if not isinstance(info, TritonMoeQuantInfo) or info.fuse_swiglu_interleaved:
        raise KernelError("the weights are in another form than gate rows before up rows")
    other = (info.use_mxfp8, info.use_int8_w8a8, info.use_int8_w8a16, info.use_int4_w4a16, info.per_channel_quant)
    if any(other) or (info.use_fp8_w8a8 and list(info.block_shape or ()) != [SCALE_BLOCK, SCALE_BLOCK]):
        raise KernelError("the experts are quantised otherwise than to fp8 with scales of [128, 128] blocks")
    if info.a13_scale is not None or info.a2_scale is not None:
        raise KernelError("fp8 activations have static scales")


def _made(info: TritonMoeQuantInfo, activation: str, top_k: int, ranks: int) -> MoELayer:
    """A layer of SGLang's weights. What it holds in another order of rows is released."""

    def of(t: Any) -> Any:
        return None if t is None else t.detach()

    parameters = (info.w13_weight, info.w2_weight)
    gate_up, down = map(of, parameters)
    scales, biases = (of(info.w13_scale), of(info.w2_scale)), (of(info.b13), of(info.b2))
    layer = _layer(MoEWeights(gate_up, down, *scales, *biases, activation), top_k, ranks)
    for parameter in parameters:
        if not is_held(parameter, layer):
            parameter.data = parameter.data.new_empty(0)
    return layer


def _layer(weights: MoEWeights, top_k: int, ranks: int) -> MoELayer:
    said = len(_builder.notes)
    layer = _builder.layer(weights, top_k, ranks)
    for note in _builder.notes[said:]:
        _say(note)
    return layer


def _addresses(info: Any) -> tuple[int, int]:
    return info.w13_weight.data_ptr(), info.w2_weight.data_ptr()


def _say(line: str) -> None:
    """Once in a process."""
    if line not in _said:
        _said.add(line)
        _logger.warning("%s", line)
