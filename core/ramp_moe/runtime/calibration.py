"""Measures a layer's kernels on this GPU when the layer is loaded, and corrects the cost model by the times.

A search looks for the fastest candidate at each of a few batch sizes, on the layer's own weights. It times the engine's
own path and each kernel's best candidate by the cost model, and corrects the model by their times. If the corrected
model then prefers a candidate that was not timed at that size, the search times that, too. A size is done once the
preferred candidate was timed, or MOST further ones were. The search ends when all sizes are done, or at its deadline.
It begins with sizes far apart, and then takes them in turn. So a search that is cut short knows both small and large
batches.

The correction of a candidate at a size is its measured time over its predicted time. A candidate that was not timed
there takes the mean correction of its kernel, or the largest of all if none of the kernel was timed. For kernels
without a profile, it counts as slower by MARGIN than the slowest candidate that was timed there. Only candidates that
were timed are chosen from then on: they are compiled, and their output was checked.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..cost_model.correction import Corrections
from ..cost_model.model import DEFAULT_FORM, Candidate, CostModel, PartFit, get_form, parts_of
from ..cost_model.roofline import expert_read_us
from ..dispatch.shortlist import DRAWN, met_at
from ..errors import KernelError, RampMoEError
from ..measurements.calibration_file import Timing
from ..measurements.sweep import PATH
from ..measurements.trace import spread_out
from ..spec.hardware import Hardware
from ..spec.kernel import usable_configs
from ..spec.launchable import LaunchableKernel
from ..spec.routing import FloatArray, IntArray, expert_histogram, generate
from ..spec.shapes import MoEShape

ROUTINGS = ("uniform", "zipf1.2")
"""Routings on which each size is timed. Their mean time decides."""
ENGINE = ""
"""Name of the engine's own path among timings."""
MARGIN = 1.02
"""Times that differ by a smaller factor count as equal: the engine's own path is kept if ours is not faster by it."""
MOST = 3
"""Most candidates that are timed at one size beyond those that the search begins with."""
SPREAD = 6
"""Configurations of a kernel that are tried if there is no profile at all, beyond its defaults."""


class Timer(Protocol):
    """Runs candidates on the layer's weights."""

    def time(self, candidate: Candidate | None, topk_ids: IntArray) -> float:
        """Microseconds of one launch with a cold L2.

        candidate: None: the engine's own path. topk_ids: int64 `[T, k]`, of all ranks' experts. Raises whatever the
        kernel raises, and KernelError for a wrong output.
        """
        ...


@dataclass
class Calibration:
    """Times, and what failed. complete: nothing more is to be measured.

    later: names in `dropped` that lacked only memory or time, and that another search may be able to measure.
    """

    timings: list[Timing] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    later: set[str] = field(default_factory=set)

    def us(self, name: str, tokens: int) -> float | None:
        """Mean over the routings; None if one was not timed."""
        found = {t.routing: t.us for t in self.timings if (t.candidate, t.tokens) == (name, tokens)}
        return sum(found.values()) / len(found) if found.keys() == {*ROUTINGS} else None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Batch sizes at which any of our candidates that have not failed was timed, ascending."""
        timed = self.timed
        return tuple(sorted({t.tokens for t in self.timings if t.candidate in timed}))

    @property
    def timed(self) -> set[str]:
        """Names of our candidates that were timed at any size and have not failed."""
        return {t.candidate for t in self.timings if t.candidate != ENGINE} - self.dropped.keys()

    def engine_keeps(self, num_tokens: int, ours: Mapping[int, str]) -> bool:
        """Whether the engine's own path computes batches of this size, since ours is not faster by MARGIN.

        ours: by measured size, the name of our candidate. Between measured sizes the ratio of the times is
        interpolated, with logarithms of ratio and tokens. Returns False if nothing was compared.
        """
        points = [
            (np.log(n), np.log(engine / us))
            for n, name in sorted(ours.items())
            if (engine := self.us(ENGINE, n)) is not None and (us := self.us(name, n)) is not None
        ]
        if not points:
            return False
        sizes, ratios = zip(*points, strict=True)
        return bool(np.interp(np.log(max(num_tokens, 1)), sizes, ratios) < np.log(MARGIN))


def spread(capture_sizes: Sequence[int], most: int) -> list[int]:
    """Batch sizes to measure: powers of two up to `most`, the largest captured size, and `most` itself."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return sorted({*powers, *(n for n in (max(capture_sizes, default=1), most) if 1 <= n <= most)})


def batch_of(routing: str, tokens: int, num_experts: int, top_k: int) -> IntArray:
    """Top-k ids int64 `[tokens, top_k]` of a timing, always the same. Beyond DRAWN tokens the ids repeat."""
    drawn = generate(routing, min(tokens, DRAWN), num_experts, top_k, seed=tokens)
    return np.resize(drawn, (tokens, top_k))


def coarse_first(sizes: Sequence[int]) -> list[int]:
    """Reorder sizes: the first, the last, the one in the middle, those in the middle of the halves, and so on."""
    order, gaps = [0, len(sizes) - 1], [(0, len(sizes) - 1)]
    for low, high in gaps:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [sizes[i] for i in dict.fromkeys(order)]


class Search:
    """The search for one shape.

    kernels: those that run here. The search looks at their candidates alone.
    model: None if there is no profile. It may have candidates of other kernels, too.
    sizes: batch sizes to measure, ascending.
    ep_size: ranks that share the experts, of which the shape has one rank's.
    known: what an earlier search measured, which is not measured again. Times of others than these kernels' candidates
        are left out of it.
    engine: whether the engine has a path of its own on these weights, which is timed, too.

    Of kernels without a profile the defaults are timed, and without a model SPREAD other configurations, too.
    """

    def __init__(
        self,
        shape: MoEShape,
        hardware: Hardware,
        kernels: Sequence[LaunchableKernel],
        model: CostModel | None,
        sizes: Sequence[int],
        ep_size: int = 1,
        known: Calibration | None = None,
        engine: bool = True,
    ) -> None:
        self._engine = (ENGINE,) if engine else ()
        self.shape, self._ep_size, self.sizes = shape, ep_size, tuple(sizes)
        self.found = known or Calibration()
        model = None if model is None else of_kernels(model, {k.name for k in kernels})
        profiled = set() if model is None else {c.kernel for c in model.candidates}
        guessed = [k for k in kernels if k.name not in profiled]
        self._guessed = {k.name for k in guessed}
        """Kernels without a profile. Their predicted times mean nothing."""
        self._defaults = {n: _defaults(shape, hardware, guessed, n) for n in self.sizes}
        tried = {c.name: c for c in itertools.chain.from_iterable(self._defaults.values())}
        if model is None:
            tried |= {c.name: c for c in _spread(shape, hardware, guessed)}
        self.model = guess(shape, hardware, model, list(tried.values()))
        self._others = list(tried) if model is None else []
        """Names of candidates that are timed at every size."""
        self._by_name = {c.name: c for c in self.model.candidates}
        known_names = {ENGINE, *self._by_name}
        self.found.timings = [t for t in self.found.timings if t.candidate in known_names]
        self._kernel = np.array([c.kernel for c in self.model.candidates])
        self._contends = set(self.model.contenders.tolist())
        self._predicted: dict[int, FloatArray] = {}
        self._means: dict[int, FloatArray] = {}

    def run(self, timer: Timer, deadline: float, clock: Callable[[], float] = time.monotonic) -> Calibration:
        """Measure until there is nothing more to measure, or `deadline` on the clock is past.

        What is found is not complete if the engine's own path or all of ours failed, or if something lacked only memory
        or time: the next search then tries what failed again.
        """
        for name, tokens in self._steps():
            if clock() >= deadline:
                return self.found
            self._time(timer, name, tokens)
        self.found.complete = bool(self.found.timed) and not self.found.later and ENGINE not in self.found.dropped
        return self.found

    def _steps(self) -> Iterator[tuple[str, int]]:
        """Pairs of a candidate's name and a size to time it at. Each follows from the times before it."""
        for tokens in coarse_first(self.sizes):
            while (first := self._first(tokens)) is not None:
                yield first, tokens
        todo = list(self.sizes)
        while todo:
            for tokens in list(todo):
                if (name := self._next(tokens)) is None:
                    todo.remove(tokens)
                else:
                    yield name, tokens

    def corrected(self) -> CostModel:
        """The corrected model, of the candidates that were timed. Raises KernelError if none was."""
        gone = self._by_name.keys() - self.found.timed
        if len(gone) == len(self._by_name):
            reasons = (
                "; ".join(f"{name}: {reason}" for name, reason in self.found.dropped.items()) or "no time was left"
            )
            raise KernelError(f"nothing could be timed ({reasons})")
        return self.model.without(gone).corrected(self.corrections())

    def chosen(self, model: CostModel) -> dict[int, str]:
        """The name of the candidate that a corrected model chooses for a size alone, by measured size."""
        return {n: model.candidates[best(model.at(n), n, self._ep_size)].name for n in self.found.tokens}

    def predicted(self, name: str, tokens: int) -> float | None:
        """Microseconds that the uncorrected cost model predicts for the timed batches; None without a profile."""
        known = self._by_name[name].kernel not in self._guessed
        return float(self._expected(tokens)[list(self._by_name).index(name)]) if known else None

    def corrections(self) -> Corrections:
        """The corrections of every candidate of the model, at the sizes that were timed."""
        sizes = self.found.tokens
        rows = np.stack([self._log_factors(n) for n in sizes], 1)
        return Corrections(sizes, {c.name: rows[i] for i, c in enumerate(self.model.candidates)})

    def wanted(self) -> list[Candidate]:
        """The candidates that the search begins with, which are compiled before it. Those of most sizes come first."""
        count = Counter(itertools.chain.from_iterable(self._begin(n) for n in self.sizes))
        return [self._by_name[name] for name, _ in count.most_common()]

    def _first(self, tokens: int) -> str | None:
        """The next of what the search begins with at a size; None if all of it was timed."""
        return next((name for name in (*self._engine, *self._begin(tokens)) if self._open(name, tokens)), None)

    def _next(self, tokens: int) -> str | None:
        """The next to time at a size, after what the search begins with; None if the size is done."""
        if (other := next((n for n in self._others if self._open(n, tokens)), None)) is not None:
            return other
        timed = sum(self.found.us(n, tokens) is not None for n in self._by_name)
        if timed >= len(self._begin(tokens)) + len(self._others) + MOST:
            return None
        expected = self._mean(tokens) * np.exp(self._log_factors(tokens))
        for i in np.argsort(expected, kind="stable").tolist():
            name = self.model.candidates[i].name
            if i in self._contends and name not in self.found.dropped:
                return name if self._open(name, tokens) else None
        return None

    def _open(self, name: str, tokens: int) -> bool:
        return name not in self.found.dropped and self.found.us(name, tokens) is None

    def _begin(self, tokens: int) -> list[str]:
        """Names of what to time first at a size: each kernel's best by the model, or its default."""
        names = [c.name for c in self._defaults[tokens]]
        expected, dropped = self._mean(tokens), self.found.dropped
        for kernel in dict.fromkeys(self._kernel.tolist()):
            mine = [i for i in np.flatnonzero(self._kernel == kernel).tolist() if i in self._contends]
            left = [i for i in mine if self.model.candidates[i].name not in dropped]
            if left and kernel not in self._guessed:
                names.insert(0, self.model.candidates[min(left, key=lambda i: float(expected[i]))].name)
        return names

    def _time(self, timer: Timer, name: str, tokens: int) -> None:
        times = []
        for routing in ROUTINGS:
            try:
                ids = batch_of(routing, tokens, self.shape.num_experts * self._ep_size, self.shape.top_k)
                us = timer.time(self._by_name.get(name), ids)
                if not 0 < us < math.inf:
                    raise KernelError(f"the GPU's clock says that it takes {us:g} us")
                times.append(Timing(tokens, routing, name, us))
            except Exception as e:  # whatever a kernel raises
                import torch

                if isinstance(e, torch.OutOfMemoryError):
                    self.found.later.add(name)
                told = " ".join(str(e).split())
                self.found.dropped[name] = told if isinstance(e, RampMoEError) else f"{type(e).__name__}: {told}"
                return
        self.found.timings += times

    def _expected(self, tokens: int) -> FloatArray:
        """Uncorrected predictions in microseconds `[candidates]`, the mean over the timed batches."""
        if tokens not in self._predicted:
            every = self.shape.num_experts * self._ep_size
            ids = (batch_of(routing, tokens, every, self.shape.top_k) for routing in ROUTINGS)
            here = np.stack([expert_histogram(i, every)[: self.shape.num_experts] for i in ids])
            self._predicted[tokens] = self.model.cost(here).mean(0)
        return self._predicted[tokens]

    def _mean(self, tokens: int) -> FloatArray:
        """Uncorrected predictions in microseconds `[candidates]`, by `mean_us`."""
        if tokens not in self._means:
            self._means[tokens] = mean_us(self.model, tokens, self._ep_size)
        return self._means[tokens]

    def _log_factors(self, tokens: int) -> FloatArray:
        """Logarithms of the corrections `[candidates]` at one size; 0 if nothing was timed there."""
        expected, candidates = self._expected(tokens), self.model.candidates
        us = np.array([np.nan if (t := self.found.us(c.name, tokens)) is None else t for c in candidates])
        known, logs = np.isfinite(us), np.log(us / expected)
        if not known.any():
            return np.zeros(len(candidates))
        for kernel in set(self._kernel.tolist()):
            mine, rest = self._kernel == kernel, ~known & (self._kernel == kernel)
            if kernel in self._guessed:
                logs[rest] = np.log(MARGIN * us[known].max() / expected[rest])
            else:
                logs[rest] = logs[mine & known].mean() if (mine & known).any() else logs[known].max()
        return logs


def mean_us(model: CostModel, tokens: int, ep_size: int) -> FloatArray:
    """Predicted microseconds `[candidates]`, the mean over the batches of `met_at`."""
    us: FloatArray = model.cost(met_at(tokens, model.num_experts, model.shape.top_k, ep_size)).mean(0)
    return us


def best(model: CostModel, tokens: int, ep_size: int) -> int:
    """Index of the contender that is predicted to be fastest for a size alone."""
    us = mean_us(model, tokens, ep_size)[model.contenders]
    return int(model.contenders[int(us.argmin())])


def of_kernels(model: CostModel, kernels: Collection[str]) -> CostModel | None:
    """The model of these kernels' candidates alone. None if it has none of them."""
    others = {c.name for c in model.candidates if c.kernel not in kernels}
    return None if len(others) == len(model.candidates) else model.without(others)


def guess(shape: MoEShape, hardware: Hardware, model: CostModel | None, candidates: Sequence[Candidate]) -> CostModel:
    """The model, extended by candidates that were never measured. They take as long as reading all experts' weights,
    whatever the batch, which is no less than any batch can take.

    Corrections bring them to the measured times. model: None: the result has these candidates alone.
    """
    form, stages = (DEFAULT_FORM, (PATH,)) if model is None else (model.form, model.stages)
    terms = (shape.num_experts * expert_read_us(shape, hardware), *[0.0] * (len(get_form(form).terms) - 1))
    nothing = (0.0, *terms[1:])
    fits: dict[str, PartFit] = {} if model is None else dict(model.fits)
    for candidate in candidates:
        for i, part in enumerate(parts_of(candidate, stages)):
            of_part = nothing if i else terms
            fits.setdefault(part.key, PartFit(part, of_part, 1, 0.0, 0.0, (0.0, np.inf), (0, shape.num_experts), 0.0))
    known = () if model is None else model.candidates
    measured = () if model is None else model.measured
    histograms, residuals = (None, ()) if model is None else (model.histograms, model.residuals)
    every = [*known, *candidates]
    measured_on = None if model is None else model.measured_on
    about = shape, hardware, form, every, fits, stages, measured, histograms, residuals
    return CostModel(*about, measured_on=measured_on)


def _defaults(shape: MoEShape, hardware: Hardware, kernels: Sequence[LaunchableKernel], tokens: int) -> list[Candidate]:
    found = []
    for kernel in kernels:
        try:
            found.append(Candidate(kernel.name, kernel.default_config(shape, hardware, tokens)))
        except Exception:  # a plugin's own mistake: its other configurations may do
            continue
    return found


def _spread(shape: MoEShape, hardware: Hardware, kernels: Sequence[LaunchableKernel]) -> Iterator[Candidate]:
    """SPREAD configurations of each kernel, evenly spread over all."""
    for kernel in kernels:
        configs = usable_configs(kernel, shape, hardware)
        for i in spread_out(len(configs), SPREAD):
            yield Candidate(kernel.name, configs[i])
