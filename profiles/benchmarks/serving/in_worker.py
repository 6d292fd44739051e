"""Measures inside an engine's own process, which has the model. `vllm_worker.py` and `sglang_worker.py` load this file.

Neither engine's code for experts is touched, unless the variant is `without_experts`.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import msgspec
import random_weights
import torch

ROUNDED = "SERVING_ROUNDED"
"""Variable with the dtype to whose values the weights of a float32 engine are rounded."""
WITHOUT_EXPERTS = "SERVING_WITHOUT_EXPERTS"
"""Variable. If it is 1, experts return zeros, so that a step takes the time of everything else."""
_replays: list[tuple[str, Any, Any, float]] | None = None
"""Replays while recording, else None: kind of graph, event before, event after, host seconds."""
_routed: list[Any] | None = None
"""Top-k ids of each layer and batch while recording, else None."""


def start_recording() -> None:
    """Record the GPU time of each graph that is replayed from now on."""
    global _replays
    _replays = []


def recorded() -> list[tuple[str, float, float]]:
    """Stop recording. Returns the kind, GPU milliseconds and host seconds at the start of each replay."""
    global _replays
    torch.cuda.synchronize()
    found, _replays = _replays or [], None
    return [(kind, start.elapsed_time(end), at) for kind, start, end, at in found]


def timed(replay: Any, kind: str) -> Any:
    """Wrap a method that replays a graph: while recording, events are recorded around it."""

    def with_events(self: Any, *args: Any, **options: Any) -> Any:
        if _replays is None:
            return replay(self, *args, **options)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        at = time.perf_counter()
        events[0].record()
        found = replay(self, *args, **options)
        events[1].record()
        _replays.append((kind, *events, at))
        return found

    return with_events


def memory() -> dict[str, float]:
    """GiB that torch has allocated, and reserved."""
    return {what: getattr(torch.cuda, f"memory_{what}")() / 2**30 for what in ("allocated", "reserved")}


def plans() -> dict[str, Any]:
    """What ramp_moe's layers chose; empty in a variant without them.

    It has the number of layers, the kernels that any of them dropped, and by batch size the mode and the bodies of one
    layer. `reports` has what the log says at start: by shape, what computes each size, with predicted and measured
    times.
    """
    try:
        from ramp_moe.measurements.calibration_file import records
        from ramp_moe.runtime.layer import LayerRuntime
    except ImportError:
        return {}
    gc.unfreeze()  # engines freeze what they made at start, and frozen objects are not listed
    layers = [found for found in gc.get_objects() if issubclass(type(found), LayerRuntime)]  # proxies may be dead
    gc.freeze()
    if not layers:
        return {}
    dropped = {name: reason for layer in layers for name, reason in layer.dropped.items()}
    graphs = layers[0].graphs
    chosen = {} if graphs is None else graphs.plans
    sizes = {str(n): {"mode": p.mode, "bodies": [c.name for c in p.bodies]} for n, p in sorted(chosen.items())}
    shapes = {layer.shape.slug for layer in layers}
    reports = [
        {"key": r.key, "seconds": r.seconds, "plan": msgspec.to_builtins(r.plan), "left": r.left}
        for r in records()
        if r.key["shape"] in shapes
    ]
    return {"layers": len(layers), "dropped": dropped, "sizes": sizes, "reports": reports}


def start_routing() -> None:
    """Record the ids of each eager batch from now on."""
    global _routed
    _routed = []


def active_experts(batches: list[int]) -> list[float]:
    """Stop recording ids. Returns, for each batch size, the mean number of experts that a layer's batch visits.

    Recorded batches are cut into batches of that size. Empty if none was as large as the largest size.
    """
    global _routed
    found, _routed = [ids for ids in _routed or [] if len(ids) >= max(batches)], None
    means = []
    for n in batches if found else ():
        counts = [len(ids[i : i + n].unique()) for ids in found for i in range(0, len(ids) - n + 1, n)]
        means.append(sum(counts) / len(counts))
    return means


def routing(select: Any) -> Any:
    """Wrap a method that returns weights and ids of a batch's experts: while recording, the ids are kept."""

    def select_experts(self: Any, *args: Any, **options: Any) -> Any:
        found = select(self, *args, **options)
        if _routed is not None and not torch.cuda.is_current_stream_capturing():
            _routed.append(found[1].detach().clone())
        return found

    return select_experts


def answer(what: str, args: Any, model: Any) -> Any:
    """Call a function of this file by name, or `skew` of random_weights with the model's parameters."""
    if what == "skew":
        return random_weights.skew(dict(model.named_parameters()), *args)
    return globals()[what](*args)


def draw(model: Any, *_: Any, **__: Any) -> None:
    """Draw a model's weights, in place of the engine's own random ones."""
    random_weights.fill(dict(model.named_parameters()), os.environ.get(ROUNDED))


def without_experts() -> bool:
    return os.environ.get(WITHOUT_EXPERTS) == "1"
