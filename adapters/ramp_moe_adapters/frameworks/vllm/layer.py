"""Replaces vLLM 0.33's class of routed experts, through vLLM's registry of replaceable layers. Needs vLLM."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from ramp_moe.plugin import KernelError
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat, FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.offloader import NoopOffloader, get_offloader

from ..engine_errors import why
from ..known_fields import misfit, misfit_arguments, new_parameters
from .experts import RampExperts
from .fields import CONSTRUCTOR, LAYER, PARALLEL
from .method import leave
from .methods import METHODS

NAME = "RoutedExperts"
"""Name of the class in vLLM's registry."""
CHECKPOINTS = {
    *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor"),
    *("runai_streamer", "mistral", "pt", "npcache", "dummy"),
}
"""Load formats whose weights are as published. In others they may be converted for the experts that vLLM would take."""


class DispatchedRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's routed experts, with a method of ours if ramp_moe can compute the layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        given = inspect.signature(RoutedExperts.__init__).bind(self, *args, **options).arguments
        reason = misfit_arguments(RoutedExperts.__init__, {k: v for k, v in given.items() if k != "self"}, CONSTRUCTOR)
        object.__setattr__(self, "_unknown_argument", reason)  # before nn.Module can take attributes
        super().__init__(*args, **options)

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        try:
            if reason := self._misfit(method, moe_config):
                raise KernelError(reason)
            ours = METHODS[type(method)].of(method, self, moe_config)
        except Exception as e:  # also a configuration that is not as expected: vLLM's method takes the layer
            leave(why(e))
            return method
        ours.supports_pre_processed_weights = False  # no one else has weights in the order of rows that the layer uses
        return ours

    def _misfit(self, method: Any, moe: Any) -> str | None:
        """Why vLLM computes this layer itself; None if ramp_moe may."""
        if (ours := METHODS.get(type(method))) is None:
            return f"{type(method).__name__} is none of {', '.join(sorted(known.__name__ for known in METHODS))}"
        if moe.moe_backend != "auto":
            return f"the backend {moe.moe_backend} was asked for"
        if moe.in_dtype not in (torch.bfloat16, torch.float16):
            return f"activations are {moe.in_dtype}, not bf16 or fp16"
        if (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta) != (None, None, None):
            return "the activation has a limit, a slope or an offset of its own"
        if self.expert_map_manager.num_fused_shared_experts:
            return "shared experts are among the routed ones"
        config = get_current_vllm_config()
        if config.parallel_config.enable_elastic_ep:
            return "the ranks may change (elastic expert parallelism)"
        if config.load_config.load_format not in CHECKPOINTS:
            return f"weights that are loaded as {config.load_config.load_format} may have been converted already"
        if not isinstance(get_offloader(), NoopOffloader):
            return "weights are offloaded"
        standard = FusedMoEActivationFormat.Standard
        unsupported: str | None = RampExperts.is_supported_config(RampExperts, moe, *ours.keys(method), standard)[1]
        return unsupported or self._unknown_argument or misfit(moe, LAYER) or misfit(moe.moe_parallel_config, PARALLEL)


def install() -> None:
    """Have vLLM make our routed experts instead of its own.

    vLLM is left alone, with a warning, if another plugin has replaced them, or if it calls experts with arguments that
    ours do not take.
    """
    other = op_registry_oot.get(NAME)
    if other is DispatchedRoutedExperts:
        return
    if other is not None:
        leave(f"another plugin has replaced {NAME} by {other.__module__}.{other.__qualname__}")
    elif names := new_parameters(FusedMoEExpertsModular.apply, inspect.signature(RampExperts.apply).parameters):
        leave(f"this version's experts are called with other arguments ({', '.join(names)})")
    else:
        PluggableLayer.register_oot(name=NAME)(DispatchedRoutedExperts)
