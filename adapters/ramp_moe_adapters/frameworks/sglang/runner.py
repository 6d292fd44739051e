"""The runner of SGLang 0.5 that `--moe-runner-backend ramp_moe` selects: dispatched layers compute the experts.

Needs SGLang, to which the backend is a Triton backend: weights and routing are as for `--moe-runner-backend triton`.
SGLang's Triton runner computes what ramp_moe does not, and each reason is logged once. If the user selects another
backend, nothing changes.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.plugin import KernelError, MoEWeights
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.placeholder import Placeholder
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices
from sglang.srt.distributed.device_communicators.pynccl_allocator import (
    is_symmetric_memory_enabled,
    use_symmetric_memory,
)
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig, register_moe_runner_core
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.utils import MoeRunnerBackend, RegisteredMoeRunnerBackend, get_moe_runner_backend
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_flags, get_parallel

from ..engine_calibration import LoadedModel, in_place
from ..engine_errors import both_failed, why
from ..engine_weights import Parameters, place
from ..known_fields import new_parameters
from . import recorder
from .calibrate import Loading, ep_size
from .checks import ACTIVATIONS, check_batch, check_layer, refusal

if TYPE_CHECKING:
    from ramp_moe.runtime.layer import LayerRuntime
    from torch import Tensor

NAME = "ramp_moe"
TENSORS = {
    "w13_weight": "gate_up",
    "w2_weight": "down",
    "w13_scale": "gate_up_scale",
    "w2_scale": "down_scale",
    "b13": "gate_up_bias",
    "b2": "down_bias",
}
"""Fields of TritonMoeQuantInfo, with the fields of MoEWeights that they become."""
_RESOLVE = "sglang.srt.layers.moe.utils.resolve_moe_runner_backend"
_UNQUANTISED = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.create_moe_runner"
_logger = logging.getLogger("ramp_moe")
_builder = Builder()
"""Makes all layers of the process. They share profiles and workspaces."""
_said: set[str] = set()


@dataclass(frozen=True)
class Backend(RegisteredMoeRunnerBackend):  # type: ignore[misc]
    """The backend's answers to SGLang; they are those of Triton's backend."""

    def is_triton(self) -> bool:
        return True


BACKEND = Backend(NAME)


def install() -> bool:
    """Make `ramp_moe` a choice of `--moe-runner-backend`. Returns False if it is one already.

    Raises KernelError if this version of SGLang calls its runners with other arguments.
    """
    if NAME in MOE_RUNNER_BACKEND_CHOICES:
        return False
    known = inspect.signature(RampRunnerCore.run_from_dispatch).parameters
    if names := new_parameters(DispatchMoeRunnerCore.run_from_dispatch, known):
        raise KernelError(f"its runners are called with other arguments ({', '.join(names)})")
    register_moe_runner_core(NAME, RampRunnerCore)
    add_moe_runner_backend_choices([NAME])
    HookRegistry.register(_RESOLVE, _resolved, HookType.AFTER)
    HookRegistry.register(_UNQUANTISED, _created, HookType.AFTER)
    return True


def _resolved(found: Any, *_: Any) -> Any:
    """Replace the backend that SGLang's options name: by ours, or by Triton's if ramp_moe may compute no layer.

    None keeps what SGLang found.
    """
    if found.value != NAME:
        return None
    if reason := refusal():
        _say(f"{reason}: every layer is left to SGLang's Triton runner")
        return MoeRunnerBackend.TRITON
    return BACKEND


def _created(_: None, method: Any, layer: Any, config: MoeRunnerConfig) -> None:
    """Give unquantised experts our runner: for any Triton backend, SGLang gives them Triton's."""
    if get_moe_runner_backend() == BACKEND and method.runner.runner_backend is MoeRunnerBackend.TRITON:
        method.runner = MoeRunner(BACKEND, config)


class RampRunnerCore(DispatchMoeRunnerCore):  # type: ignore[misc]
    """Computes one layer's experts. `make` makes the LayerRuntime from the weights that SGLang has loaded.

    Without `make`, the first run does, from the weights that SGLang has then.

    SGLang's parameters then refer to that layer's weights, so there is one copy, and later loads reach the layer. If a
    batch fails, SGLang's Triton runner computes it.
    """

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self._stock = MoeRunner(MoeRunnerBackend.TRITON, config)
        self._parameters: Parameters | None = None
        self._refused: object = None
        """Places of the weights for which making a layer failed."""
        self._failed: set[int] = set()
        """Batch sizes that failed. Their graphs are captured with SGLang's runner."""
        self._model: LoadedModel | None = None
        """The model in which the layer was made; None if its first run made it."""
        self._keeps: Callable[[int], bool] | None = None
        """Whether SGLang's runner computes batches of this size, since nothing is faster; None: it keeps none."""

    @property
    def made(self) -> bool:
        """True once there is a layer."""
        return self._parameters is not None

    @property
    def layer(self) -> LayerRuntime:
        """The layer that SGLang's parameters refer to, once it is made."""
        assert self._parameters is not None
        return self._parameters.layer

    def make(self, info: Any, top_k: int, loading: Loading) -> None:
        """Make the layer of SGLang's parameters; each token visits top_k experts.

        loading: the model, of which the first layer of each kind is measured. If the layer cannot be made, SGLang's
        runner computes it, and the log says why.
        """
        model, said = loading.model, len(_builder.notes)
        try:
            new = self._parameters is None
            found = self._current(top_k, info, lambda w: model.layer(loading.layer(self.config, info, w, top_k)))
        except Exception as e:  # whatever a kernel raises must not end the server
            with suppress(Exception):  # another layer than is known has no kind
                model.refuse(loading.kind(self.config, info, top_k))
            _say(f"{why(e)}: left to SGLang's Triton runner")
            return
        if new and found is not None:
            self._model, times = model, model.calibrated(found.layer)
            if times is not None and times.keeps_any:
                self._keeps = cache(times.keeps)
            for note in _builder.notes[said:]:  # a missing profile matters less if the layer was measured here
                (_say if times is None else _logger.info)(note)

    def report(self) -> None:
        """Log what computes each batch size, unless a layer of this kind has."""
        if self._model is not None:
            self._model.report(self.layer)

    @property
    def runner_backend(self) -> Backend:
        return BACKEND

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig, hooks: Any = None
    ) -> Any:
        """Compute the weighted sum of this rank's experts, `[T, H]`.

        dispatch_output: hidden states `[T, H]` bf16 or fp16, ids `[T, k]` of this rank's experts, and routing weights
            float32 `[T, k]`. Ids of -1 are skipped.
        quant_info: the weights, with what SGLang says of their quantisation.

        Raises KernelError for LoRA's hooks, if SGLang's runner fails after ramp_moe has, and if a weight update has
        failed.
        """
        if hooks is not None:
            raise KernelError("ramp_moe's experts run no LoRA; select another --moe-runner-backend")
        tokens = len(dispatch_output.hidden_states)
        if tokens in self._failed and _capturing(dispatch_output.hidden_states):
            return self._by_sglang(dispatch_output, quant_info)
        try:
            check_batch(dispatch_output)
            top_k = dispatch_output.topk_output.topk_ids.shape[1]
            parameters = self._current(top_k, quant_info, partial(self._unmeasured, top_k))
            if parameters is not None and recorder.recording.current is not None:
                ids, experts = dispatch_output.topk_output.topk_ids, parameters.layer.shape.num_experts
                recorder.recording.current.sample(id(self), ids, experts)
            if self._keeps is not None and self._keeps(tokens):
                parameters = None
            if parameters is not None:
                return StandardCombineInput(hidden_states=self._run(parameters.layer, dispatch_output))
        except Exception as e:  # whatever a kernel raises must not end the server
            self._failed.add(tokens)
            _say(f"{why(e)}: left to SGLang's Triton runner")
            try:
                return self._by_sglang(dispatch_output, quant_info)
            except Exception as other:
                raise both_failed(e, "SGLang's Triton runner", other) from e
        return self._by_sglang(dispatch_output, quant_info)

    def _by_sglang(self, given: Any, info: Any) -> Any:
        """Run SGLang's Triton runner, on a copy in SGLang's order of weights that ramp_moe has reordered."""
        if self._parameters is None:
            return self._stock.run(given, info)
        self._parameters.check()
        if any(isinstance(getattr(info, name, None), Placeholder) for name in TENSORS):
            values = self._parameters.values()
            info = replace(info, **{name: getattr(values, field) for name, field in TENSORS.items()})
        return self._stock.run(given, info)

    def _current(
        self, top_k: int, info: TritonMoeQuantInfo, make: Callable[[MoEWeights], LayerRuntime]
    ) -> Parameters | None:
        """The layer of SGLang's parameters of now, None if it was refused before; each token visits top_k experts.
        `make` makes it if there is none. Raises RampMoEError with the reason if it is refused now."""
        tensors = {field: t for name, field in TENSORS.items() if (t := getattr(info, name)) is not None}
        if self._parameters is not None:
            self._parameters.meet(tensors)
            return self._parameters
        places = [place(t) for t in tensors.values()]
        if places != self._refused:
            if _capturing(info.w13_weight):
                raise KernelError("the layer first ran in the capture of a CUDA graph")
            self._refused = places
            check_layer(self.config, info)
            detached = {field: t.detach() for field, t in tensors.items()}
            weights = MoEWeights(**detached, activation=ACTIVATIONS[self.config.activation])
            self._parameters = Parameters(self, make(weights), tensors)
        return self._parameters

    def _unmeasured(self, top_k: int, weights: MoEWeights) -> LayerRuntime:
        said = len(_builder.notes)
        layer = _builder.layer(weights, top_k, ep_size(self.config), partial(in_place, weights.shape(top_k)))
        layer.host_sync_us = math.inf  # the host would wait for the device, in every layer
        for note in _builder.notes[said:]:
            _say(note)
        return layer

    def _run(self, layer: LayerRuntime, given: StandardDispatchOutput) -> Tensor:
        x, topk = given.hidden_states.contiguous(), given.topk_output
        weights = topk.topk_weights.float().contiguous()
        if self.config.routed_scaling_factor is not None:
            weights = weights * self.config.routed_scaling_factor
        if len(x) and _before_capture(x):
            layer.warm_up(len(x), x.dtype)
            layer.ready(len(x), x.dtype)
        return layer(x, topk.topk_ids.int().contiguous(), weights, _output(x))


def _output(x: Tensor) -> Tensor:
    """An empty output like x `[T, H]`, in symmetric memory if SGLang's all-reduce wants it there."""
    symmetric = is_symmetric_memory_enabled() and is_allocation_symmetric()
    with use_symmetric_memory(get_parallel().tp_group) if symmetric else nullcontext():
        return torch.empty_like(x)


def _before_capture(x: Tensor) -> bool:
    """Whether this run precedes a capture: SGLang runs a batch twice before it captures it."""
    if not x.is_cuda or _capturing(x):
        return False
    return bool(get_is_capture_mode() or get_flags().dp.capturing_prefill_graph)


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _say(line: str) -> None:
    """Log a warning, once per process."""
    if line not in _said:
        _said.add(line)
        _logger.warning("%s", line)
