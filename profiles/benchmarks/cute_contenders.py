"""Launches the configurations to compare, whole paths or the kernel alone, and times them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ramp_moe import CostModel, Dispatcher, KernelConfig, KernelError, MoEShape, get_registry
from ramp_moe.profiler.bench import FLUSH_BYTES, random_weights
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels.cute import launch as cute_launch
from ramp_moe_kernels.cute.aot import Cache, load
from ramp_moe_kernels.cute.config import Config
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch import Tensor

DEVICE = "cuda"
PREDICTED = 8
"""Number of Triton configurations for a batch."""
PROCESSES = 14
"""Most processes that compile."""


class Inner:
    """Wraps a kernel's function, and keeps its latest arguments, so that it can be launched again alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.arguments = function, ()

    def __call__(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self.function(*arguments)

    def alone(self) -> Callable[[], Any]:
        return partial(self.function, *self.arguments)


@dataclass(frozen=True)
class Contender:
    """A configuration. launch: its whole path. inner: its kernel; None if there are several."""

    name: str
    launch: Callable[[Batch, Tensor, Workspace], object]
    inner: Inner | None = None


def cute(config: Config, prepared: Any, chosen: int | None = None) -> Contender:
    """The contender of a configuration, or of a polymorphic one's block. Raises KernelError if it is not compiled."""
    if Cache.current().look_up(config) is None:
        raise KernelError("not compiled")
    inner = Inner(load(config))
    configs, choice = [config], None
    if chosen is not None:
        configs = [config.of(block) for block in config.blocks]
        choice = torch.tensor([chosen], dtype=torch.int32, device=DEVICE)

    def launch(batch: Batch, out: Tensor, workspace: Workspace) -> None:
        with patch.object(cute_launch, "compiled", lambda *_: inner):
            for _ in cute_launch.launch_steps(configs, prepared, batch, out, workspace, choice):
                pass

    return Contender(config.name if chosen is None else f"{config.name} as {config.blocks[chosen]}", launch, inner)


def medians(launches: Sequence[Callable[[], Any]], repeats: int, clean: bool = False) -> list[float]:
    """Median microseconds of each launch. The launches take turns.

    clean: L2 is flushed by reading, so that nothing in it waits to be written when a launch begins.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=DEVICE)
    spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in launches]
    for _ in range(repeats):
        for launch, of in zip(launches, spans, strict=True):
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.sum() if clean else flush.zero_()
            span[0].record()
            launch()
            span[1].record()
            of.append(span)
    torch.cuda.synchronize()
    return [round(statistics.median(a.elapsed_time(b) * 1e3 for a, b in of), 2) for of in spans]


def captured(launch: Callable[[], object]) -> Callable[[], None]:
    """Capture a launch as a graph, on a stream other than the default one."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        launch()
    finally:
        graph.capture_end()

    def replay(keeps_buffers: object = launch) -> None:
        graph.replay()

    return replay


@functools.cache
def _costs(model: str) -> CostModel:
    return Dispatcher.for_model(model, "h200", ["triton"], "bf16").model


def predicted(model: str, histogram: Any) -> list[KernelConfig]:
    """The Triton path's bf16 configurations that are best by the shipped profile."""
    costs = _costs(model)
    return [costs.candidates[i].config for i in np.argsort(costs.cost(histogram))[:PREDICTED]]


def compile_share(work: Sequence[tuple[MoEShape, KernelConfig]]) -> None:
    """Compile Triton paths by launching them with few experts. Processes share Triton's cache on disk."""
    for shape, config in work:
        weights = random_weights(shape, DEVICE, 0)
        ids = torch.arange(shape.num_experts, device=DEVICE).int().repeat(16, 1)
        batch = Batch(torch.ones(16, shape.hidden_size, device=DEVICE).bfloat16(), ids, torch.ones_like(ids).float())
        try:
            TritonMoE().launch(config, weights, batch, torch.empty_like(batch.hidden_states), Workspace())
        except Exception as e:  # it is left out when it is measured
            print(config.name, e, file=sys.stderr)


def compile_triton(histograms: Iterable[tuple[str, Any]]) -> None:
    """Compile all Triton paths that will be measured on the models' batches."""
    wanted: dict[tuple[MoEShape, str], KernelConfig] = {}
    for model, histogram in histograms:
        shape = get_registry().shape(model, "bf16")
        few = replace(shape, num_experts=shape.top_k)
        wanted |= {(few, c.name): c for c in predicted(model, histogram)}
    work = [(shape, config) for (shape, _), config in wanted.items()]
    processes = max(1, min(PROCESSES, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_share, [work[i::processes] for i in range(processes)]))
