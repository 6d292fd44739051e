"""Makes the tables of this folder's README from the files that measure.py wrote.

`python profiles/pages.py --write four_bits` fills the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pages import Tables, over, table

HERE = Path(__file__).parent
HELD_OUT = ("dirichlet0.3", "zipf2.0")
OTHERS = ("own", "uniform", "best", "signed", "marlin")
Found = Sequence[dict[str, Any]]
"""Records, one per file."""


def ratios(rows: Iterable[dict[str, Any]], name: str) -> list[float]:
    """Times of one choice over the model's, of the rows that have it."""
    return [row["us"][name] / row["us"]["model"] for row in rows if name in row["us"]]


def spread(values: Sequence[float]) -> str:
    """Geometric mean, and least and greatest."""
    if not values:
        return "-"
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{mean:.3f}x ({min(values):.2f} to {max(values):.2f})"


def of(f: dict[str, Any]) -> tuple[str, str]:
    """The model, and its weights: their format, and how they were stored if not as integers."""
    return f["model"], ", ".join((f["dtype"], *([f["stored"]] if "stored" in f else [])))


def _gains(found: Found) -> str:
    lines = []
    for f in found:
        for what, routings in (("held-out skew", HELD_OUT), ("all", None)):
            rows = [row for row in f["rows"] if routings is None or row["routing"] in routings]
            lines.append((*of(f), what, len(rows), *(spread(ratios(rows, name)) for name in OTHERS)))
    return table(("model", "weights", "routings", "batches", *(f"over {name}" for name in OTHERS)), lines)


def _layers(found: Found) -> str:
    lines = []
    for f in found:
        for row in f["rows"]:
            us = row["us"]
            cells = [f"{us[name]:.0f}" if name in us else "-" for name in ("model", *OTHERS)]
            lines.append((*of(f), row["tokens"], row["routing"], *cells))
    return table(("model", "weights", "tokens", "routing", "model, us", *(f"{name}, us" for name in OTHERS)), lines)


def _errors(found: Found) -> str:
    lines = [
        (*of(f), row["tokens"], row["routing"], *(f"{row['error'].get(name, math.nan):.4f}"
         if name in row["error"] else "-" for name in ("model", "own", "signed", "marlin")))
        for f in found for row in f["rows"] if "error" in row
    ]  # fmt: skip
    return table(("model", "weights", "tokens", "routing", "model", "own", "signed", "marlin"), lines)


def tables(folder: Path = HERE) -> Tables:
    """The makers of the page's tables, for a folder's files."""
    makers = {"gains": _gains, "errors": _errors, "layers": _layers}
    return over(lambda: [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))], makers)


TABLES = tables()
