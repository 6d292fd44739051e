"""The regions' advice against measurements: hits and misses, beside the score of always answering the majority.

`python profiles/pages.py --write regions` fills the page. `python -m studies.regions.tables --predict`, run in
`profiles/`, writes today's advice for the held-out models into predictions.json. It refuses if any of them is measured
already.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from pages import UNMEASURED, Tables, over, table
from ramp_moe import MoEShape, ProfileError, expert_histogram, generate, get_registry
from ramp_moe.cost_model import regions
from ramp_moe.measurements.json_file import write_atomically
from ramp_moe.spec.routing import IntArray
from studies.regions.measure import CELLS, DTYPE, HELD_OUT, MODELS, SEED, STUDIED

HERE = Path(__file__).parent
DEVICE = "h200"

MARGIN = 0.01
"""Smallest difference that decides: twice the repeatability of the median cell of the shipped profiles."""

OPTIMISATIONS: dict[str, tuple[str, int]] = {
    "GROUP_M swizzle": ("group_m", 8),
    "split-K": ("split_k", 4),
    "wide weight tile": ("rows", 128),
    "large token block": ("block", 32),
}
"""By optimisation, the parameter of the measured paths that varies, and its least value in a path with the
optimisation. "small token block" is the opposite of the large one, and not a question of its own."""

FUSED: dict[str, tuple[str, int]] = {
    "GROUP_M swizzle": ("group_m", 8),
    "split-K": ("split_k", 2),
    "wide weight tile": ("wide", 2),
    "large token block": ("block", 32),
}
FUSED_MODELS, FUSED_SEED = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4"), 7
FUSED_MARGIN = 0.03
"""MARGIN for the fused kernel, whose configurations were screened with three launches each."""

CONSTANTS = ("L2_OVER_HBM", "ACHIEVED_PEAK", "LOADED_LATENCY_S", "NOOP_LAUNCH_S", "PIPELINE_STAGES")
"""Constants of `cost_model.regions` that no data sheet gives. `sensitivity` changes each by a fifth, a count by one."""

Advised = dict[str, bool]
"""By optimisation, whether the advice says that it pays."""


@dataclass(frozen=True)
class Case:
    """One optimisation on one cell. gain: the best time without it over the best with it, less 1."""

    model: str
    tokens: int
    routing: str
    optimisation: str
    advised: bool
    gain: float

    @property
    def decided(self) -> bool:
        return abs(self.gain) > MARGIN

    @property
    def hit(self) -> bool:
        return self.advised == (self.gain > 0)


def advise(model: str, tokens: int, routing: str, seed: int = SEED) -> Advised:
    """The regions' advice today."""
    shape, histogram = batch(model, tokens, routing, seed)
    found = regions.analyse(shape, get_registry().device(DEVICE), histogram)
    return {a.optimisation: a.pays for a in found.advice if a.optimisation in OPTIMISATIONS}


@functools.cache
def batch(model: str, tokens: int, routing: str, seed: int) -> tuple[MoEShape, IntArray]:
    """The layer and the expert histogram of a cell."""
    shape = get_registry().shape(model, DTYPE)
    return shape, expert_histogram(generate(routing, tokens, shape.num_experts, shape.top_k, seed), shape.num_experts)


def cases(
    record: dict[str, Any],
    advised: Callable[[str, int, str], Advised],
    optimisations: Mapping[str, tuple[str, int]] = OPTIMISATIONS,
) -> Iterator[Case]:
    """Every question that a model's measurements answer."""
    for cell in record["cells"]:
        where = record["model"], cell["tokens"], cell["routing"]
        answers = advised(*where)
        for optimisation, (field, least) in optimisations.items():
            # Paths that differ in nothing else are compared; one measured only with, or only without, takes no part.
            by_rest: dict[tuple[Any, ...], dict[bool, float]] = {}
            for path in cell["paths"]:
                rest = tuple(v for k, v in path.items() if k not in (field, "us"))
                sides, has = by_rest.setdefault(rest, {}), path[field] >= least
                sides[has] = min(path["us"], sides.get(has, math.inf))
            both = [sides for sides in by_rest.values() if len(sides) == 2]
            if both:
                gain = min(sides[False] for sides in both) / min(sides[True] for sides in both) - 1
                yield Case(*where, optimisation, answers[optimisation], gain)


def measured(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the models that were measured. Raises ProfileError for a record of another device."""
    found = [json.loads(f.read_text()) for m in models if (f := folder / f"{m}.json").exists()]
    for record in found:
        if record["device"] != DEVICE:
            raise ProfileError(f"{record['model']}.json is of {record['device']}, the tables are of {DEVICE}; move it")
    return found


def predictions(folder: Path) -> list[dict[str, Any]]:
    """The predictions that were made before measuring, the earliest first."""
    file = folder / "predictions.json"
    found: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return found


def predict(folder: Path) -> None:
    """Write today's advice for the held-out models. Raises ProfileError if one of them is measured already."""
    if known := measured(folder, HELD_OUT):
        names = ", ".join(r["model"] for r in known)
        raise ProfileError(f"{names} measured already: what is said now is no prediction; hold out other models")
    advice = {m: {f"{t} {routing}": advise(m, t, routing) for t, routing in CELLS} for m in HELD_OUT}
    head = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "device": DEVICE, "dtype": DTYPE}
    everything = [*predictions(folder), {**head, "advice": advice}]
    write_atomically(folder / "predictions.json", f"{json.dumps(everything, indent=1)}\n".encode())


def groups(folder: Path) -> dict[str, list[Case]]:
    """Cases of the studied models by today's advice, and of the held-out models by each prediction."""
    found = {"studied": [c for r in measured(folder, STUDIED) for c in cases(r, advise)]}
    for prediction in predictions(folder):

        def predicted(model: str, tokens: int, routing: str, advice: Any = prediction["advice"]) -> Advised:
            return dict(advice[model][f"{tokens} {routing}"])

        name = f"held out, predicted {prediction['made'][:16]}"
        found[name] = [c for r in measured(folder, HELD_OUT) for c in cases(r, predicted)]
    return {name: of_group for name, of_group in found.items() if of_group}


def scores(folder: Path) -> str:
    """Hits and misses in the decided cases, by group and optimisation, with the hits of always giving the more frequent
    answer. Of the undecided cases, in how many the optimisation is said to pay."""
    rows = []
    for name, of_group in groups(folder).items():
        totals = [0, 0, 0]
        for optimisation in OPTIMISATIONS:
            asked = [c for c in of_group if c.optimisation == optimisation]
            decided = [c for c in asked if c.decided]
            pays, hits = sum(c.gain > 0 for c in decided), sum(c.hit for c in decided)
            majority = max(pays, len(decided) - pays)
            totals = [a + b for a, b in zip(totals, (len(decided), hits, majority), strict=True)]
            split = f"{pays} / {len(decided) - pays}"
            rest = [c.advised for c in asked if not c.decided]
            within = f"{len(rest)} ({sum(rest)})"
            rows.append((name, optimisation, split, within, hits, len(decided) - hits, majority))
        count, hits, majority = totals
        rows.append((name, "all", "", "", hits, count - hits, majority))
    margin = f"within {MARGIN:.0%} (said to pay)"
    head = ("models", "optimisation", "pays / does not", margin, "hits", "misses", "majority's hits")
    return table(head, rows)


def misses(folder: Path) -> str:
    """Every decided case in which the advice was wrong, the most costly first."""
    found = groups(folder)
    wrong = {(name, c) for name, of_group in found.items() for c in of_group if c.decided and not c.hit}
    ordered = sorted(wrong, key=lambda item: (-abs(item[1].gain), item[0], item[1].model))
    rows = [
        (name, c.model, c.tokens, c.routing, c.optimisation, "pays" if c.advised else "does not", f"{c.gain:+.1%}")
        for name, c in ordered
    ]
    head = ("models", "model", "tokens", "routing", "optimisation", "advised", "time without over with, less 1")
    return table(head, rows) if rows else "None." if found else UNMEASURED


def fused(folder: Path) -> str:
    """Hits and misses of the advice on the fused CuTe kernel's configurations, as its benchmark screened them."""
    found = [c for r in screened(folder.parents[1] / "benchmarks") for c in cases(r, advise_fused, FUSED)]
    rows = []
    for optimisation in FUSED:
        asked = [c for c in found if c.optimisation == optimisation]
        decided = [c for c in asked if abs(c.gain) > FUSED_MARGIN]
        pays, hits = sum(c.gain > 0 for c in decided), sum(c.hit for c in decided)
        wrong = sorted((c for c in decided if not c.hit), key=lambda c: -abs(c.gain))
        worst = f"{wrong[0].model}, {wrong[0].tokens:,}, {wrong[0].routing}: {wrong[0].gain:+.1%}" if wrong else "-"
        split = f"{pays} / {len(decided) - pays}"
        majority = max(pays, len(decided) - pays)
        rows.append((optimisation, split, len(asked) - len(decided), hits, len(decided) - hits, majority, worst))
    margin = f"within {FUSED_MARGIN:.0%}"
    head = ("optimisation", "pays / does not", margin, "hits", "misses", "majority's hits", "costliest miss")
    return table(head, rows)


def screened(folder: Path) -> Iterator[dict[str, Any]]:
    """The benchmark's files, in the form of the records that measure.py writes."""
    for model in FUSED_MODELS:
        if (file := folder / f"cute_{DEVICE}_{model}_{DTYPE}.json").exists():
            cells = []
            for cell in json.loads(file.read_text())["cells"]:
                paths = [fused_path(name, us) for name, (us, _) in cell["screened"]["cute"].items()]
                cells.append({"tokens": cell["tokens"], "routing": cell["routing"], "paths": paths})
            yield {"model": model, "cells": cells}


def fused_path(name: str, us: float) -> dict[str, Any]:
    """The parameters of a configuration, read from its name, as in bm64-t32-w8-st3-wide2-gm8."""
    parts = {m[1]: int(m[2]) for part in name.split("-") if (m := re.fullmatch(r"([a-z]+)(\d+)", part))}
    rest = {"tile": parts["t"], "stages": parts["st"], "ctas": parts.get("cta", 1), "pair": "pair" in name}
    what = {"block": parts["bm"], "wide": parts.get("wide", 1), "split_k": parts.get("sk", 1)}
    return {**rest, **what, "group_m": parts.get("gm", 1), "us": us}


def advise_fused(model: str, tokens: int, routing: str) -> Advised:
    return advise(model, tokens, routing, FUSED_SEED)


def sensitivity(folder: Path) -> str:
    """Hits on the studied models, over all optimisations, with each constant of the advice changed."""
    records = measured(folder, STUDIED)

    def hits() -> int:
        return sum(c.decided and c.hit for r in records for c in cases(r, advise))

    rows, today = [], hits()
    for name in CONSTANTS:
        value, counts = getattr(regions, name), []
        for moved in (value - 1, value + 1) if isinstance(value, int) else (0.8 * value, 1.2 * value):
            with mock.patch.object(regions, name, moved):
                counts.append(hits())
        rows.append((name, f"{value:g}", counts[0], today, counts[1]))
    return table(("constant", "value", "less", "hits as it is", "more"), rows)


def predicted(folder: Path) -> str:
    """How often each optimisation is predicted to pay for the held-out models, and when the prediction was made."""
    rows = [
        (p["made"][:16], model, *(f"{sum(a[o] for a in of_model.values())} of {len(of_model)}" for o in OPTIMISATIONS))
        for p in predictions(folder)
        for model, of_model in p["advice"].items()
    ]
    return table(("predicted", "model", *OPTIMISATIONS), rows)


def sources(folder: Path) -> str:
    """When and where each model was measured."""
    rows = [
        (r["model"], r["measured"][:16], f"{r['device_name']} {r['gpu']}", r["kernel"], len(r["cells"]))
        for r in measured(folder, MODELS)
    ]
    return table(("model", "measured", "GPU", "kernel", "cells"), rows)


def tables(folder: Path = HERE) -> Tables:
    """Makers of the page's tables over the records in a folder."""
    makers = (scores, misses, fused, sensitivity, predicted, sources)
    return over(lambda: folder, {f.__name__: f for f in makers})


TABLES = tables()


if __name__ == "__main__":
    if sys.argv[1:] != ["--predict"]:
        sys.exit(__doc__)
    predict(HERE)
