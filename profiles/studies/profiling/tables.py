"""Computes the tables of the README beside this from simulated.json, which `simulate.py` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import over, table

HERE = Path(__file__).parent
Runs = list[dict[str, Any]]


def _read() -> Runs:
    found: Runs = json.loads((HERE / "simulated.json").read_text())
    return found


def _of(runs: Runs, informed: bool) -> str:
    head = ["model", "asked for minutes", "took seconds", "configurations", "batches", "mean regret", "worst"]
    rows = [
        (
            f"{r['shape']} fp8", f"{r['minutes']:g}", f"{r['seconds']:.0f}", r["configurations"], r["batches"],
            f"{r['mean_regret']:.1%}", f"{r['worst_regret']:.0%}",
        )
        for r in runs
        if r["informed"] == informed
    ]  # fmt: skip
    return table(head, rows)


TABLES = over(_read, {"informed": lambda runs: _of(runs, True), "everything": lambda runs: _of(runs, False)})
