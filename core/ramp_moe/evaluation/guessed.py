"""What `ramp-moe compare` shows of a shape or device without a profile: predictions that rest on other ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..cost_model.model import DEFAULT_FORM, CostModel
from ..dispatch.load_model import load_model
from ..dispatch.profile_store import ProfileStore
from ..measurements.trace import Trace
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.routing import TUNE_KINDS, FloatArray, IntArray, expert_histogram, generate
from ..spec.shapes import MoEShape
from .comparison import Comparison, compare_predicted, trace_batches
from .regret import TABLE_SIZES, static_table

SEEDS = (1, 2, 3, 4)
"""Seeds of the batches of each kind and size."""


def compare_guessed(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str] = (),
    trace: Trace | None = None,
    form: str = DEFAULT_FORM,
) -> Comparison:
    """Predict what each policy would cost, by `load_model`, on a trace or on routings that profiles are tuned on.

    Static dispatch is the table that is predicted to be best for uniform batches. Raises what `load_model` raises, and
    RoutingError if the trace is of another shape.
    """
    if trace is not None:
        trace.require(shape)
    model, notes = load_model(registry, store, shape, hardware, kernels, form)
    kinds = _batches(shape) if trace is None else trace_batches(trace, shape.num_experts)
    found = compare_predicted(model, _static_table(model), kinds)
    tuned = "static dispatch is the table that is predicted to be best for uniform batches"
    return replace(found, notes=[*notes, *found.notes, tuned])


def _static_table(model: CostModel) -> dict[int, int]:
    """The predicted-fastest candidate by batch size, on uniform routing."""
    sizes = [2**i for i in range(TABLE_SIZES[-1].bit_length())]
    drawn = [_drawn(model.shape, "uniform", tokens) for tokens in sizes]
    labels = [(tokens, "uniform") for tokens, batches in zip(sizes, drawn, strict=True) for _ in batches]
    return static_table(model.cost(np.concatenate(drawn)), labels)


def _batches(shape: MoEShape) -> Iterator[tuple[str, int, list[int], IntArray, FloatArray]]:
    for kind in TUNE_KINDS:
        for tokens in TABLE_SIZES:
            histograms = _drawn(shape, kind, tokens)
            yield kind, len(histograms), [tokens] * len(histograms), histograms, np.ones(len(histograms))


def _drawn(shape: MoEShape, kind: str, tokens: int) -> IntArray:
    """Histograms `[SEEDS, num_experts]`."""
    ids = (generate(kind, tokens, shape.num_experts, shape.top_k, seed) for seed in SEEDS)
    return np.stack([expert_histogram(i, shape.num_experts) for i in ids])
