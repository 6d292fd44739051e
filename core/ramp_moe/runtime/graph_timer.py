"""Times candidates on a layer's own weights, with a cold L2. CUDA graphs keep the host's time out."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from ..cost_model.model import Candidate
from ..errors import KernelError
from ..measurements.trace import spread_out
from ..spec.launchable import Batch, MoEWeights
from ..spec.routing import IntArray
from .reference import misfit, reference

FLUSH_BYTES = 256 * 2**20
"""Several times the largest L2 cache."""
REPLAYS = 7
LONG_US, LONG_REPLAYS = 1000.0, 3
"""If the first replay takes more than LONG_US microseconds, LONG_REPLAYS suffice."""
CHECKED_TOKENS = 32
"""Most tokens of a batch whose output is compared with the reference."""

Launch = Callable[[Candidate | None, Batch, Tensor], None]
"""Runs a candidate, or the engine's own path if None, on a batch whose ids are of all ranks' experts."""


class GraphTimer:
    """A `calibration.Timer` on the current device. Its memory is freed with it.

    weights: this rank's. A candidate's output of each batch is compared with their float32 reference.
    dtype: of hidden states.
    local: converts ids of all ranks' experts to this rank's, and other ranks' to -1.
    safe: whether a candidate may be captured. Others are timed from the host.
    """

    def __init__(
        self,
        launch: Launch,
        weights: MoEWeights,
        dtype: torch.dtype,
        local: Callable[[Tensor], Tensor],
        safe: Callable[[Candidate | None], bool],
    ) -> None:
        self._launch, self._weights, self._dtype, self._safe = launch, weights, dtype, safe
        self._device = weights.gate_up.device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self._device)
        self._batches: dict[tuple[int, ...], tuple[Batch, Tensor]] = {}
        self._check = OutputCheck(weights, local)

    @torch.inference_mode()
    def time(self, candidate: Candidate | None, topk_ids: IntArray) -> float:
        """The median of REPLAYS or LONG_REPLAYS launches. Raises KernelError for a wrong output."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            batch, out = self._batch(topk_ids)
            run = partial(self._launch, candidate, batch, out)
            out.fill_(float("nan"))
            run()  # which compiles, and gives buffers their size
            self._stream.synchronize()
            if candidate is not None:
                self._check(_key(topk_ids), batch, out)
            if not self._safe(candidate):
                return self._median(lambda: self._enqueue(run))
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")  # NCCL has threads of its own
            try:
                spans = self._enqueue(run)
            except BaseException:
                with suppress(Exception):  # it would say that the capture failed, not why
                    graph.capture_end()
                raise
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
        """A batch of normally distributed hidden states and equal routing weights, and its output tensor."""
        key = _key(topk_ids)
        if key not in self._batches:
            self._batches.clear()  # one is enough: launches of one batch follow each other
            generator = torch.Generator(self._device).manual_seed(len(topk_ids))
            size = len(topk_ids), self._weights.gate_up.shape[2]
            x = torch.randn(size, dtype=torch.float32, device=self._device, generator=generator).to(self._dtype)
            ids = torch.tensor(topk_ids, dtype=torch.int32, device=self._device)
            even = torch.full(ids.shape, 1 / ids.shape[1], dtype=torch.float32, device=self._device)
            self._batches[key] = Batch(x, ids, even), torch.empty_like(x)
        return self._batches[key]


class OutputCheck:
    """Compares outputs with the reference of some of their tokens, which is computed once for each batch.

    weights, local: those of GraphTimer.
    """

    def __init__(self, weights: MoEWeights, local: Callable[[Tensor], Tensor]) -> None:
        self._weights, self._local = weights, local
        self._expected: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, key: tuple[int, ...], batch: Batch, out: Tensor) -> None:
        """Raises KernelError if `out` is wrong for the batch, whose ids are of all ranks' experts.

        key: tells one batch from another. CHECKED_TOKENS tokens are compared, evenly spread, the last among them.
        """
        some = torch.tensor(spread_out(batch.num_tokens, CHECKED_TOKENS), dtype=torch.int64, device=out.device)
        if key not in self._expected:
            ids = self._local(batch.topk_ids[some]).to(torch.int32).contiguous()
            few = Batch(batch.hidden_states[some], ids, batch.topk_weights[some])
            self._expected[key] = reference(self._weights, few)
        if wrong := misfit(out[some], self._expected[key], self._weights.stored.name):
            raise KernelError(f"wrong output of {batch.num_tokens} tokens: {wrong}")


def _key(topk_ids: IntArray) -> tuple[int, ...]:
    return len(topk_ids), hash(topk_ids.tobytes())


def _mark() -> torch.cuda.Event:
    # In a capture only an external event becomes a node that records it at each replay.
    external = torch.cuda.is_current_stream_capturing()
    event = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
    event.record()
    return event
