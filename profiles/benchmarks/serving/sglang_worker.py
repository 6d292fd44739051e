"""SGLang's plugin that has the engine measured; `sglang_engine.py` registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import in_worker
import torch


def register() -> None:
    """SGLang calls this in each of its processes."""
    import sglang.srt.model_loader.loader as loader
    from sglang.srt.layers.moe.moe_runner import MoeRunner
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend

    loader.initialize_dummy_weights = in_worker.draw
    FullCudaGraphBackend.replay = in_worker.timed(FullCudaGraphBackend.replay, "graph")
    BreakableCudaGraphBackend.replay = in_worker.timed(BreakableCudaGraphBackend.replay, "prefill")
    Scheduler.serving = _serving
    if in_worker.without_experts():
        MoeRunner.run = _no_experts


def _serving(self: Any, what: str, args: list[Any], path: str) -> None:
    """A method of the scheduler that `Engine.collective_rpc` calls by name. It returns nothing, so the answer goes into
    a file."""
    Path(path).write_text(json.dumps(in_worker.answer(what, args, self.tp_worker.model_runner.model)))


def _no_experts(self: Any, given: Any, *args: Any, **options: Any) -> Any:
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

    return StandardCombineInput(hidden_states=torch.zeros_like(given.hidden_states))
