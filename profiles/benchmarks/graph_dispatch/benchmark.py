"""Measure what choosing on the device costs and gains inside CUDA graphs, on one GPU.

    python benchmark.py --model olmoe-1b-7b [--output FILE]

measures one model, in about 90 s on an H200, and writes h200_olmoe-1b-7b.json beside this, which tables.py reads.

Every time is the median of 20 replays of a graph of 48 layers, over 48, between two events. The layers are one layer
with random fp8 weights, captured 48 times. Nothing flushes L2. Each call reads the weights of the batch's experts,
which are several times L2. The weights of few experts stay in L2, for both sides of a comparison.

selection    The kernel that chooses, with and without a recorder, and the Triton path's schedule, each alone. For more
             candidates than the model has, candidates are repeated. Their parts are then computed only once.
bodies       A layer that chooses among bodies, whether or not that pays, less the chosen body captured alone. The
             routing is constant, or changes at every replay, so that nodes are switched. Memory is the driver's for a
             layer in the graph. Buffers are torch's: those of one layer on the two streams that captures use. Further
             captures of the layer share them.
end to end   Skewed routings that no fit has seen. Compared are the plan, the cheapest mode with up to 4 bodies whether
             or not that pays, and the single candidate that was fastest on uniform routing in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from ramp_moe import Candidate, KernelError, expert_histogram, generate
from ramp_moe.measurements.json_file import write_atomically
from ramp_moe.registry.detect import detect
from ramp_moe.runtime.graphs import capture as dispatch
from ramp_moe.runtime.graphs import conditional as graph
from ramp_moe.runtime.graphs.capture import GraphDispatch, GraphPlan
from ramp_moe.runtime.graphs.cost_table import CostTable
from ramp_moe.runtime.graphs.recorder import Recorder
from ramp_moe.runtime.graphs.selector_cuda import CudaSelector
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels.triton.schedule import allocate, schedule

sys.path.append(str(Path(__file__).parents[3] / "examples"))

from _recorded_layer import Recorded, arguments, need_gpu, recorded_layer

LAYERS, REPLAYS, FINALISTS = 48, 20, 4
TOKENS = (32, 128, 512, 2048)
SELECT_TOKENS, CANDIDATES = (64, 512, 2048), (8, 32, 256)
BODIES, BODY_TOKENS = (2, 4, 8), (32, 512)
SKEWED = ("zipf1.2", "zipf2.0", "active0.125", "dirichlet0.3", "balancedness0.5")
SEEDS = (1001, 1002)
"""Seeds of routings that no profile has."""


class Measurement:
    """One model's layer, and the tensors that its graphs read."""

    def __init__(self, recorded: Recorded) -> None:
        self.layer, self.weights, self.model = recorded.layer, recorded.weights, recorded.model
        self.shape = self.layer.shape
        self.stream = torch.cuda.current_stream()

    def take(self, tokens: int) -> None:
        """Use batches of `tokens` from now on."""
        self.tokens = tokens
        self.x = torch.randn(tokens, self.shape.hidden_size, device="cuda").bfloat16()
        self.ids = self.routing("uniform", 0).clone()
        self.scores = torch.rand(tokens, self.shape.top_k, device="cuda").softmax(-1)
        self.out = torch.empty_like(self.x)

    def routing(self, kind: str, seed: int) -> torch.Tensor:
        ids = generate(kind, self.tokens, self.shape.num_experts, self.shape.top_k, seed)
        return torch.from_numpy(ids).int().cuda()

    def plan(self, mode: str | None, bodies: int | None = None) -> GraphPlan:
        """Plan the layer's graphs anew. bodies: their number, whether or not they pay; None: as many as pay."""
        with forced(bodies):
            self.layer.graphs = GraphDispatch(self.layer, self.weights, self.model, self.shape.top_k, mode)
            return self.layer.graphs.prepare(self.tokens, torch.bfloat16)

    def dispatched(self) -> None:
        self.layer(self.x, self.ids, self.scores, self.out)

    def alone(self, candidate: Candidate) -> Callable[[], None]:
        return lambda: self.layer.launch(candidate, Batch(self.x, self.ids, self.scores), self.out)

    def captured(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        found = torch.cuda.CUDAGraph()
        with torch.cuda.graph(found, stream=self.stream):
            for _ in range(LAYERS):
                launch()
        return found

    def us(self, launch: Callable[[], None], *routings: torch.Tensor) -> list[float]:
        """Microseconds of a layer with each routing. The routings take turns."""
        return self.replayed(self.captured(launch), *routings)

    def replayed(self, of: torch.cuda.CUDAGraph, *routings: torch.Tensor) -> list[float]:
        times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in routings]
        for _ in range(REPLAYS + 2):
            for ids, spans in zip(routings, times, strict=True):
                self.ids.copy_(ids)
                span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                span[0].record()
                of.replay()
                span[1].record()
                spans.append(span)
        torch.cuda.synchronize()
        return [statistics.median(a.elapsed_time(b) * 1e3 / LAYERS for a, b in spans[2:]) for spans in times]


@contextmanager
def forced(bodies: int | None) -> Iterator[None]:
    """Context in which plans have up to `bodies` bodies, as if they cost nothing. None: plans are as usual.

    There are fewer if fewer candidates win anywhere.
    """
    with ExitStack() as patches:
        if bodies is not None:
            free = {mode: {1: 0.0, bodies: 0.0} for mode in dispatch.OVERHEAD_US}
            patches.enter_context(patch.dict(dispatch.OVERHEAD_US, free))
            patches.enter_context(patch.object(dispatch, "shortlist", partial(dispatch.shortlist, margin=0.0)))
        yield


def selection(m: Measurement) -> Iterable[dict[str, Any]]:
    contenders = m.model.contenders.tolist()
    for tokens in SELECT_TOKENS:
        m.take(tokens)
        plan = allocate(m.ids.numel(), m.shape.num_experts, 64, "cuda")
        launch = lambda plan=plan: schedule(m.ids, m.shape.num_experts, 64, plan)  # noqa: E731
        launch()
        (schedule_us,) = m.us(launch, m.routing("zipf1.2", 0))
        for count in CANDIDATES:
            columns = (contenders * (count // len(contenders) + 1))[:count]
            selector = CudaSelector(CostTable.of(m.model, columns), m.shape.num_experts, m.x.device)
            recorder = Recorder(LAYERS, m.shape.num_experts, m.shape.top_k, m.x.device)
            found = {}
            for name, ring in (("select_us", None), ("recorded_us", recorder)):
                choose = partial(selector.launch, m.ids, recorder=ring)
                choose()
                (found[name],) = m.us(choose, m.routing("zipf1.2", 0))
            yield {"tokens": tokens, "candidates": count, **found, "schedule_us": schedule_us}


def of_bodies(m: Measurement) -> Iterable[dict[str, Any]]:
    modes = [mode for mode in dispatch.MODES[:-1] if mode == "gated" or not graph.unsupported(mode)]
    for tokens in BODY_TOKENS:
        m.take(tokens)
        routings = [m.routing(kind, 0) for kind in ("uniform", *SKEWED)]
        alone: dict[str, list[float]] = {}
        for mode in modes:
            done = {1}
            for count in BODIES:
                m.layer.workspace = Workspace()
                try:
                    plan = m.plan(mode, count)
                except KernelError as e:
                    print(e)
                    continue
                if len(plan.bodies) in done:  # no more win anywhere
                    continue
                done.add(len(plan.bodies))
                before, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
                captured = m.captured(m.dispatched)
                m.replayed(captured, routings[0])
                taken = before - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)
                bodies = [chosen(m, plan, captured, ids) for ids in routings]
                other = next((i for i, body in enumerate(bodies) if body != bodies[0]), 0)
                pair = routings[0], routings[other]
                for body in {bodies[0], bodies[other]} - alone.keys():
                    alone[body] = m.us(m.alone(next(c for c in plan.bodies if c.name == body)), *routings)
                steady = m.replayed(captured, pair[0])[0] - alone[bodies[0]][0]
                turns = sum(m.replayed(captured, *pair)) - alone[bodies[0]][0] - alone[bodies[other]][other]
                yield {
                    "tokens": tokens, "mode": mode, "bodies": len(plan.bodies), "overhead_us": steady,
                    "changing_us": turns / 2 if other else None, "layer_kib": taken / LAYERS / 1024,
                    "buffers_mib": m.layer.workspace.bytes / 2**20,
                }  # fmt: skip


def chosen(m: Measurement, plan: GraphPlan, captured: torch.cuda.CUDAGraph, ids: torch.Tensor) -> str:
    m.ids.copy_(ids)
    captured.replay()
    return plan.bodies[int(plan.selector.choice)].name


def end_to_end(m: Measurement) -> Iterable[dict[str, Any]]:
    for tokens in TOKENS:
        m.take(tokens)
        seen = [generate("uniform", tokens, m.shape.num_experts, m.shape.top_k, seed) for seed in range(4)]
        us = sum(m.model.cost(expert_histogram(ids, m.shape.num_experts)) for ids in seen)
        contenders = m.model.contenders
        finalists = [m.model.candidates[i] for i in contenders[us[contenders].argsort()][:FINALISTS].tolist()]
        for candidate in finalists:
            m.alone(candidate)()  # which compiles
        static = min(finalists, key=lambda c: m.us(m.alone(c), m.routing("uniform", 0))[0])
        cells = [(kind, m.routing(kind, seed)) for kind in SKEWED for seed in SEEDS]
        routings = [ids for _, ids in cells]
        static_us = m.us(m.alone(static), *routings)
        planned = m.plan(None)
        planned_us = m.us(m.dispatched, *routings)
        choosing = m.plan(None, 4)
        choosing_us = m.us(m.dispatched, *routings)
        yield {
            "tokens": tokens, "static": static.name, "mode": planned.mode, "why": planned.why,
            "bodies": [c.name for c in planned.bodies], "choosing": [choosing.mode, len(choosing.bodies)],
            "routings": [kind for kind, _ in cells], "static_us": static_us, "planned_us": planned_us,
            "choosing_us": choosing_us,
        }  # fmt: skip


def measure(model: str) -> dict[str, Any]:
    began = time.perf_counter()
    with torch.cuda.stream(torch.cuda.Stream()):  # whose buffers captures then use
        m = Measurement(recorded_layer(model))
        found: dict[str, Any] = {
            "model": model,
            "command": f"python benchmark.py --model {model}",
            "measured": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "software": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
            "kernels": [*m.layer.configs()],
        }
        for part in (selection, of_bodies, end_to_end):
            found[part.__name__.removeprefix("of_")] = list(part(m))
            print(f"{model}: {part.__name__} after {time.perf_counter() - began:.0f} s", flush=True)
    return found | {"seconds": round(time.perf_counter() - began)}


def main(argv: list[str]) -> None:
    parser = arguments(__doc__, "olmoe-1b-7b")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    need_gpu()
    output = options.output or Path(__file__).parent / f"{detect().name}_{options.model}.json"
    write_atomically(output, (json.dumps(rounded(measure(options.model)), indent=1) + "\n").encode())


def rounded(value: Any) -> Any:
    """Round floats to hundredths."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main(sys.argv[1:])
