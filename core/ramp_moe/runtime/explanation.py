"""Explains which candidate a layer runs for a batch size, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cost_model.model import Candidate
from ..dispatch.explanation import in_parts, rank
from ..errors import ShapeError
from ..spec.routing import expert_histogram, generate

if TYPE_CHECKING:
    from .layer import LayerRuntime

SHOWN = 10
"""Most candidates that the text lists."""


@dataclass(frozen=True)
class Explanation:
    """Which candidate an eager batch of `tokens` runs. `str` is a text for a person.

    candidate: the choice.
    why: what decides it.
    candidates: all that the cost model predicts for uniform routing, the fastest first; empty without a cost model.
        Each has `kernel`, `config`, `predicted_us`, `extrapolated`, `gemms`, `max_tokens` and `launches`.
    graph: how a CUDA graph of this size dispatches; None if none was warmed up.
    notes: in which layouts the weights are held, what was left out, and other remarks.
    """

    title: str
    tokens: int
    candidate: Candidate
    why: str
    candidates: tuple[dict[str, Any], ...]
    graph: str | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        names = [f"{c['kernel']}/{c['config']}" for c in self.candidates[:SHOWN]]
        width = max(map(len, names), default=0)
        rows = [
            f"  {name:<{width}}  {c['predicted_us']:9.1f} us{'  extrapolated' if c['extrapolated'] else ''}"
            for name, c in zip(names, self.candidates, strict=False)
        ]
        if rows:
            shown = f"the fastest {len(rows)} of {len(self.candidates)}" if len(rows) < len(self.candidates) else "all"
            rows.insert(0, f"predicted, {shown}:")
        lines = [self.title, f"runs {self.candidate.name}: {self.why}", *rows]
        if self.graph is not None:
            lines.append(f"in a CUDA graph: {self.graph}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain(layer: LayerRuntime, tokens: int) -> Explanation:
    """Do what `MoELayer.explain` describes."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ShapeError(f"a batch has a whole number of tokens, 1 or more, not {tokens!r:.60}")
    shape, chooser = layer.shape, layer.chooser
    by_size = chooser.choice_by_batch_size(tokens, layer.host_sync_us)
    if chooser.dispatcher is None:
        assert by_size is not None
        candidate, why, candidates = by_size, "no cost model, so it is the kernel's default for the batch size", []
    else:
        ids = generate("uniform", tokens, shape.num_experts * layer.ep_size, shape.top_k, seed=0)
        histogram = expert_histogram(ids, shape.num_experts * layer.ep_size)[: shape.num_experts]
        candidates = rank(layer.kernels, chooser.dispatcher.model, histogram)
        if by_size is not None:
            candidate = by_size
            why = (
                f"the batch size decides, since the histogram is predicted to gain less than {layer.host_sync_us:g} us"
            )
        else:
            candidate = chooser.dispatcher.choose(histogram).candidate
            why = "predicted to be fastest; each batch's expert histogram decides, here that of uniform routing"
    plan = layer.graphs.plans.get(tokens) if layer.graphs is not None else None
    graph = None if plan is None else f"mode {plan.mode} ({plan.why}): {', '.join(c.name for c in plan.bodies)}"
    held = f"weights in {' and '.join(layer.layouts)}"
    left_out = layer.dropped | (layer.graphs.dropped if layer.graphs is not None else {})
    notes = (held, *in_parts(candidates), *(f"{name} left out: {reason}" for name, reason in left_out.items()))
    title = f"{shape.title} on {layer.hardware.name}, {tokens:,} tokens"
    return Explanation(title, tokens, candidate, why, tuple(candidates), graph, notes)
