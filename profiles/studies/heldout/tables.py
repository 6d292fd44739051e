"""Tables of the regret of dispatch on routings that no profile has seen, from the files that measure.py wrote.

`python profiles/pages.py --write heldout` fills the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pages import UNMEASURED, Tables, over, table
from ramp_moe import Dispatcher, ProfileError
from ramp_moe.evaluation.regret import IndexArray, regret, split_half_regret
from ramp_moe.spec.routing import FloatArray
from studies.heldout.draws import KINDS, TRACE
from studies.heldout.measure import DTYPES, MODELS, path_of

HERE = Path(__file__).parent
DEVICE = "h200"
SLOWER, ALONE, JOINT, MOST = 0.02, 0.0093, 0.012, 0.10
"""The bounds claimed, as fractions: the slowdown of a group against static dispatch; the mean regret against the
split-half best, for one kernel and for all together; the largest regret of a batch."""
SHOWN = 12

Record = dict[str, Any]
Case = tuple[str, tuple[str, ...]]
"""A model with its dtype, and kernels."""


@dataclass(frozen=True)
class Group:
    """The judged draws of a number of tokens and a kind of routing.

    runs_us      microseconds `[halves, draws, candidates]`
    chosen       the candidate that dispatch chooses on each draw, `[draws]`
    static       the candidate with the least geometric mean over the tune draws of this size, all kinds
    own_static   the same over the tune draws of this kind alone
    missing      how many draws are left out because the choice was not measured
    """

    model: str
    kernels: tuple[str, ...]
    tokens: int
    kind: str
    runs_us: FloatArray
    chosen: IndexArray
    static: int
    own_static: int
    missing: int

    @property
    def times_us(self) -> FloatArray:
        return np.asarray(self.runs_us.mean(0))

    def over(self, static: int) -> float:
        """Dispatch's time over the time of candidate `static`, less 1: the mean over the draws."""
        times = self.times_us
        return float((times[np.arange(len(times)), self.chosen] / times[:, static]).mean() - 1)

    @property
    def slower(self) -> float:
        return self.over(self.static)

    @property
    def slower_than_own(self) -> float:
        return self.over(self.own_static)

    @property
    def regret(self) -> FloatArray:
        """Regret against the oracle, `[draws]`."""
        return regret(self.times_us, self.chosen)

    @property
    def split_half(self) -> FloatArray:
        """Regret in one half against the best candidate of the other half, `[pairs of halves, draws]`."""
        return split_half_regret(self.runs_us, self.chosen)


def load(folder: Path, models: Sequence[str] = MODELS) -> list[Record]:
    """The records of the models that were measured. Raises ProfileError for a record of another device."""
    files = (path_of(folder, model, dtype) for dtype in DTYPES for model in models)
    found = [json.loads(f.read_text()) for f in files if f.exists()]
    for record in found:
        if record["device"] != DEVICE:
            measured = f"{name_of(record)} was measured on {record['device']}"
            raise ProfileError(f"{measured}, the tables are of {DEVICE}; move it")
    return found


def name_of(record: Record) -> str:
    return f"{record['model']} {record['dtype']}"


def cases(record: Record) -> list[tuple[str, ...]]:
    """Each kernel alone, then all together."""
    names = tuple(record["kernels"])
    return [*((name,) for name in names), *([names] if len(names) > 1 else [])]


def groups_of(record: Record, kernels: tuple[str, ...]) -> Iterator[Group]:
    """The groups of a record, as today's profiles dispatch among these kernels."""
    dispatcher = Dispatcher.for_model(record["model"], record["device"], kernels, record["dtype"])
    for size in record["sizes"]:
        tokens = size["tokens"]
        columns = [i for i, name in enumerate(size["configs"]) if name.split("/")[0] in kernels]
        index = {size["configs"][column]: i for i, column in enumerate(columns)}
        draws = {g["kind"]: g["draws"] for g in record["groups"] if g["tokens"] == tokens}
        tune = {kind: _times([d for d in found if d["split"] == "tune"], columns) for kind, found in draws.items()}
        if not draws:
            continue
        static = _fastest(list(tune.values()))
        for kind, found in draws.items():
            judged = [d for d in found if d["split"] == "judge"]
            names = [dispatcher.choose(np.array(d["histogram"]), tokens).candidate.name for d in judged]
            known = [i for i, name in enumerate(names) if name in index]
            chosen = np.array([index[names[i]] for i in known], np.intp)
            runs = _times(judged, columns)[:, known]
            if not known:
                raise ProfileError(f"{record['model']}, {tokens} tokens, {kind}: no choice was timed; measure again")
            missing = len(judged) - len(known)
            yield Group(name_of(record), kernels, tokens, kind, runs, chosen, static, _fastest([tune[kind]]), missing)


def _times(draws: Sequence[Record], columns: Sequence[int]) -> FloatArray:
    """Microseconds `[halves, draws, candidates]`."""
    return np.array([d["us"] for d in draws]).transpose(1, 0, 2)[..., columns]


def _fastest(runs_us: Sequence[FloatArray]) -> int:
    """The column with the least geometric mean over all draws."""
    return int(np.log(np.concatenate(runs_us, axis=1).mean(0)).mean(0).argmin())


@dataclass(frozen=True)
class Study:
    """The records that were measured, and by case the groups with draws to judge."""

    records: list[Record]
    cases: dict[Case, list[Group]]

    @classmethod
    def of(cls, folder: Path) -> Study:
        records = load(folder)
        found = {(name_of(r), kernels): list(groups_of(r, kernels)) for r in records for kernels in cases(r)}
        return cls(records, {case: groups for case, groups in found.items() if groups})

    @property
    def groups(self) -> list[Group]:
        return [g for groups in self.cases.values() for g in groups]


def percent(value: float) -> str:
    return f"{value:.2%}"


def pooled(groups: Iterable[Group]) -> tuple[FloatArray, FloatArray]:
    """Regrets of all draws against the oracle, and against the split-half best."""
    found = list(groups)
    return np.concatenate([g.regret for g in found]), np.concatenate([g.split_half.ravel() for g in found])


def claims(study: Study) -> str:
    """Each claim, and its worst value over the models."""
    every = study.groups
    if not every:
        return UNMEASURED
    against: dict[bool, float] = {}
    for (_, kernels), groups in study.cases.items():
        joint, lost = len(kernels) > 1, float(pooled(groups)[1].mean())
        against[joint] = max(lost, against.get(joint, lost))
    bounds = [
        ("slowest group against static, tuned on all kinds", max(g.slower for g in every), SLOWER),
        ("slowest group against static, tuned on its own kind", max(g.slower_than_own for g in every), SLOWER),
        *(
            (f"mean regret against the split-half best, {what}", against[joint], bound)
            for joint, what, bound in ((False, "one kernel", ALONE), (True, "all kernels together", JOINT))
            if joint in against
        ),
        ("largest regret of a batch", max(float(g.regret.max()) for g in every), MOST),
    ]
    rows = [(what, percent(v), f"at most {percent(bound)}", "yes" if v <= bound else "no") for what, v, bound in bounds]
    return table(("claim, worst of all models", "measured", "claimed", "holds"), rows)


def regrets(study: Study) -> str:
    """Regrets by model and kernels, over all judged draws."""
    rows = []
    for (model, kernels), groups in study.cases.items():
        lost, against = pooled(groups)
        figures = (f(x) for x in (lost, against) for f in (np.mean, lambda v: np.quantile(v, 0.95), np.max))
        rows.append((model, " + ".join(kernels), len(lost), *map(percent, figures)))
    head = ("model", "kernels", "batches", "regret: mean", "p95", "max", "against the split-half best: mean", "p95",
            "max")  # fmt: skip
    return table(head, rows)


def by_kind(study: Study) -> str:
    """Mean regret against the split-half best, all models together."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for (_, kernels), groups in study.cases.items():
        found.setdefault(kernels, []).extend(groups)
    names = (*KINDS, TRACE)
    rows = []
    for kernels, groups in found.items():
        of = {kind: [g for g in groups if g.kind == kind] for kind in names}
        cells = (percent(pooled(some)[1].mean()) if (some := of[kind]) else "-" for kind in names)
        rows.append((" + ".join(kernels), *cells))
    return table(("kernels", *names), rows)


def static(study: Study) -> str:
    """By model and kernels, how often and by how much dispatch is slower than static dispatch."""
    rows = []
    for (model, kernels), groups in study.cases.items():
        cells: list[object] = []
        for slower in ([g.slower for g in groups], [g.slower_than_own for g in groups]):
            cells += [f"{np.mean(slower):+.2%}", f"{max(slower):+.2%}", sum(x > SLOWER for x in slower)]
        rows.append((model, " + ".join(kernels), len(groups), *cells))
    over = f"over {SLOWER:.0%} slower"
    head = ("model", "kernels", "groups", "dispatch over static, less 1: mean", "worst", over,
            "over static of the same kind, less 1: mean", "worst", over)  # fmt: skip
    return table(head, rows)


def worst(study: Study) -> str:
    """The groups in which dispatch does worst."""
    every = sorted(study.groups, key=lambda g: -max(g.slower, g.slower_than_own))
    rows = [
        (g.model, " + ".join(g.kernels), g.tokens, g.kind, f"{g.slower:+.2%}", f"{g.slower_than_own:+.2%}")
        for g in every[:SHOWN]
    ]
    head = ("model", "kernels", "tokens", "routing", "over static, less 1", "over static of the same kind, less 1")
    return table(head, rows)


def sources(study: Study) -> str:
    """When and where each model was measured."""
    rows = []
    for record in study.records:
        runs = "; ".join(f"{r['measured'][:16]} {r['device_name']} {r['gpu']}" for r in record["runs"])
        kernels = ", ".join(f"{name} {version}" for name, version in record["kernels"].items())
        missing = sum(g.missing for g in study.groups if g.model == name_of(record))
        counts = (len(s["configs"]) for s in record["sizes"])
        rows.append((name_of(record), runs, kernels, len(record["groups"]), "/".join(map(str, counts)), missing))
    head = ("model", "runs: when, GPU", "kernels", "groups", "configurations timed, by tokens",
            "choices not measured")  # fmt: skip
    return table(head, rows)


def tables(folder: Path = HERE) -> Tables:
    """Makers of the page's tables over the records in a folder."""
    makers = (claims, regrets, by_kind, static, worst, sources)
    return over(lambda: Study.of(folder), {f.__name__: f for f in makers})


TABLES = tables()
