"""Computes the tables on shortlists in the README beside this from the shipped profiles.

`python profiles/pages.py --write shortlists` fills the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pages import table
from ramp_moe import CostModel
from ramp_moe.dispatch.shortlist import MARGIN, MOST, Shortlist, shortlist
from ramp_moe.evaluation.comparison import Ratios
from ramp_moe.evaluation.replay import Replay
from ramp_moe.runtime.graphs.capture import OVERHEAD_US
from ramp_moe.spec.routing import FloatArray, IntArray
from studies.profiles.tables import CASES
from studies.shipped import MODELS, fitted, split

FORMS = ("active", "smooth")
FEWER = (8, 4, 2, 1)
FREE = {1: 0.0, MOST: 0.0}
ADDED_US = OVERHEAD_US["nodes"]
"""Microseconds that switching adds to a launch, by the number of bodies."""
CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Batch sizes of the graphs whose numbers of bodies are shown."""


class Known(CostModel):
    """A cost model that predicts a set of batches only once. Several tables need the same batches."""

    def __init__(self, model: CostModel) -> None:
        self.__dict__.update(model.__dict__)
        self.known: dict[tuple[tuple[int, ...], bytes], FloatArray] = {}

    def cost(self, histograms: IntArray) -> FloatArray:
        key = histograms.shape, histograms.tobytes()
        if key not in self.known:
            self.known[key] = super().cost(histograms)
        return self.known[key]


@dataclass(frozen=True)
class Case:
    """Held-out batches of a model, dtype and set of kernels, and a cost model fitted on the other batches."""

    name: tuple[str, str]
    test: Replay
    model: CostModel

    @property
    def tokens(self) -> list[int]:
        return [tokens for tokens, _ in self.test.labels]

    def lists(self, overhead_us: Mapping[int, float], margin: float) -> list[Shortlist]:
        """The shortlist of each batch, which depends on its number of tokens alone."""
        of = {n: shortlist(self.model, n, overhead_us, margin=margin) for n in dict.fromkeys(self.tokens)}
        return [of[n] for n in self.tokens]

    def chosen(self, columns: Sequence[Sequence[int]]) -> FloatArray:
        """Measured microseconds `[batches]` of the model's choice among the columns given for each batch."""
        us = self.model.cost(self.test.histograms)
        picked = [c[int(row[list(c)].argmin())] for row, c in zip(us, columns, strict=True)]
        return self.test.times_us[np.arange(len(us)), picked]


@cache
def cases(form: str) -> list[Case]:
    found = []
    # By model: those of one shape share their draws.
    for dtype, kernels, model in sorted(CASES, key=lambda case: MODELS.index(case[2])):
        _, test = split(model, dtype, kernels)
        found.append(Case((model, f"{' + '.join(kernels)} {dtype}"), test, Known(fitted(model, dtype, kernels, form))))
    return found


@cache
def lost(form: str) -> FloatArray:
    """Mean regret `[cases, 1 + len(FEWER)]` on measured times. The first column chooses from all candidates, the others
    from shortlists with at most as many candidates as FEWER says."""
    rows = []
    for case in cases(form):
        lists = [s.columns for s in case.lists(FREE, 0.0)]
        every = [range(len(case.test.candidates))] * len(lists)
        best = case.test.times_us.min(1)
        # Greedy: a shorter list is the beginning of a longer one.
        columns = [every, *([c[:most] for c in lists] for most in FEWER)]
        rows.append([float((case.chosen(c) / best).mean() - 1) for c in columns])
    return np.array(rows)


def pruning() -> str:
    """Regret that shorter lists add to the regret of choosing from all candidates."""
    rows: list[list[object]] = [[*c.name, len(c.tokens), len(c.test.candidates)] for c in cases(FORMS[0])]
    rows.append(["**mean**", "", "", ""])
    head = ["model", "kernels", "batches", "candidates"]
    for form in FORMS:
        head += [f"{form}: regret of all", *(f"at most {n}" for n in FEWER)]
        for row, (every, *few) in zip(rows, [*lost(form), lost(form).mean(0)], strict=True):
            row += [f"{every:.2%}", *(f"{x - every:+.2%}" for x in few)]
    return table(head, rows)


def bodies() -> str:
    """Bodies in a graph at the overhead assumed, by number of tokens, for the two forms."""
    rows: list[Sequence[object]] = []
    every = list(zip(*(cases(form) for form in FORMS), strict=True))
    for pair in every:
        counts = [[len(shortlist(c.model, n, ADDED_US).columns) for n in CAPTURED] for c in pair]
        if max(map(max, counts)) > 1:
            rows.append((*pair[0].name, *(" / ".join(map(str, cell)) for cell in zip(*counts, strict=True))))
    rows.append(("", f"the {len(every) - len(rows)} others", *["1 / 1"] * len(CAPTURED)))
    return table(("model", "kernels", *map(str, CAPTURED)), rows)


@dataclass(frozen=True)
class Switched:
    """Values per batch, each `[batches]`.

    tokens         number of tokens
    bodies         number of bodies in its graph
    single_us      measured microseconds of the first body
    chosen_us      measured microseconds of the chosen body
    predicted_us   microseconds that choosing is predicted to save
    overhead_us    microseconds assumed for switching
    """

    tokens: IntArray
    bodies: IntArray
    single_us: FloatArray
    chosen_us: FloatArray
    predicted_us: FloatArray
    overhead_us: FloatArray


def switched(case: Case, margin: float) -> Switched:
    lists = case.lists(ADDED_US, margin)
    return Switched(
        np.array(case.tokens),
        np.array([len(s.columns) for s in lists]),
        case.chosen([s.columns[:1] for s in lists]),
        case.chosen([s.columns for s in lists]),
        np.array([s.gain_us for s in lists]),
        np.array([s.overhead_us for s in lists]),
    )


def switch() -> str:
    """Measured time of the best single body in every graph over that of the shortlists' choice with its overhead."""
    rows = []
    for form in FORMS:
        for margin in (0.0, MARGIN):
            parts = [switched(case, margin) for case in cases(form)]
            found = Switched(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Switched)))
            small = found.tokens <= CAPTURED[-1]
            rows += [(form, f"{margin:.0%}", f"up to {CAPTURED[-1]}", *_judged(found, small))]
            rows += [(form, f"{margin:.0%}", "more", *_judged(found, ~small))]
    head = ("form", "margin", "tokens", "batches", "with several bodies", "single over chosen (min to max)",
            "over 2% slower", "saved before overhead, with several: predicted", "measured")  # fmt: skip
    return table(head, rows)


def _judged(found: Switched, seen: NDArray[np.bool_]) -> tuple[object, ...]:
    ratio = (found.single_us / (found.chosen_us + found.overhead_us))[seen]
    several = seen & (found.bodies > 1)
    r = Ratios.of(ratio)
    return (
        len(ratio),
        f"{several.sum() / seen.sum():.1%}",
        f"{r.geomean:.4f}x ({r.min:.2f} to {r.max:.2f})",
        f"{(ratio < 0.98).mean():.1%}",
        f"{found.predicted_us[several].mean():.1f} us",
        f"{(found.single_us - found.chosen_us)[several].mean():.1f} us",
    )


TABLES = {f.__name__: f for f in (pruning, bodies, switch)}
