"""Times candidates on a layer's own weights, inside CUDA graphs with a cold L2, so that no time contains the host's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..cost_model.model import Candidate
from ..errors import KernelError
from ..spec.launchable import Batch, MoEWeights
from ..spec.routing import IntArray
from .reference import misfit, reference

FLUSH_BYTES = 256 * 2**20
"""Several times the largest L2 cache."""
REPLAYS = 7
LONG_US, LONG_REPLAYS = 1000.0, 3
"""From LONG_US microseconds on, fewer replays do."""
CHECKED_TOKENS = 32

Launch = Callable[[Candidate | None, Batch, Tensor], None]
"""Runs a candidate, or the engine's own path if None, on a batch whose ids are of all ranks' experts."""


class GraphTimer:
    """A `calibration.Timer` on the current device.

    weights: this rank's, for the float32 reference that the first output of each candidate is compared with. dtype: of
    hidden states. local: ids of all ranks' experts to this rank's, -1 for others. safe: whether a candidate may be
    captured; others are timed from the host. Memory is freed with the timer.
    """

    def __init__(
        self,
        launch: Launch,
        weights: MoEWeights,
        dtype: torch.dtype,
        local: Callable[[Tensor], Tensor],
        safe: Callable[[Candidate | None], bool],
    ) -> None:
        self._launch, self._weights, self._dtype, self._local, self._safe = launch, weights, dtype, local, safe
        self._device = weights.gate_up.device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self._device)
        self._batches: dict[tuple[int, ...], tuple[Batch, Tensor]] = {}
        self._right = set[str]()

    @torch.inference_mode()
    def time(self, candidate: Candidate | None, topk_ids: IntArray) -> float:
        """The median. Raises KernelError for a wrong output of the candidate's first batch."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            batch, out = self._batch(topk_ids)
            run = partial(self._launch, candidate, batch, out)
            out.fill_(float("nan"))
            run()  # which compiles, and gives buffers their size
            self._stream.synchronize()
            if candidate is not None and candidate.name not in self._right:
                self._check(batch, out)
                self._right.add(candidate.name)
            if not self._safe(candidate):
                return self._median(lambda: self._enqueue(run))
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")  # NCCL has threads of its own
            try:
                spans = self._enqueue(run)
            finally:
                graph.capture_end()

            def replay() -> tuple[torch.cuda.Event, torch.cuda.Event]:
                graph.replay()
                return spans

            replay()  # the first is slower
            return self._median(replay)

    def _median(self, launch: Callable[[], tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        times: list[float] = []
        while len(times) < (LONG_REPLAYS if times and times[0] > LONG_US else REPLAYS):
            before, after = launch()
            self._stream.synchronize()
            times.append(before.elapsed_time(after) * 1e3)
        return statistics.median(times)

    def _enqueue(self, run: Callable[[], None]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        self._flush.zero_()
        before = _mark()
        run()
        return before, _mark()

    def _batch(self, topk_ids: IntArray) -> tuple[Batch, Tensor]:
        """Normal hidden states, and even weights."""
        key = (len(topk_ids), hash(topk_ids.tobytes()))
        if key not in self._batches:
            self._batches.clear()  # one is enough: those of a size follow each other
            generator = torch.Generator(self._device).manual_seed(len(topk_ids))
            size = len(topk_ids), self._weights.gate_up.shape[2]
            x = torch.randn(size, dtype=torch.float32, device=self._device, generator=generator).to(self._dtype)
            ids = torch.tensor(topk_ids, dtype=torch.int32, device=self._device)
            even = torch.full(ids.shape, 1 / ids.shape[1], dtype=torch.float32, device=self._device)
            self._batches[key] = Batch(x, ids, even), torch.empty_like(x)
        return self._batches[key]

    def _check(self, batch: Batch, out: Tensor) -> None:
        first = slice(CHECKED_TOKENS)
        ids = self._local(batch.topk_ids[first]).to(torch.int32).contiguous()
        some = Batch(batch.hidden_states[first], ids, batch.topk_weights[first])
        dtype = {torch.float8_e4m3fn: "fp8", torch.float16: "fp16"}.get(self._weights.gate_up.dtype, "bf16")
        if wrong := misfit(out[first], reference(self._weights, some), dtype):
            raise KernelError(f"wrong output: {wrong}")


def _mark() -> torch.cuda.Event:
    # In a capture only an external event becomes a node that records it at each replay.
    external = torch.cuda.is_current_stream_capturing()
    event = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
    event.record()
    return event
