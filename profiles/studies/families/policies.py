"""The batches of every model and dtype, and the measured time of each policy on them. All families with a profile share
one set of batches. Choices are fitted or tuned on other batches than those that judge them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.weight_layouts import LayoutChoice, choose_layouts, kernel_times
from ramp_moe.evaluation.regret import Labels, single_choice, static_table, table_choice, table_choices
from ramp_moe.spec.launchable import LaunchableKernel
from ramp_moe.spec.routing import FloatArray, IntArray
from studies.shipped import MODELS, h200, registry, split, store

OVERHEADS = Path(__file__).parents[2] / "benchmarks" / "graph_dispatch"
DTYPES = ("fp8", "bf16")
FAMILIES = ("alpha_moe", "deep_gemm", "flashinfer_cutlass", "vllm_triton", "triton", "cute")
OURS = ("triton", "cute")
REGIMES = {"up to 16": (1, 16), "17 to 512": (17, 512), "513 and more": (513, 1 << 30)}
CHOOSE_AMONG = 8
"""Number of candidates for which the time of choosing on the device is counted."""

present = [f for f in FAMILIES if any(store.find(f, registry.shape(m, d), h200) for m in MODELS for d in DTYPES)]


@dataclass(frozen=True, slots=True)
class Cell:
    """A batch: the winner in hindsight, the choice of dispatch over all families, and microseconds by policy. `us`
    lacks policies without a measurement. A batch to fit on has only its winner."""

    model: str
    dtype: str
    tokens: int
    routing: str
    best: str
    chosen: str
    us: Mapping[str, float]

    @property
    def regime(self) -> str:
        return next(name for name, (low, high) in REGIMES.items() if low <= self.tokens <= high)

    def over(self, policy: str, variant: str) -> float:
        """Speed-up of a variant of dispatch over a policy. NaN if the policy was not measured."""
        return self.us.get(policy, np.nan) / self.us[variant]


def graph_rows(model: str, what: str, tokens: int) -> list[dict[str, float]]:
    """Overheads measured at the smallest batch of at least as many tokens, or at the largest batch."""
    rows = json.loads((OVERHEADS / f"h200_{model}.json").read_text())[what]
    sizes = sorted({r["tokens"] for r in rows})
    size = next((s for s in sizes if s >= tokens), sizes[-1])
    return [r for r in rows if r["tokens"] == size]


@cache
def choosing_us(model: str, tokens: int) -> float:
    """Microseconds of the kernel that evaluates the cost model on the device."""
    return next(r["select_us"] for r in graph_rows(model, "selection", tokens) if r["candidates"] == CHOOSE_AMONG)


@cache
def switching_us(model: str, tokens: int) -> float:
    """Microseconds that a layer in a graph takes beyond its body, with the most bodies that were measured. The faster
    of the modes that can hold any kernel counts."""
    rows = graph_rows(model, "bodies", tokens)
    most = {
        mode: max((r for r in rows if r["mode"] == mode), key=lambda r: r["bodies"]) for mode in ("nodes", "switch")
    }
    return min(r["overhead_us"] for r in most.values())


class Case:
    """A model in a dtype, with all families that have a profile. The batches that they share are those to tune on and
    those to judge. Policies are evaluated on the latter."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model, self.dtype, self.shape = model, dtype, registry.shape(model, dtype)
        names = [f for f in FAMILIES if store.find(f, self.shape, h200)]
        self.tune, self.test = tune, test = split(model, dtype, tuple(names))
        # As in a user's dispatch: each kernel's model is fitted on all tune batches of that kernel.
        self.fit, _ = load_model(registry, store, self.shape, h200, names)
        at = {c.name: i for i, c in enumerate(self.fit.candidates)}
        columns = [at[c.name] for c in test.candidates]
        self.tuned_us, self.judged_us = (self.fit.cost(s.histograms)[:, columns] for s in (tune, test))
        self.family = np.array([c.kernel for c in test.candidates])
        self.families = [f for f in FAMILIES if f in self.family]

    def layouts(self, copies: int) -> LayoutChoice:
        """The layouts that a layer would hold, by predicted times on the tune batches."""
        kernels = [registry.kernel(f) for f in self.families]
        times = kernel_times(self.fit, self.families, self.tune.histograms)
        return choose_layouts(self.shape, kernels, copies, times)

    def of(self, families: Iterable[str]) -> IntArray:
        return np.flatnonzero(np.isin(self.family, list(families)))

    def static(self, families: Iterable[str], labels: Labels) -> IntArray:
        columns = self.of(families)
        return columns[table_choices(static_table(self.tune.times_us[:, columns], labels), self.test.labels)]

    def dispatched(self, families: Iterable[str]) -> IntArray:
        columns = self.of(families)
        return columns[self.judged_us[:, columns].argmin(1)]

    def own_choice(self, family: str) -> list[int | None]:
        """The columns `[batches]` of the family's own default configuration. None if it was not timed."""
        kernel = registry.kernel(family)
        assert isinstance(kernel, LaunchableKernel)
        index = {c.name: i for i, c in enumerate(self.test.candidates)}
        wanted = (kernel.default_config(self.shape, h200, tokens).name for tokens, _ in self.test.labels)
        return [index.get(f"{family}/{name}") for name in wanted]

    def planned(self, families: Iterable[str]) -> FloatArray:
        """Microseconds `[batches]` inside a CUDA graph. If dispatch is predicted to gain more than its overhead at a
        batch size, the graph dispatches, and the overhead counts. Otherwise it holds the candidate that is predicted to
        be best for the size. The predictions are for the tune batches."""
        columns = self.of(families)
        by_size = {t: [i for i, (n, _) in enumerate(self.tune.labels) if n == t] for t, _ in self.tune.labels}
        times = []
        for row, (tokens, _) in enumerate(self.test.labels):
            us = self.tuned_us[np.ix_(by_size[table_choice({t: t for t in by_size}, tokens)], columns)]
            cost = switching_us(self.model, tokens)
            one = us.mean(0).argmin()
            if us[:, one].mean() - us.min(1).mean() > cost:
                times.append(self.test.times_us[row, columns[self.judged_us[row, columns].argmin()]] + cost)
            else:
                times.append(self.test.times_us[row, columns[one]])
        return np.array(times)

    @cached_property
    def policies(self) -> dict[str, FloatArray]:
        """Microseconds `[batches]` of each policy on the batches to judge, by name."""
        us, rows, labels = self.test.times_us, np.arange(len(self.test.labels)), self.tune.labels
        one, two = self.layouts(1).kernels, self.layouts(2).kernels
        choosing = np.array([choosing_us(self.model, tokens) for tokens, _ in self.test.labels])
        own = us[rows, self.dispatched([self.family[self.single]])]
        found = {
            "oracle": us.min(1),
            "static": us[rows, self.static(self.families, labels)],
            "static, all kinds": us[rows, self.static(self.families, [(t, "uniform") for t, _ in labels])],
            "single": us[:, self.single],
            "dispatch": us[rows, self.dispatched(self.families)],
            "two copies": us[rows, self.dispatched(two)],
            "one copy": us[rows, self.dispatched(one)],
            "choosing": us[rows, self.dispatched(one)] + choosing,
            "planned": self.planned(one),
            "own kernel": own,
            "own kernel, choosing": own + choosing,
        }
        for f in self.families:
            alone = self.own_choice(f)
            found[f"{f} tuned"] = us[rows, self.static([f], labels)]
            found[f"{f} itself"] = np.array([np.nan if c is None else us[i, c] for i, c in enumerate(alone)])
        return found

    @property
    def single(self) -> int:
        """The column of the one configuration of our kernels that is best for all batches."""
        ours = self.of(OURS)
        return int(ours[single_choice(self.tune.times_us[:, ours])])

    def cells(self) -> Iterator[Cell]:
        chosen = self.dispatched(self.families)
        for batches in (self.test, self.tune):
            for i, ((tokens, routing), best) in enumerate(zip(batches.labels, batches.times_us.argmin(1), strict=True)):
                ran = batches.candidates[chosen[i]].name if batches is self.test else ""
                us = {name: float(times[i]) for name, times in self.policies.items()} if ran else {}
                yield Cell(self.model, self.dtype, tokens, routing, batches.candidates[best].name, ran, us)


@cache
def cases() -> list[Case]:
    return [Case(model, dtype) for dtype in DTYPES for model in MODELS]


@cache
def cells() -> list[Cell]:
    return [cell for case in cases() for cell in case.cells()]


def judged(**wanted: str) -> list[Cell]:
    return [c for c in cells() if c.us and all(getattr(c, k) == v for k, v in wanted.items())]
