"""SGLang's runner with ramp_moe's core, made as SGLang makes it, over weights that the tests' other cases draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ramp_moe.device import Batch, MoEWeights
from ramp_moe_adapters import sglang as plugin
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context


class Experts(torch.nn.Module):
    """What a FusedMoE is to its quantisation's method: parameters and a configuration."""

    def __init__(self, weights: MoEWeights, top_k: int, **options: Any) -> None:
        super().__init__()
        experts, hidden, inter = weights.down.shape
        fields = {"num_experts": experts, "num_local_experts": experts} | options
        self.moe_runner_config = MoeRunnerConfig(
            hidden_size=hidden,
            intermediate_size_per_partition=inter,
            top_k=top_k,
            num_fused_shared_experts=0,
            params_dtype=torch.bfloat16,
            layer=self,
            **fields,
        )
        quantised = weights.gate_up_scale is not None
        names = {"w13_weight": weights.gate_up, "w2_weight": weights.down}
        if quantised:
            names |= {"w13_weight_scale_inv": weights.gate_up_scale, "w2_weight_scale_inv": weights.down_scale}
            self.w13_input_scale = self.w2_input_scale = None
        for name, tensor in names.items():  # of their own: ramp_moe may release them
            self.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
        self.method: Any = (
            Fp8MoEMethod(Fp8Config(True, "dynamic", weight_block_size=[128, 128]))
            if quantised
            else UnquantizedFusedMoEMethod()
        )
        self.method.create_moe_runner(self, self.moe_runner_config)

    def forward(self, given: Batch) -> torch.Tensor:
        topk = StandardTopKOutput(given.topk_weights, given.topk_ids, torch.empty(0))
        dispatched = StandardDispatchOutput(given.hidden_states, None, topk)
        info = self.method.get_triton_quant_info(self)
        return self.method.runner.run(dispatched, info).hidden_states

    @property
    def core(self) -> plugin.RampRunnerCore:
        return self.method.runner.runner_core


@contextmanager
def selected(backend: str = plugin.NAME, **options: Any) -> Iterator[None]:
    """As in a process of a server that was started with `--moe-runner-backend` and these options."""
    plugin.register()
    HookRegistry.apply_hooks()  # with what it loads, `load_plugins` does so
    with get_context().override_server_args(moe_runner_backend=backend, **options):
        initialize_moe_config()
        yield
