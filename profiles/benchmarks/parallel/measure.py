"""Measure expert and tensor parallelism of one layer. Every rank chooses by the histogram of its own batch.

    torchrun --nproc-per-node 2 measure.py [--model NAME] [--tokens N] [--output FILE]

ep: a rank owns E / ranks experts and has tokens of its own. A token travels once to every rank that owns one of its
    experts, with -1 in the place of the others, and one partial sum comes back.
tp: a rank owns I / ranks of every expert; every rank has all tokens, and the partial sums are added up.

The outputs, and that of rank 0 alone, are compared with the float32 reference. One that is too far off ends the run.
The distance between the two is printed. README.md describes what is timed on GPUs. Without GPUs (gloo) the layer is
tiny, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[3] / "examples"))

from _parallel import DEVICE, GPU, HALF, MODEL, TOKENS, WAYS, ExpertParallel, TensorParallel, start

# isort: split
import torch.distributed as dist
from ramp_moe import MoEShape, expert_histogram, generate, get_registry
from ramp_moe.cost_model.model import Candidate
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.reference import misfit
from ramp_moe.spec.launchable import Batch
from ramp_moe_kernels import reference
from torch import Tensor

DTYPES = ("bf16", "fp8") if GPU else ("fp8",)  # the interpreter takes its time
WARM, REPEATS = 3, 20
FLUSH_BYTES = 2**32
"""Far more than L2. Zeroing them takes a GPU a millisecond, in which the host enqueues any kernel's launches."""


def batches(shape: MoEShape, n: int) -> Iterator[tuple[str, list[int], Batch]]:
    """Yield batches with their names and each rank's number of tokens. They are the same on every rank."""
    ranks, experts, generator = dist.get_world_size(), shape.num_experts, torch.Generator().manual_seed(1)
    for name, tokens, routing, among in (
        ("uniform", [n] * ranks, "uniform", experts),
        ("skewed", [n] * ranks, "zipf1.2", experts),
        ("uneven tokens", [n * rank for rank in range(ranks)], "zipf1.2", experts),
        ("one rank's experts", [n] * ranks, "zipf1.2", experts // ranks),
        ("one token", [1] + [0] * (ranks - 1), "uniform", experts),
    ):
        ids = torch.from_numpy(generate(routing, sum(tokens), among, shape.top_k, 1)).int()
        x = torch.randn(len(ids), shape.hidden_size, generator=generator).to(HALF)
        scores = torch.rand(ids.shape, generator=generator).softmax(-1)
        yield name, tokens, Batch(x.to(DEVICE), ids.to(DEVICE), scores.to(DEVICE))


def called(layer: LayerRuntime, batch: Batch) -> Tensor:
    return layer(batch.hidden_states, batch.topk_ids, batch.topk_weights)


def by_size(layer: LayerRuntime, batch: Batch) -> Candidate:
    """The candidate that the layer chooses for the number of tokens alone."""
    layer.host_sync_us, before = math.inf, layer.host_sync_us
    try:
        return layer.choose(batch)
    finally:
        layer.host_sync_us = before


def run(parallel: ExpertParallel | TensorParallel, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """The output of this rank's tokens `[T, H]`, and a record of what this rank did for it."""
    layer, given = parallel.layer, parallel.send(batch)
    out = parallel.collect(called(layer, given))
    histogram = expert_histogram(given.topk_ids, layer.shape.num_experts)
    did: dict[str, Any] = {"rows": given.num_tokens, "ids": int(histogram.sum()), "experts": int((histogram > 0).sum())}
    candidates = {}
    if given.num_tokens:
        candidates = {"chosen": layer.choose(given), "static": by_size(layer, given)}
    did |= {what: candidate.name for what, candidate in candidates.items()}
    if GPU:
        parts = timed(lambda _: parallel.send(batch), lambda given: called(layer, given), parallel.collect)
        did |= dict(zip(("send_us", "experts_us", "collect_us", "all_us"), parts, strict=True))
        for what, candidate in candidates.items():
            (did[f"{what}_us"], _) = timed(
                lambda _, c=candidate: layer.launch(c, given, torch.empty_like(given.hidden_states))
            )
    return out, did


def timed(*parts: Callable[[Any], Any]) -> list[float]:
    """Median microseconds of each part, and of all together. A part gets what the one before returned.

    If there are several parts, all ranks must call this, and they begin together.
    """
    flush, times = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE), []
    for _ in range(WARM + REPEATS):
        if len(parts) > 1:
            dist.barrier()
        flush.zero_()
        marks, value = [torch.cuda.Event(enable_timing=True) for _ in (None, *parts)], None
        marks[0].record()
        for part, mark in zip(parts, marks[1:], strict=True):
            value = part(value)
            mark.record()
        torch.cuda.synchronize()
        spans = *itertools.pairwise(marks), (marks[0], marks[-1])
        times.append([start.elapsed_time(end) * 1e3 for start, end in spans])
    return [statistics.median(column) for column in zip(*times[WARM:], strict=True)]


def check(found: Tensor, exact: Tensor, dtype: str) -> None:
    """Raises RuntimeError if an output is further from the float32 reference than the library allows kernels."""
    if wrong := misfit(found, exact, dtype):
        raise RuntimeError(wrong)


def apart(found: Tensor, other: Tensor) -> float:
    return float((found.float() - other.float()).norm() / other.float().norm())


def compare(shape: MoEShape, n: int) -> Iterator[dict[str, Any]]:
    """Compute every batch each way, and yield the records on rank 0. Raises RuntimeError for a wrong output."""
    rank, builder = dist.get_rank(), Builder("auto" if GPU else "h200")
    whole = random_weights(shape, DEVICE, seed=0)  # alike on all ranks
    layers = {way: made(whole, shape.top_k, builder) for way, made in WAYS.items()}
    for parallel in layers.values():
        parallel.layer.host_sync_us = 0.0  # the histogram decides, even if reading it takes longer than it gains
    one = builder.layer(whole, shape.top_k) if rank == 0 else None
    if one is not None:
        print(*(f"note: {note}" for note in builder.notes), sep="\n", flush=True)
    for name, tokens, batch in batches(shape, n):
        given = batch.hidden_states, batch.topk_ids, batch.topk_weights
        if one is not None:
            alone, scales = one(*given), {"gate_up_scale": whole.gate_up_scale, "down_scale": whole.down_scale}
            exact = reference.experts(given[0], whole.gate_up, whole.down, *given[1:], **scales)
            check(alone, exact, shape.dtype)
        for way, layer in layers.items():
            mine = Batch(*(t.split(tokens)[rank] for t in given)) if way == "ep" else batch
            found: list[Any] = [None] * dist.get_world_size()
            out, did = run(layer, mine)
            dist.all_gather_object(found, (out.cpu(), did))
            if one is not None:
                outs, dids = zip(*found, strict=True)
                out = torch.cat(outs).to(DEVICE) if way == "ep" else out
                check(out, exact, shape.dtype)
                cell = {"way": way, "dtype": shape.dtype, "batch": name, "tokens": tokens, "ranks": dids}
                us = {"one_gpu_us": timed(lambda _, given=given: one(*given))[0]} if GPU else {}
                yield cell | {"apart": apart(out, alone)} | us


def show(cell: dict[str, Any]) -> None:
    print(
        f"{cell['way']}, {cell['dtype']}, {cell['batch']}, {cell['tokens']} tokens: {cell['apart']:.1e} from one GPU's"
    )
    for rank, did in enumerate(cell["ranks"]):
        us = "".join(f", {what[:-3]} {did[what]:.0f} us" for what in did if what.endswith("_us"))
        work = f"{did['rows']} tokens, {did['ids']} ids, {did['experts']} experts{us}"
        print(f"  rank {rank}: {work}: {did.get('chosen', 'nothing to do')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each rank")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    start()
    cells = []
    for dtype in DTYPES:
        shape = replace(get_registry().shape(options.model), dtype=dtype)
        for cell in compare(shape, options.tokens):
            show(cell)
            cells.append(cell)
    if cells and options.output:
        about = {"device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__}
        about |= {"model": options.model, "measured": date.today().isoformat()}
        options.output.write_text(json.dumps(about | {"cells": cells}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
