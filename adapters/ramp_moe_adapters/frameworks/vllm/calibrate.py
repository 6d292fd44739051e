"""Describes vLLM's layers to `engine_calibration`, which measures them against vLLM's own experts. Needs vLLM."""

from __future__ import annotations

import os
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import Batch, MoEWeights
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

from ..engine_calibration import Engine, LoadedModel
from ..engine_timer import LoadedLayer, Own
from .experts import local_ids, logger
from .stock import Stock

if TYPE_CHECKING:
    from torch import Tensor

FORM = "w13_weight", "w13_weight_packed", "w13_weight_scale_inv", "w13_weight_scale", "w13_bias", "w2_bias"
"""Parameters of vLLM's by which layers of one size differ."""
_models: dict[int, LoadedModel] = {}
"""By the identity of vLLM's configuration, for as long as that lives."""


def model() -> LoadedModel:
    """The model that vLLM loads now: all layers that are made under one of its configurations."""
    config = get_current_vllm_config_or_none()
    if id(config) not in _models:
        _models[id(config)] = LoadedModel(ENGINE)
        if config is not None:
            weakref.finalize(config, _models.pop, id(config), None)
    return _models[id(config)]


def layer_of(
    module: Any, moe: Any, weights: MoEWeights, ep_size: int, like: frozenset[str] | None = None
) -> LoadedLayer:
    """Describe a module of vLLM, whose weights are loaded. moe: its configuration.

    like: see LoadedLayer; None if vLLM's own Triton experts read the weights as they were loaded, and are timed.
    """
    captured, most = _sizes(moe)
    here = local_ids(module)

    def local(ids: Tensor) -> Tensor:
        return ids if here is None else here[ids]

    def own() -> Own:
        stock = Stock(moe, weights)
        spaces = lru_cache(maxsize=1)(lambda n: stock.workspaces(n, module.top_k, module.activation, moe.in_dtype))

        def run(batch: Batch, out: Tensor) -> None:
            stock.run(
                out, batch.hidden_states, batch.topk_weights, batch.topk_ids, module.activation, moe.num_experts,
                module.expert_map, *spaces(batch.num_tokens),
            )  # fmt: skip

        return run

    return LoadedLayer(
        weights, module.top_k, ep_size, moe.in_dtype, kind_of(module, moe), captured, most, local,
        own if like is None else None, {"tuned": os.environ.get("VLLM_TUNED_CONFIG_FOLDER", "")}, like or frozenset(),
    )  # fmt: skip


def kind_of(module: Any, moe: Any) -> tuple[object, ...]:
    """What ranks that agree have in common of a layer: all that makes it another kind of layer, measured apart."""
    sizes = moe.num_experts, moe.experts_per_token, moe.hidden_dim, moe.intermediate_size_per_partition
    # Without the first size: ranks may have unlike numbers of experts.
    forms = (None if t is None else (str(t.dtype), *t.shape[1:]) for t in map(module._parameters.get, FORM))
    return *sizes, str(moe.in_dtype), str(moe.activation), *_sizes(moe), *forms


def _sizes(moe: Any) -> tuple[tuple[int, ...], int]:
    """Numbers of tokens of the CUDA graphs, ascending, and of the largest batch."""
    ranks = moe.dp_size * moe.pcp_size
    config = get_current_vllm_config_or_none()
    sizes = () if config is None else config.compilation_config.cudagraph_capture_sizes or ()
    return tuple(sorted(n * ranks for n in sizes)), moe.max_num_tokens * ranks


def _group() -> Any:
    """vLLM's group of tensor-parallel ranks; None for a rank alone."""
    group = get_tp_group() if model_parallel_is_initialized() else None
    return None if group is None or group.world_size == 1 else group


def _say(line: str) -> None:
    logger.info("ramp_moe: %s", line)


ENGINE = Engine("vLLM", lambda: _group(), _say, adapter="vllm_triton")
