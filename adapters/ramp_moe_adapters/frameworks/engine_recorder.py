"""Records what a server routes: by RAMP_MOE_RECORD=trace.jsonl, or by `Recording.begin` while it runs.

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
from typing import TYPE_CHECKING

import torch
from ramp_moe.plugin import RoutingError
from ramp_moe.runtime.traffic import Traffic

from .engine_errors import why
from .switches import RECORD

if TYPE_CHECKING:
    from torch import Tensor

FLUSH_SECONDS = 30.0


class Recording:
    """What samples the layers of an engine's process, if anything does.

    engine: its name. suffix: of this rank's file name; None if another rank records what this one routes. ready and
    say: see TrafficRecorder.
    """

    def __init__(
        self, engine: str, suffix: Callable[[], str | None], ready: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self.current: TrafficRecorder | None = None
        self._engine, self._suffix, self._ready, self._say = engine, suffix, ready, say
        self._earlier: list[TrafficRecorder] = []
        """Those before. Graphs that were captured meanwhile write to their samples for as long as the process lives."""

    def begin(self, path: str | Path | None = None) -> None:
        """Record into `path` from now on. None: into the file that RAMP_MOE_RECORD names, unless something is recorded.

        If it is not known which ranks are to record, none does, which costs one line.
        """
        named = path or os.environ.get(RECORD, "").strip()
        if not named or (self.current is not None and path is None):
            return
        try:
            suffix = self._suffix()
        except Exception as e:  # an engine of another version, perhaps; a server goes on
            self._say(f"{RECORD}: nothing is sampled: {why(e)}")
            return
        if suffix is None:
            return
        if self.current is not None:
            self.current.close()
            self._earlier.append(self.current)
        self.current = TrafficRecorder(self._engine, Path(f"{named}{suffix}").absolute(), self._ready, self._say)


class TrafficRecorder:
    """Samples layers of one shape into one file.

    engine: its name.
    ready: whether the server has started. Before that, the GPU's samples are not read.
    say: tells a person one line.
    """

    def __init__(self, engine: str, path: Path, ready: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._engine, self._path, self._ready, self._say = engine, path, ready, say
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
                self._traffic.write(self._path, self._engine)
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
