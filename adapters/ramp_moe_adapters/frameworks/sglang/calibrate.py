"""Describes SGLang's layers to `engine_calibration`, which measures them against SGLang's own runner. Needs SGLang."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.plugin import Batch, MoEWeights
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule

from ..engine_calibration import Engine, LoadedModel
from ..engine_errors import why
from ..engine_timer import LoadedLayer, Own

if TYPE_CHECKING:
    from torch import Tensor

FORM = "w13_weight", "w13_scale", "b13", "b2"
"""Tensors of TritonMoeQuantInfo by which layers of one size differ."""
_logger = logging.getLogger("ramp_moe")


@dataclass(frozen=True)
class Loading:
    """A model that SGLang has loaded. dtype: of hidden states. captured and most: see LoadedLayer."""

    model: LoadedModel
    dtype: torch.dtype
    captured: tuple[int, ...]
    most: int

    def layer(self, config: MoeRunnerConfig, info: TritonMoeQuantInfo, weights: MoEWeights, top_k: int) -> LoadedLayer:
        """Describe one of its layers. info: SGLang's form of the weights."""
        ranks, here = ep_size(config), len(weights.down)
        first = get_parallel().moe_ep_rank * here if ranks > 1 else 0

        def local(ids: Tensor) -> Tensor:
            return ids if ranks == 1 else torch.where((ids >= first) & (ids < first + here), ids - first, -1)

        def own() -> Own:
            # In place it would overwrite the batch that is timed next.
            runner, none = (
                MoeRunner(MoeRunnerBackend.TRITON, replace(config, inplace=False)),
                torch.empty(0, dtype=torch.float32, device=weights.down.device),
            )

            def run(batch: Batch, out: Tensor) -> None:
                topk = StandardTopKOutput(batch.topk_weights, local(batch.topk_ids), none)
                runner.run(StandardDispatchOutput(batch.hidden_states, None, topk), info)

            return run

        kind, tuned = self.kind(config, info, top_k), {"tuned": os.environ.get("SGLANG_MOE_CONFIG_DIR", "")}
        return LoadedLayer(weights, top_k, ranks, self.dtype, kind, self.captured, self.most, local, own, tuned)

    def kind(self, config: MoeRunnerConfig, info: Any, top_k: int) -> tuple[object, ...]:
        """What ranks that agree have in common of a layer."""
        forms = (None if t is None else (str(t.dtype), *t.shape) for t in (getattr(info, name, None) for name in FORM))
        sizes = self.captured, self.most
        return config.num_experts, top_k, config.activation, str(self.dtype), ep_size(config), *sizes, *forms


def loading(runner: Any, builder: Any) -> Loading:
    """The model of one of SGLang's model runners. builder: makes its layers."""
    return Loading(LoadedModel(ENGINE, builder), runner.model_config.dtype, _captured(runner), _most_tokens())


def ep_size(config: MoeRunnerConfig) -> int:
    """Number of ranks over which the experts are spread."""
    known = config.num_experts and config.num_local_experts
    return int(config.num_experts // config.num_local_experts) if known else 1


def _captured(runner: Any) -> tuple[int, ...]:
    """Numbers of tokens of the CUDA graphs that SGLang is to capture, ascending; none if it does not say."""
    try:
        graphs, found = get_exec().graph.cuda_graph_config, set[int]()
        if graphs.prefill.backend != Backend.DISABLED:
            found |= {*(graphs.prefill.bs or ())}
        if graphs.decode.backend != Backend.DISABLED:
            each = runner.decode_num_tokens_per_req()
            found |= {each * n for n in graphs.decode.bs or ()}
        return tuple(sorted(found))
    except Exception as e:  # only the report and the bound of bodies need it
        _say(f"the sizes of SGLang's graphs are not known: {why(e)}")
        return ()


def _most_tokens() -> int:
    """The most tokens that SGLang gives a layer at a time."""
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size
    return int(chunk if chunk and chunk > 0 else schedule.max_prefill_tokens)


def _group() -> Any:
    """SGLang's group of tensor-parallel ranks; None for a rank alone."""
    group = get_parallel().tp_group
    return None if group is None or group.world_size == 1 else group


def _say(line: str) -> None:
    _logger.info("ramp_moe: %s", line)


ENGINE = Engine("SGLang", lambda: _group(), _say)
