"""SGLang's FusedMoE, made as a server does with `--moe-runner-backend ramp_moe`, over random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks.sglang import model as whole
from ramp_moe_adapters.frameworks.sglang import runner as plugin
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_parallel


@contextmanager
def selected(backend: str = plugin.NAME, ranks: int = 1, rank: int = 0, **options: Any) -> Iterator[None]:
    """Act as one process of a server that was started with `--moe-runner-backend` and these options. The ranks share
    the experts. The group in which they communicate is replaced by its size."""
    whole.install()
    HookRegistry.apply_hooks()  # with what it loads, `load_plugins` does so
    group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
    sizes = {"tp_size": ranks, "attn_tp_size": ranks, "moe_ep_size": ranks, "moe_tp_size": 1}
    places = {"tp_rank": rank, "moe_ep_rank": rank, "moe_tp_rank": 0, "tp_group": group}
    with get_context().override_server_args(moe_runner_backend=backend, **options):
        initialize_moe_config()
        with get_parallel().override(**sizes, **places):
            yield


class Experts:
    """A FusedMoE that holds copies of a rank's weights, since ramp_moe may release SGLang's tensors."""

    def __init__(self, weights: MoEWeights, top_k: int, **options: Any) -> None:
        experts, hidden, inter = weights.down.shape
        quantised = weights.gate_up_scale is not None
        with torch.device(weights.down.device):
            self.layer: Any = FusedMoE(
                experts * get_parallel().moe_ep_size,
                hidden,
                inter,
                layer_id=0,
                top_k=top_k,
                params_dtype=weights.down.dtype if not quantised else torch.bfloat16,
                quant_config=Fp8Config(True, "dynamic", weight_block_size=[128, 128]) if quantised else None,
                **options,
            )
        self.layer.w13_weight.data.copy_(weights.gate_up)
        self.layer.w2_weight.data.copy_(weights.down)
        if quantised:
            self.layer.w13_weight_scale_inv.data.copy_(weights.gate_up_scale)
            self.layer.w2_weight_scale_inv.data.copy_(weights.down_scale)
        self.layer.quant_method.process_weights_after_loading(self.layer)

    def __call__(self, given: Batch) -> torch.Tensor:
        """Compute a batch, whose ids number the experts of all ranks."""
        topk = StandardTopKOutput(given.topk_weights, given.topk_ids, torch.empty(0))
        if given.hidden_states.is_cuda:
            return self.layer(given.hidden_states, topk)
        # What it does on a GPU: on the CPU, its methods would not ask the runner.
        method = self.layer.quant_method
        dispatched = self.layer.dispatcher.dispatch(given.hidden_states, topk)
        return method.runner.run(dispatched, method.get_triton_quant_info(self.layer)).hidden_states

    @property
    def runner(self) -> Any:
        return self.layer.quant_method.runner
