"""Records what a server routes: by RAMP_MOE_RECORD=trace.jsonl, or `record("trace.jsonl")` while it runs. Needs vLLM.

Each layer that ramp_moe computes samples its batches on the device (see `ramp_moe.runtime.traffic`), by one launch of
one CTA per layer and step. Graphs that were captured before the recording began are not sampled. A thread writes the
file every FLUSH_SECONDS, and once more when the process ends.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.plugin import RoutingError
from ramp_moe.runtime.traffic import Traffic
from vllm.distributed.parallel_state import get_dp_group, get_pp_group, get_tp_group, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from ..engine_errors import why
from . import RECORD

if TYPE_CHECKING:
    from torch import Tensor

logger = init_logger("vllm.ramp_moe")
FLUSH_SECONDS = 30.0
current: TrafficRecorder | None = None
"""What samples this process' layers; None if nothing does."""
_earlier: list[TrafficRecorder] = []
"""Those before. Graphs that were captured meanwhile write to their samples for as long as the process lives."""
captures = False
"""Whether the server captures CUDA graphs when it starts."""


class TrafficRecorder:
    """Samples layers of one shape into one file.

    ready: whether the server has started. Before that, the GPU's samples are not read.
    say: tells a person one line.
    """

    def __init__(self, path: Path, ready: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._path, self._ready, self._say = path, ready, say
        self._traffic: Traffic | None = None
        self._numbers: dict[int, int | None] = {}
        self._failed = self._ended = False
        self._writing, self._stop = threading.Lock(), threading.Event()
        threading.Thread(target=self._run, name="ramp-moe-record", daemon=True).start()
        atexit.register(self.close)

    def sample(self, layer: int, topk_ids: Tensor, num_experts: int) -> None:
        """Keep a batch, whose ids are of all ranks' experts. layer: anything that tells one layer from another. Layers
        of another shape than the first are left out. If a batch cannot be sampled, none is from then on, which costs
        one line."""
        if self._ended:
            return
        try:
            number = self._numbers[layer] if layer in self._numbers else self._begin(layer, topk_ids, num_experts)
            if number is not None and self._traffic is not None:
                self._traffic.sample(number, topk_ids.contiguous())
        except Exception as e:  # memory may be lacking, or Triton; a server goes on
            self._ended = True
            self._say(f"{RECORD}: nothing more is sampled: {why(e)}")

    def flush(self) -> None:
        """Write what is sampled so far. If the file cannot be written, says so in one line."""
        if self._traffic is None or not self._ready():
            return
        with self._writing:
            try:
                self._traffic.write(self._path, "vLLM")
                self._failed = False
            except RoutingError:
                return  # nothing ran yet
            except Exception as e:  # a server goes on, whatever became of its samples
                if not self._failed:
                    self._say(f"{RECORD}: {why(e)}")
                self._failed = True

    def close(self) -> None:
        """Stop writing at intervals, and write the file for the last time."""
        atexit.unregister(self.close)
        self._stop.set()
        self.flush()

    def _begin(self, layer: int, topk_ids: Tensor, num_experts: int) -> int | None:
        if topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # memory that is made in a capture is the graph's
        shape = num_experts, topk_ids.shape[1]
        if self._traffic is None:
            self._traffic = Traffic(*shape, topk_ids.device)
            self._say(f"{RECORD}: samples of what is routed are written to {self._path}")
        kept = (self._traffic.num_experts, self._traffic.top_k) == shape
        self._numbers[layer] = self._traffic.layer() if kept else None
        if not kept:
            self._say(f"{RECORD}: a layer of {shape[0]} experts, {shape[1]} a token, is left out: others came first")
        return self._numbers[layer]

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            self.flush()


def take(moe: Any) -> None:
    """Note that a layer of this configuration was loaded, and begin to record if RAMP_MOE_RECORD names a file."""
    global captures
    captures = captures or bool(moe.max_capture_size)
    begin()


def begin(path: str | Path | None = None) -> None:
    """Record into `path` from now on. None: into the file that RAMP_MOE_RECORD names, unless something is recorded.

    Among ranks that route the same batches, the first records. Each pipeline-parallel rank writes its own file.
    """
    global current
    named = path or os.environ.get(RECORD, "").strip()
    suffix = _rank()
    if not named or suffix is None or (current is not None and path is None):
        return
    if current is not None:
        current.close()
        _earlier.append(current)
    current = TrafficRecorder(Path(f"{named}{suffix}").absolute(), _started, logger.info)


def _rank() -> str | None:
    """Suffix of this rank's file name; None if another rank records what this one routes."""
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
