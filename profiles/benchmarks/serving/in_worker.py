"""What is measured inside an engine's own process, where the model is: `vllm_worker.py` and `sglang_worker.py` bring it
there. Neither engine's code for experts is touched, unless the variant is `without_experts`.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import random_weights
import torch

ROUNDED = "SERVING_ROUNDED"
"""Variable: the dtype whose values the weights of a float32 engine are rounded to."""
WITHOUT_EXPERTS = "SERVING_WITHOUT_EXPERTS"
"""Variable: if 1, experts return zeros, so that a step takes what everything else takes."""
_replays: list[tuple[str, Any, Any, float]] | None = None
"""While recording: kind of graph, start, end, the host's time."""
_routed: list[Any] | None = None
"""While recording: top-k ids of each layer."""


def start_recording() -> None:
    """Record the GPU time of each graph that is replayed from now on."""
    global _replays
    _replays = []


def recorded() -> list[tuple[str, float, float]]:
    """Kind, GPU milliseconds and host second of each replay since, and record no more."""
    global _replays
    torch.cuda.synchronize()
    found, _replays = _replays or [], None
    return [(kind, start.elapsed_time(end), at) for kind, start, end, at in found]


def timed(replay: Any, kind: str) -> Any:
    """A method that replays a graph, with events around it while recording."""

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
    """GiB that torch has allocated and reserved."""
    return {what: getattr(torch.cuda, f"memory_{what}")() / 2**30 for what in ("allocated", "reserved")}


def plans() -> dict[str, Any]:
    """What ramp_moe's layers chose: by batch size the mode and the candidates of the first layer, how many layers there
    are, and which kernels were dropped. Nothing in a variant without them."""
    try:
        from ramp_moe.runtime.layer import LayerRuntime
    except ImportError:
        return {}
    layers = [found for found in gc.get_objects() if issubclass(type(found), LayerRuntime)]  # proxies may be dead
    if not layers:
        return {}
    dropped = {name: reason for layer in layers for name, reason in layer.dropped.items()}
    graphs = layers[0].graphs
    chosen = {} if graphs is None else graphs.plans
    sizes = {str(n): {"mode": p.mode, "bodies": [c.name for c in p.bodies]} for n, p in sorted(chosen.items())}
    return {"layers": len(layers), "dropped": dropped, "sizes": sizes}


def start_routing() -> None:
    """Keep the ids of each eager batch from now on."""
    global _routed
    _routed = []


def active_experts(batches: list[int]) -> list[float]:
    """For each batch size, over how many experts of a layer that many tokens spread, in the mean of the layers' batches
    since; and keep no more. Empty if no eager batch was as large."""
    global _routed
    found, _routed = [ids for ids in _routed or [] if len(ids) >= max(batches)], None
    means = []
    for n in batches if found else ():
        counts = [len(ids[i : i + n].unique()) for ids in found for i in range(0, len(ids) - n + 1, n)]
        means.append(sum(counts) / len(counts))
    return means


def routing(select: Any) -> Any:
    """A method that returns weights and ids of a batch's experts, which keeps the ids while recording."""

    def select_experts(self: Any, *args: Any, **options: Any) -> Any:
        found = select(self, *args, **options)
        if _routed is not None and not torch.cuda.is_current_stream_capturing():
            _routed.append(found[1].detach().clone())
        return found

    return select_experts


def answer(what: str, args: Any, model: Any) -> Any:
    """Call a function of this file by name; `skew` is of the model's parameters."""
    if what == "skew":
        return random_weights.skew(dict(model.named_parameters()), *args)
    return globals()[what](*args)


def draw(model: Any, *_: Any, **__: Any) -> None:
    """In place of an engine's own random weights."""
    random_weights.fill(dict(model.named_parameters()), os.environ.get(ROUNDED))


def without_experts() -> bool:
    return os.environ.get(WITHOUT_EXPERTS) == "1"
