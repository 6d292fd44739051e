"""How well measurements repeat: the same batches and configurations, measured in several runs of a profile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cost_model.model import Candidate, path_bounds, path_times
from ..dispatch.load_model import view
from ..measurements.sweep import PATH, Sweep, path_key
from ..spec.kernel import KernelConfig
from ..spec.routing import FloatArray

RANGES_US = (30.0, 100.0, 300.0, 1000.0)
"""Bounds of the ranges of latency for which the spread is told. Launches dominate the lowest range, clocks the highest.
"""


@dataclass(frozen=True, slots=True)
class Spread:
    """Cells of one range of latency (microseconds, from `low` up to `high`), each measured in two runs.

    median and p95 are of |b / a - 1|, b being the later run. `offset` is the median of b / a - 1, which a faster or
    slower chip shifts.
    """

    low: float
    high: float
    cells: int
    median: float
    p95: float
    offset: float


def spread(sweep: Sweep, close: float = math.inf) -> list[Spread]:
    """Tell how far two runs of a sweep's whole paths differ, by range of latency. If it has no paths, its stages count.

    Every pair of runs counts, on cells within `close` times their batch's best. The last entry is over all ranges. The
    list is empty if cells were measured once.
    """
    seen = view(sweep)
    near = seen.times_us <= close * np.nanmin(seen.times_us, axis=1, keepdims=True)
    times = np.where(seen.bounded | ~near, np.nan, seen.runs_us)
    pairs = [np.stack([times[a], times[b]], -1) for a, b in itertools.combinations(range(len(times)), 2)]
    both = np.concatenate([p[np.isfinite(p).all(-1)] for p in pairs]) if pairs else np.empty((0, 2))
    if not len(both):
        return []
    low = (0.0, *RANGES_US, 0.0)
    high = (*RANGES_US, np.inf, np.inf)
    mean = np.sqrt(both.prod(-1))
    found = [(a, b, both[(a <= mean) & (mean < b)]) for a, b in zip(low, high, strict=True)]
    return [_spread(a, b, cells) for a, b, cells in found if len(cells)]


def _spread(low: float, high: float, cells: FloatArray) -> Spread:
    ratio = cells[:, 1] / cells[:, 0] - 1
    size = np.abs(ratio)
    return Spread(
        low, high, len(cells), float(np.median(size)), float(np.quantile(size, 0.95)), float(np.median(ratio))
    )


def stage_bias(sweep: Sweep, configs: Sequence[KernelConfig]) -> FloatArray:
    """Sum of a path's stages, timed one by one, over the whole path, less 1.

    Returns a value for each batch and configuration that has both; empty if there are none.
    """
    kinds = [k for k in sweep.stages if k != PATH]
    if PATH not in sweep.stages or not kinds:
        return np.empty(0)
    columns = sweep.column_of
    timed = [
        c
        for c in (Candidate(sweep.kernel, config) for config in configs)
        if path_key(c.kernel, c.config.name) in columns and all(s.key in columns for s in c.config.stages)
    ]
    if not timed:
        return np.empty(0)
    paths = sweep.only([PATH])
    bias = path_times(sweep.only(kinds), timed) / path_times(paths, timed) - 1
    return np.asarray(bias[np.isfinite(bias) & ~path_bounds(paths, timed)])
