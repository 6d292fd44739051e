"""A cost model for a shape that nobody has measured, from the same kernel's sweeps of other shapes.

A configuration's coefficients go with what the shape makes of its grid: the time of a CTA, and so of a wave, with the
weights that one CTA multiplies (its weight rows times its share of the reduction), the time of an active expert with
its bytes. In these units one set of coefficients is fitted to the batches of all shapes together. It is a first guess,
which nothing corrects: for shapes that were left out it loses 2% to 5.8%, mostly five times what a profile does; one
configuration for everything loses 6% to 16% (`examples/study`). Every choice by it says that it extrapolates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .cost_model import Candidate, CostModel, Part, PartFit, candidates_of, get_form, parts_of, path_times
from .errors import ProfileError
from .fitting import RESIDENT, least_squares
from .grids import Grids
from .hardware import Hardware
from .kernel import KernelConfig
from .routing import FloatArray
from .shapes import MoEShape
from .sweep import MIN_US, PATH, Sweep

FORM = "active"


def transfer(
    sweeps: Sequence[Sweep],
    configs_of: Callable[[MoEShape], Sequence[KernelConfig]],
    shape: MoEShape,
    hardware: Hardware,
) -> CostModel:
    """A model for `shape`, fitted to sweeps of other shapes, of those of the kernel's configurations there that one of
    them has timed as a whole path; `configs_of` gives a shape's.

    Raises ProfileError where there is no such configuration.
    """
    known = [s.only([PATH]) for s in sweeps if PATH in s.stages]
    candidates = [Candidate(sweeps[0].kernel, c) for c in configs_of(shape)] if known else []
    fits: dict[str, PartFit] = {}
    for resident in RESIDENT if known else ():
        seen = [_terms_and_times(s, candidates, configs_of(s.shape), hardware, resident) for s in known]
        terms, times = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
        coefficients, relative = least_squares(terms, times, get_form(FORM).non_negative)
        for i, candidate in enumerate(candidates):
            error = relative[np.isfinite(relative[:, i]), i]
            if len(error) < terms.shape[-1]:
                continue
            part = _part(candidate, resident)
            rms_error = float(np.sqrt(np.mean(error**2)))
            if part.key not in fits or rms_error < fits[part.key].rms_error:
                fits[part.key] = PartFit(
                    part,
                    tuple((coefficients[i] * _units(part, shape)).tolist()),
                    rows=len(error),
                    rms_error=rms_error,
                    max_error=float(np.abs(error).max()),
                    # No batch of this shape was fitted to: all are outside.
                    ctas_range=(np.inf, -np.inf),
                    active_range=(1, 0),
                    floor_us=MIN_US,
                )
    if not fits:
        raise ProfileError(f"no whole path of a configuration for {shape.label} was measured on another shape")
    kept = [c for c in candidates if _part(c, 1).key in fits]
    source = f"{sweeps[0].kernel} on other shapes ({', '.join(s.shape.label for s in known)}), not on {shape.label}"
    return CostModel(shape, hardware, FORM, kept, fits, [PATH], [source])


def _terms_and_times(
    sweep: Sweep,
    candidates: Sequence[Candidate],
    configs: Sequence[KernelConfig],
    hardware: Hardware,
    resident: int,
) -> tuple[FloatArray, FloatArray]:
    """Of the sweep's batches to fit on: terms in units `[rows, candidates, terms]`, and times `[rows, candidates]`, NaN
    for a candidate whose configuration of the same name it has not."""
    tune = sweep.select(sweep.rows_of("tune"))
    there = candidates_of(tune, configs)
    parts = [_part(c, resident) for c in there]
    grids = Grids([p.grids for p in parts], hardware.num_sms)
    counts = grids.count(tune.histograms)
    ctas = grids.ctas(counts)
    found = np.stack([grids.by_part(name, counts, ctas) for name in get_form(FORM).terms], axis=-1)
    found *= [_units(part, sweep.shape) for part in parts]
    place = {c.name: i for i, c in enumerate(candidates)}
    columns = [(i, place[c.name]) for i, c in enumerate(there) if c.name in place]
    here, to = [i for i, _ in columns], [j for _, j in columns]
    terms = np.zeros((len(tune.histograms), len(candidates), found.shape[-1]))
    times = np.full(terms.shape[:2], np.nan)
    terms[:, to], times[:, to] = found[:, here], path_times(tune, there)[:, here]
    return terms, times


def _part(candidate: Candidate, resident: int) -> Part:
    """Its path, with so many times the CTAs on an SM at a time."""
    (part,) = parts_of(candidate, [PATH])
    return part.with_residents([resident * g.ctas_per_sm for g in part.grids])


def _units(part: Part, shape: MoEShape) -> list[float]:
    """What a coefficient of each of FORM's terms goes with: nothing; a CTA's weights, in millions of elements; the
    same; an expert's megabytes."""
    first = part.grids[0]
    weights = first.block_weights * first.reduction / first.split_k / 1e6
    return [1.0, weights, weights, shape.expert_bytes / 1e6]
