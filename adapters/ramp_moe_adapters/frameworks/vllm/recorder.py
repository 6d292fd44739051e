"""Records what vLLM's layers route (see `engine_recorder`): when it may begin, and by which ranks. Needs vLLM."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_dp_group, get_pp_group, get_tp_group, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from ..engine_recorder import Recording

logger = init_logger("vllm.ramp_moe")
recording = Recording("vLLM", lambda: _rank(), lambda: _started(), logger.info)
captures = False
"""Whether the server captures CUDA graphs when it starts."""


def take(moe: Any) -> None:
    """Note that a layer of this configuration was loaded, and begin to record if RAMP_MOE_RECORD names a file."""
    global captures
    captures = captures or bool(moe.max_capture_size)
    recording.begin()


def _rank() -> str | None:
    """Suffix of this rank's file name; None if another rank records what this one routes.

    Among ranks that route the same batches, the first records. Each pipeline-parallel rank writes its own file.
    """
    if not model_parallel_is_initialized():
        return ""
    if get_tp_group().rank_in_group or get_dp_group().rank_in_group:
        return None
    stage = get_pp_group().rank_in_group
    return f".stage{stage}" if stage else ""


def _started() -> bool:
    """Whether vLLM has captured its graphs. No other thread may use the GPU before.

    vLLM locks its workspaces once all graphs are captured.
    """
    return not captures or bool(is_workspace_manager_initialized() and current_workspace_manager().is_locked())
