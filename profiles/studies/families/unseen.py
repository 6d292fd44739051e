"""Policies over the families on routings that no profile has seen, by the times of the held-out study."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ramp_moe.spec.routing import IntArray
from studies.families.policies import DTYPES, Case, Cell, cases, choosing_us
from studies.shipped import MODELS

HELD_OUT = Path(__file__).parents[1] / "heldout"


class Unseen:
    """A model in a dtype. For each number of tokens, static tables are tuned on the study's tune draws of all kinds,
    which include half of the trace. The other draws judge."""

    def __init__(self, case: Case, record: dict[str, Any]) -> None:
        self.case, self.record = case, record
        self.names = [c.name for c in case.fit.candidates]
        self.kernel = np.array([c.kernel for c in case.fit.candidates])
        self.one_copy = case.layouts(1).kernels

    def cells(self) -> Iterator[Cell]:
        for size in self.record["sizes"]:
            tokens, configs = size["tokens"], size["configs"]
            groups = [g for g in self.record["groups"] if g["tokens"] == tokens]
            tuned = [np.mean(d["us"], 0) for g in groups for d in g["draws"] if d["split"] == "tune"]
            mean = np.exp(np.log(tuned).mean(0))
            for group in groups:
                for draw in group["draws"]:
                    if draw["split"] == "judge":
                        yield self.cell(tokens, group["kind"], configs, mean, draw)

    def cell(self, tokens: int, kind: str, configs: list[str], tuned: Any, draw: dict[str, Any]) -> Cell:
        case, us = self.case, np.mean(draw["us"], 0)
        predicted = case.fit.cost(np.array([draw["histogram"]]))[0]

        def dispatched(families: Iterable[str]) -> int:
            """The index of the choice among the timed configurations. The study timed each kernel's own choice."""
            own = np.flatnonzero(np.isin(self.kernel, list(families)))
            return configs.index(self.names[own[predicted[own].argmin()]])

        def static(own: IntArray) -> int:
            return int(own[tuned[own].argmin()])

        ran, one = dispatched(case.families), dispatched(self.one_copy)
        found = {
            "oracle": us.min(),
            "static": us[static(np.arange(len(configs)))],
            "dispatch": us[ran],
            "choosing": us[one] + choosing_us(case.model, tokens),
        }
        for f in case.families:
            own = [i for i, name in enumerate(configs) if name.startswith(f"{f}/")]
            found[f"{f} tuned"] = us[static(np.array(own))]
        times = {policy: float(t) for policy, t in found.items()}
        return Cell(case.model, case.dtype, tokens, kind, configs[int(us.argmin())], configs[ran], times)


@cache
def unseen_cells() -> list[Cell]:
    """The cells of every model and dtype that the held-out study measured."""
    known = {(case.model, case.dtype): case for case in cases()}
    found = []
    for model in MODELS:
        for dtype in DTYPES:
            path = HELD_OUT / f"{model}-{dtype}.json"
            if path.exists():
                found += Unseen(known[model, dtype], json.loads(path.read_text())).cells()
    return found
