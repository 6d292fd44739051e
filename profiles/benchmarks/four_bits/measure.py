"""Measure what a choice by histogram gains over Humming's own choice, on this machine's Hopper GPU.

    python measure.py --model kimi-k2-tp8 --dtype int4-g32 --out h200-kimi-k2-tp8-int4-g32.json

Both GEMMs of every batch are timed with each plausible tile, in one CUDA graph per batch: 256 MiB are written to flush
L2 before each launch, and a time is the median of 7 to 12 replays. A tile's time is then fitted by four terms: a
constant, the active experts, the waves of CTAs and the routed ids. Uniform and zipf1.2 routings are fitted, two draws
of each; dirichlet0.3 and zipf2.0 are kept for judging. Of each batch, whole layers are timed in the same way, from
top-k ids to output, with these pairs of tiles:

    own       Humming's own choice by the number of routed ids
    model     the pair of one token block that the fit predicts to be fastest
    uniform   the pair that is fastest on uniform routing of as many tokens
    best      the pair whose GEMMs were fastest on this batch
    signed    own, with INT4 as sign and magnitude, as vLLM has it if no weight is -8
    marlin    vLLM's Marlin by its own rule, if its library is there

Choosing is not paid. Outputs are compared with the float32 reference on three batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ramp_moe import MoEShape, expert_histogram, generate, get_registry
from ramp_moe.cost_model.fitting import least_squares
from ramp_moe.plugin import version_of
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.kernel import why_unsupported
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.humming import formats, package
from ramp_moe_adapters.kernels.humming.config import WarpTile, tiles
from ramp_moe_adapters.kernels.humming.kernel import PROJECTIONS, Humming
from ramp_moe_adapters.kernels.humming.launch import LOCKS, PreparedHumming, gemm, prepare
from ramp_moe_adapters.kernels.marlin.kernel import Marlin
from ramp_moe_kernels.triton.schedule import Schedule, allocate, launch_schedule

TOKENS = (128, 256, 512, 1024, 2048)
FITTED = tuple(itertools.product(("uniform", "zipf1.2"), (7, 8)))
JUDGED = (("uniform", 7), ("zipf1.2", 7), ("dirichlet0.3", 7), ("zipf2.0", 7))
CHECKED = ((128, "zipf2.0"), (512, "uniform"), (2048, "zipf2.0"))
SECONDS = 0.35
"""Time after which seven replays of a graph suffice."""
MIN_ROWS = 5
"""Fewest batches that a tile is fitted on."""
H200 = get_registry().device("h200")
Times = dict[str, dict[WarpTile, float]]
"""Microseconds of each projection's tiles on one batch."""
Pair = tuple[WarpTile, WarpTile]


class Timer:
    """Times launches on a stream of its own, each with a cold L2."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(
        self, launches: Sequence[Callable[[], object]], replays: int = 12, seconds: float = 0.35
    ) -> list[float]:
        """Median microseconds of each launch, in the order given. All have run before."""
        graph, spans = torch.cuda.CUDAGraph(), []
        graph.capture_begin()
        try:
            for launch in launches:
                self._flush.zero_()
                before = self._mark()
                launch()
                spans.append((before, self._mark()))
        finally:
            graph.capture_end()
        graph.replay()
        torch.cuda.current_stream().synchronize()
        found: list[list[float]] = [[] for _ in launches]
        end = time.perf_counter() + SECONDS
        for replay in range(replays):
            graph.replay()
            torch.cuda.current_stream().synchronize()
            for times, (before, after) in zip(found, spans, strict=True):
                times.append(before.elapsed_time(after) * 1e3)
            if replay >= 6 and time.perf_counter() > end:
                break
        return [statistics.median(times) for times in found]

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event


@dataclass(frozen=True)
class Drawn:
    """One batch's routing."""

    tokens: int
    routing: str
    ids: torch.Tensor
    histogram: np.ndarray


def draw(shape: MoEShape, tokens: int, routing: str, seed: int) -> Drawn:
    ids = generate(routing, tokens, shape.num_experts, shape.top_k, seed=seed)
    histogram = np.asarray(expert_histogram(ids, shape.num_experts))
    return Drawn(tokens, routing, torch.from_numpy(ids.astype(np.int32)).cuda(), histogram)


def own(shape: MoEShape, tokens: int) -> Pair:
    up, down = (package.own_choice(shape, which, tokens * shape.top_k) for which in PROJECTIONS)
    assert up is not None
    assert down is not None
    return up, down


def stage_times(timer: Timer, prepared: PreparedHumming, shape: MoEShape, drawn: Drawn) -> Times:
    """Time every plausible tile of both GEMMs, and Humming's own. Drops a tile whose output is another."""
    n, found, schedules = drawn.ids.numel(), {}, dict[int, Schedule]()
    mean = n / np.count_nonzero(drawn.histogram)
    locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)

    def schedule(block: int) -> Schedule:
        if block not in schedules:
            schedules[block] = allocate(n, shape.num_experts, block, "cuda")
            launch_schedule(drawn.ids, shape.num_experts, (block,), schedules[block])
        return schedules[block]

    for which, first in zip(PROJECTIONS, own(shape, drawn.tokens), strict=True):
        of, top_k = formats.sizes(shape, which), shape.top_k if which == "up" else 1
        a = torch.randn(n // top_k, of.k, device="cuda", generator=generator).bfloat16()
        out = torch.empty(n, of.n, dtype=torch.bfloat16, device="cuda")
        launches: dict[WarpTile, Callable[[], None]] = {}
        expected = None
        plausible = (t for t in tiles(shape, which) if mean / 6 <= t.block_m <= max(16, 8 * mean))
        for tile in dict.fromkeys((first, *plausible)):
            launch = partial(gemm, prepared, which, tile, a, None, out, schedule(tile.block_m), locks, top_k)
            out.fill_(float("nan"))
            launch()
            expected = out.clone() if expected is None else expected
            if apart(out, expected) < 0.02:
                launches[tile] = launch
            else:
                print(f"wrong: {which} {tile.name} on {drawn.tokens} tokens, {drawn.routing}")
        found[which] = dict(zip(launches, timer(list(launches.values())), strict=True))
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def terms(shape: MoEShape, which: formats.Which, tile: WarpTile, histogram: np.ndarray) -> list[float]:
    """A constant, active experts, waves (the last in part with stream-K) and routed ids."""
    m_tiles = int((-(-histogram // tile.block_m)).sum())
    waves = m_tiles * formats.sizes(shape, which).padded_n / tile.block_n / (H200.num_sms * tile.ctas)
    shared = waves if tile.stream_k else np.ceil(waves)
    return [1.0, float(np.count_nonzero(histogram)), float(shared), float(histogram.sum())]


def fit(shape: MoEShape, batches: Sequence[tuple[Drawn, Times]]) -> dict[tuple[str, WarpTile], np.ndarray]:
    """Fit each tile's coefficients, none of them negative, to the relative error."""
    found = {}
    for which in PROJECTIONS:
        for tile in dict.fromkeys(t for _, times in batches for t in times[which]):
            seen = [(terms(shape, which, tile, d.histogram), t[which][tile]) for d, t in batches if tile in t[which]]
            if len(seen) >= MIN_ROWS:
                features = np.array([row for row, _ in seen])[:, None]
                coefficients, _ = least_squares(features, np.array([us for _, us in seen])[:, None], True)
                found[which, tile] = coefficients[0]
    return found


def fastest(times: Mapping[str, Mapping[WarpTile, float]]) -> Pair:
    """The pair of one token block with the least sum."""
    pairs = (p for p in itertools.product(times["up"], times["down"]) if p[0].block_m == p[1].block_m)
    return min(pairs, key=lambda p: times["up"][p[0]] + times["down"][p[1]])


def signed(weights: MoEWeights, dtype: str) -> PreparedHumming:
    """INT4 weights without -8 as sign and magnitude, as vLLM gives them to Humming."""

    def converted(packed: torch.Tensor) -> torch.Tensor:
        twos = packed ^ 0x88
        negative = (twos & 0x88) >> 3
        return (twos & 0x88) | (((twos & 0x77) ^ (negative * 7)) + negative)

    kinds: dict[str, formats.Kind] = formats.KINDS  # type: ignore[assignment]
    kept = kinds[dtype]
    kinds[dtype] = replace(kept, element="float4e0m3")
    try:
        return prepare(replace(weights, gate_up=converted(weights.gate_up), down=converted(weights.down)))
    finally:
        kinds[dtype] = kept


@dataclass(frozen=True)
class Prepared:
    """A layer's weights as each kernel wants them.

    signed: INT4 as sign and magnitude. marlin: both are None if the kernel cannot run, or the format has no such form.
    """

    weights: MoEWeights
    humming: PreparedHumming
    signed: PreparedHumming | None
    marlin: Any


def prepare_all(shape: MoEShape) -> Prepared:
    weights, marlin = random_weights(shape, "cuda", 0), Marlin()
    signs = None
    if shape.format.element == "int4":  # without -8, which sign and magnitude lack
        clean = {key: (w & 15).clamp(min=1) | (w >> 4).clamp(min=1) << 4
                 for key, w in (("gate_up", weights.gate_up), ("down", weights.down))}  # fmt: skip
        weights = replace(weights, **clean)
        signs = signed(weights, shape.dtype)
    runs = marlin.unavailable() is None and why_unsupported(marlin, shape, H200) is None
    return Prepared(weights, prepare(weights), signs, marlin.prepare(weights) if runs else None)


def whole_layers(timer: Timer, shape: MoEShape, prepared: Prepared, drawn: Drawn, pairs: Mapping[str, Pair]) -> Any:
    """Time whole layers of a batch with each pair, and what they are compared with."""
    kernel, marlin = Humming(), Marlin()
    x = torch.randn(drawn.tokens, shape.hidden_size, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    even = torch.full(drawn.ids.shape, 1 / shape.top_k, device="cuda")
    batch = Batch(x.bfloat16(), drawn.ids, even)
    runs: dict[str, tuple[Any, Any, Any]] = {
        name: (kernel, kernel.describe(*pair, shape, H200), prepared.humming) for name, pair in pairs.items()
    }
    if prepared.signed is not None:
        runs["signed"] = kernel, runs["own"][1], prepared.signed
    if prepared.marlin is not None:
        runs["marlin"] = marlin, marlin.default_config(shape, H200, drawn.tokens), prepared.marlin
    launches, outs = {}, {}
    for name, (of, config, given) in runs.items():
        outs[name] = torch.empty_like(batch.hidden_states)
        launches[name] = partial(of.launch, config, given, batch, outs[name], Workspace())
        launches[name]()
    us = dict(zip(launches, timer(list(launches.values()), 20), strict=True))
    row: dict[str, Any] = {"tokens": drawn.tokens, "routing": drawn.routing}
    row["us"] = {name: round(t, 2) for name, t in us.items()}
    row["pairs"] = {name: [tile.name for tile in pair] for name, pair in pairs.items()}
    if (drawn.tokens, drawn.routing) in CHECKED:
        expected = reference(prepared.weights, batch)
        row["error"] = {name: round(apart(o, expected), 5) for name, o in outs.items()}
    return row


def layers(shape: MoEShape, out: Path) -> None:
    """Measure a shape and write the file, anew after each batch."""
    timer, prepared, rows = Timer(), prepare_all(shape), list[Any]()
    about = {"model": shape.label, "dtype": shape.dtype, "gpu": torch.cuda.get_device_name()}
    about |= {"torch": torch.__version__, "humming": version_of("humming")}
    measured: dict[tuple[int, str, int], tuple[Drawn, Times]] = {}
    for tokens, (routing, seed) in itertools.product(TOKENS, dict.fromkeys((*FITTED, *JUDGED))):
        drawn = draw(shape, tokens, routing, seed)
        measured[tokens, routing, seed] = drawn, stage_times(timer, prepared.humming, shape, drawn)
    fitted = fit(shape, [measured[tokens, *of] for tokens in TOKENS for of in FITTED])
    for tokens, (routing, seed) in itertools.product(TOKENS, JUDGED):
        drawn, times = measured[tokens, routing, seed]
        uniform = measured[tokens, "uniform", 7][1]
        predicted = {
            which: {t: float(terms(shape, which, t, drawn.histogram) @ fitted[which, t])
                    for t in times[which] if (which, t) in fitted}
            for which in PROJECTIONS
        }  # fmt: skip
        common = {which: {t: us for t, us in uniform[which].items() if t in times[which]} for which in PROJECTIONS}
        pairs = {"own": own(shape, tokens), "model": fastest(predicted)}
        pairs |= {"uniform": fastest(common), "best": fastest(times)}
        rows.append(whole_layers(timer, shape, prepared, drawn, pairs))
        print(json.dumps(rows[-1]["us"]), flush=True)
        out.write_text(json.dumps(about | {"rows": rows}, indent=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True, help="int4-g32, int4-g128 or mxfp4")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shape = get_registry().shape(options.model, options.dtype)
    if reason := why_unsupported(Humming(), shape, H200) or Humming().unavailable():
        parser.error(f"humming cannot run {shape.title} here: {reason}")
    if formats.KINDS[shape.dtype].a_bits != 16:
        parser.error(f"{shape.dtype} rounds activations; give int4-g32, int4-g128 or mxfp4")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    torch.set_grad_enabled(False)
    with torch.cuda.stream(torch.cuda.Stream()):
        layers(shape, options.out)


if __name__ == "__main__":
    main()
