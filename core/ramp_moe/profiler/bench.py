"""The bench: one shape's random weights on this GPU, and configurations of kernels that are run on them, checked and
timed with a cold L2.

Times are taken inside a CUDA graph that is replayed for each launch. The graph first zeroes 256 MiB, which flushes L2.
Nodes that record events surround the path, or each of its stages. So no time contains the host's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HardwareError, KernelError, RoutingError, UnknownNameError
from ..runtime.reference import misfit, reference
from ..runtime.relayout import relayout, to_give
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig, layouts_of, usable_configs
from ..spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape

FLUSH_BYTES = 256 * 2**20
LONG_US, LONG_LAUNCHES = 1000.0, 2
"""A path that takes longer than LONG_US microseconds is launched at most LONG_LAUNCHES times. The longest paths take
most of the time of measuring."""
HOST_AHEAD = 2.0
"""A launch from the host was not held up by the host if it took this factor of the time of enqueueing it."""

SIZES = {"e4m3": 64.0, "int4": 4.6, "e2m1": 2.9}
"""Root mean square of the weights that are drawn, before their scales, by element."""

Spans = dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]
"""The events before and after each step, by step."""
Timed = tuple[str, str, bool]
"""Kernel, configuration, and whether stages are timed one by one."""
Launch = Callable[[Timed], dict[str, float]]
"""Microseconds of each step of one launch."""


def random_weights(shape: MoEShape, device: torch.device | str, seed: int) -> MoEWeights:
    """Draw weights of a shape's format, of size columns**-0.5.

    They are normal in bf16, fp16 and e4m3; each 4-bit code is as likely as another. Scales differ from one to the next.
    """
    generator = torch.Generator(device).manual_seed(seed)
    experts, hidden, inter = shape.num_experts, shape.hidden_size, shape.intermediate_size
    stored = shape.format

    def plain(rows: int, columns: int) -> Tensor:
        dtype = torch.float16 if shape.dtype == "fp16" else torch.bfloat16
        w = torch.empty(experts, rows, columns, dtype=dtype, device=device)
        return w.normal_(0, columns**-0.5, generator=generator)

    def scaled(matrices: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Draw `matrices` `[rows, columns]` matrices of each expert, one above the other."""
        size = matrices * rows, columns
        if stored.packed:
            packed = (experts, matrices * rows, stored.stored_columns(columns))
            w = torch.randint(0, 256, packed, dtype=torch.uint8, device=device, generator=generator)
        else:
            w = torch.empty(experts, *size, dtype=torch.float8_e4m3fn, device=device)
            for e in range(experts):  # float32 of one expert at a time
                one = torch.randn(size, dtype=torch.float32, device=device, generator=generator)
                w[e] = (64 * one).to(w.dtype)
        wanted = experts, *stored.scale_shape(rows, columns, matrices)
        typical = columns**-0.5 / SIZES[stored.element]
        if stored.scale == "e8m0":
            exponent = 127 + round(math.log2(typical))
            near = (exponent - 1, exponent + 2)
            return w, torch.randint(*near, wanted, dtype=torch.uint8, device=device, generator=generator)
        scale = torch.rand(wanted, dtype=torch.float32, device=device, generator=generator)
        scale = (scale + 0.5) * typical
        return w, scale.bfloat16() if stored.scale == "bf16" else scale

    if stored.scale is None:
        return MoEWeights(plain(2 * inter, hidden), plain(hidden, inter))
    (gate_up, gate_up_scale), (down, down_scale) = scaled(2, inter, hidden), scaled(1, hidden, inter)
    return MoEWeights(gate_up, down, gate_up_scale, down_scale, format=stored.name)


@dataclass
class _Opened:
    """The open batch, its output, and what is known of it: the reference, and the graphs by what they time."""

    batch: Batch
    out: Tensor
    expected: Tensor | None = None
    graphs: dict[Timed, tuple[torch.cuda.CUDAGraph, Spans]] = field(default_factory=dict)


class Bench:
    """One shape's random weights on this GPU, prepared for each kernel. It runs, checks and times single
    configurations.

    Without a GPU everything but the times works on the CPU. All work is on one stream, since a workspace has its
    buffers by stream. Each method returns when its work is done.

    Raises KernelError for a kernel that cannot compute the shape or cannot run here. The methods raise UnknownNameError
    for a kernel or a configuration that does not exist, RoutingError if no batch is open, and whatever a kernel raises.
    """

    def __init__(self, shape: MoEShape, hardware: Hardware, kernels: Sequence[LaunchableKernel], seed: int = 0) -> None:
        gpu = torch.cuda.is_available()
        self.shape, self._seed = shape, seed
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        configs = {kernel.name: usable_configs(kernel, shape, hardware) for kernel in kernels}
        for kernel in kernels:
            if reason := kernel.unavailable():
                raise KernelError(f"kernel {kernel.name} cannot run here: {reason}")
        self._stream = torch.cuda.Stream() if gpu else None  # type: ignore[no-untyped-call]
        self._workspace = Workspace()
        self._opened: _Opened | None = None
        self._ran: set[tuple[str, str]] = set()
        with self._finished():
            self._flush = torch.empty(FLUSH_BYTES if gpu else 0, dtype=torch.int8, device=self.device)
            self._weights = random_weights(shape, self.device, seed)
            layouts = {kernel.name: to_give(layouts_of(kernel, shape)) for kernel in kernels}
            given = {layout: relayout(self._weights, layout) for layout in set(layouts.values())}
            self._kernels = {
                k.name: (k, k.prepare(given[layouts[k.name]]), {c.name: c for c in configs[k.name]}) for k in kernels
            }

    def open(self, topk_ids: IntArray) -> None:
        """Work on this routing from now on: int64 `[T, k]`, ids out of range are skipped.

        Hidden states are normal, bf16 (fp16 for an fp16 shape), and routing weights a softmax. Both are the same for
        every routing of T tokens.
        """
        if topk_ids.ndim != 2 or topk_ids.shape[1] != self.shape.top_k or not len(topk_ids):
            raise RoutingError(f"topk_ids must be [T, {self.shape.top_k}] with T > 0, not {list(topk_ids.shape)}")
        # The weights are drawn from the seed itself. With it, the first token would equal the first row of the first
        # expert.
        generator = torch.Generator(self.device).manual_seed(self._seed + 1)
        dtype = torch.float16 if self.shape.dtype == "fp16" else torch.bfloat16
        with self._finished():
            size = len(topk_ids), self.shape.hidden_size
            x = torch.randn(size, dtype=torch.float32, device=self.device, generator=generator)
            scores = torch.randn(topk_ids.shape, dtype=torch.float32, device=self.device, generator=generator)
            ids = torch.tensor(topk_ids, dtype=torch.int32, device=self.device)
            batch = Batch(x.to(dtype), ids, scores.softmax(-1))
            self._opened = _Opened(batch, torch.empty_like(batch.hidden_states))

    def warm(self, kernel: str, config: str) -> None:
        """Launch once, which compiles."""
        with self._finished():
            self._run(kernel, config)

    def check(self, kernel: str, config: str) -> None:
        """Run on the open batch and compare with the float32 layer.

        Raises KernelError if the output of one token, or of one block of columns, is further off than LIMITS allow, or
        was not written.
        """
        opened = self._batch()
        with self._finished():
            opened.out.fill_(float("nan"))
            self._run(kernel, config)
            if opened.expected is None:
                opened.expected = reference(self._weights, opened.batch)
            wrong = misfit(opened.out, opened.expected, self.shape.dtype)
        if wrong is not None:
            raise KernelError(f"{kernel}/{config}: {wrong}")

    def time(self, kernel: str, config: str, launches: int, patience_us: float = math.inf) -> list[float]:
        """Time `launches` launches of the whole path, in microseconds; LONG_LAUNCHES if it is long.

        A path that, once warm, takes longer than `patience_us` gets one figure only, unless it was timed on the open
        batch before. Raises HardwareError without a GPU.
        """
        (times,) = self._times(kernel, config, False, launches, patience_us).values()
        return times

    def time_stages(self, kernel: str, config: str, launches: int) -> dict[str, list[float]]:
        """Time each stage alone, by stage key: none overlaps the one before it. {} for a kernel without steps."""
        return self._times(kernel, config, True, launches, math.inf)

    def healthy(self) -> bool:
        """Tell whether the device still answers. After an illegal access it does not, until the process ends."""
        try:
            if self._stream is not None:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    @contextmanager
    def _finished(self) -> Iterator[None]:
        """Do the work on the bench's stream, and wait for it."""
        with torch.cuda.stream(self._stream):
            yield
            if self._stream is not None:
                self._stream.synchronize()

    def _batch(self) -> _Opened:
        if self._opened is None:
            raise RoutingError("no batch is open: call open first")
        return self._opened

    def _find(self, kernel: str, config: str) -> tuple[LaunchableKernel, Any, KernelConfig]:
        if kernel not in self._kernels:
            raise UnknownNameError("kernel", kernel, self._kernels)
        launchable, prepared, configs = self._kernels[kernel]
        if config not in configs:
            raise UnknownNameError(f"configuration of {kernel}", config, configs)
        return launchable, prepared, configs[config]

    def _steps(self, kernel: str, config: str, staged: bool) -> Iterator[str]:
        """Launch, and stop after each stage, or at the end only."""
        launchable, prepared, described = self._find(kernel, config)
        given = described, prepared, self._batch().batch, self._batch().out, self._workspace
        if staged:
            yield from launchable.steps(*given)
        else:
            launchable.launch(*given)
            yield "path"

    def _run(self, kernel: str, config: str, staged: bool = False) -> bool:
        """Launch once. Returns whether there were steps to stop after."""
        return len(list(self._steps(kernel, config, staged))) > 0

    def _times(
        self, kernel: str, config: str, staged: bool, launches: int, patience_us: float
    ) -> dict[str, list[float]]:
        if self._stream is None:
            raise HardwareError("times need a CUDA device; torch sees none")
        opened, timed = self._batch(), (kernel, config, staged)
        with self._finished():
            if timed in opened.graphs:
                return _by_step(self._repeated(self._replay, timed, launches, math.inf))
            if (kernel, config) not in self._ran:
                self._run(kernel, config)  # which compiles
                self._ran.add((kernel, config))
            first, host_us = self._eager(timed)
            if not first:
                return {}
            # The figure stands unless the host held the launch up: it was busy, or had to allocate.
            if sum(first.values()) > max(patience_us, HOST_AHEAD * host_us):
                return _by_step([first])
            if not self._find(kernel, config)[0].graph_safe:
                return _by_step(self._repeated(lambda t: self._eager(t)[0], timed, launches, patience_us))
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                spans = self._enqueue(*timed)
            finally:
                graph.capture_end()
            opened.graphs[timed] = graph, spans
            self._replay(timed)  # the first replay is slower, and is not looked at
            return _by_step(self._repeated(self._replay, timed, launches, patience_us))

    def _repeated(self, launch: Launch, timed: Timed, launches: int, patience_us: float) -> list[dict[str, float]]:
        first = launch(timed)
        us = sum(first.values())
        count = 1 if us > patience_us else launches if us <= LONG_US else min(launches, LONG_LAUNCHES)
        return [first, *(launch(timed) for _ in range(count - 1))]

    def _eager(self, timed: Timed) -> tuple[dict[str, float], float]:
        """Time each step of one launch from the host, in microseconds, and the host's own time for it."""
        began = time.perf_counter()
        spans = self._enqueue(*timed)
        host_us = (time.perf_counter() - began) * 1e6
        return self._measured(spans), host_us

    def _replay(self, timed: Timed) -> dict[str, float]:
        graph, spans = self._batch().graphs[timed]
        graph.replay()
        return self._measured(spans)

    def _measured(self, spans: Spans) -> dict[str, float]:
        """Microseconds of each step of what was enqueued, once it is done."""
        assert self._stream is not None
        self._stream.synchronize()
        return {step: before.elapsed_time(after) * 1e3 for step, (before, after) in spans.items()}

    def _enqueue(self, kernel: str, config: str, staged: bool) -> Spans:
        """Enqueue a launch with the events around its steps, L2 flushed before it."""
        spans: Spans = {}
        self._flush.zero_()
        before = _mark()
        for step in self._steps(kernel, config, staged):
            after = _mark()
            spans[step] = before, after
            before = after
        return spans


def _by_step(launches: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {step: [times[step] for times in launches] for step in launches[0]}


def _mark() -> torch.cuda.Event:
    # In a capture only an external event becomes a node that records it at each replay.
    external = torch.cuda.is_current_stream_capturing()
    event = torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
    event.record()
    return event
