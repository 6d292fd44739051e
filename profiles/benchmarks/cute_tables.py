"""Makes the fused CuTe kernel's tables of this folder's README, from the files that cute_kernel.py wrote.

`python profiles/pages.py --write benchmarks` fills the page.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pages import Tables, over, table

HERE = Path(__file__).parent
FLOOR_FACTOR, FLOOR_US, FLOOR_TOKENS = 1.15, 6.0, 16
"""The aim for few tokens: at most FLOOR_FACTOR times the byte floor plus FLOOR_US, up to FLOOR_TOKENS tokens."""
LARGE = 2048
"""Tokens from which on a batch is large. A batch of exactly this size counts as both."""
NEAR = {True: ", near", False: ", not near", None: ""}
COMBINES = ("bf16", "f32", "rows")

Record = dict[str, Any]
Cell = dict[str, Any]


def of(found: Iterable[Record], dtype: str) -> list[Record]:
    """The records of a dtype that have cells."""
    return [record for record in found if record["dtype"] == dtype and record["cells"]]


def ratio(cell: Cell, rival: str) -> float:
    return float(cell["cute"]["us"] / cell[rival]["us"])


def geomean(values: Iterable[float]) -> str:
    """The geometric mean, or "-" without values."""
    return f"{statistics.geometric_mean(given):.3f}" if (given := list(values)) else "-"


def near(cell: Cell, time: str = "us") -> bool | None:
    """Whether the aim for few tokens is met; None for more tokens."""
    if cell["tokens"] > FLOOR_TOKENS:
        return None
    return bool(cell["cute"][time] <= FLOOR_FACTOR * cell["floor_us"] + FLOOR_US)


def summary(name: str, cells: Sequence[Cell], rival: str) -> list[str]:
    """A model's name, its geometric means, its worst cell, and in how many cells we are faster."""
    worst = max(cells, key=lambda c: ratio(c, rival))
    return [
        name,
        geomean(ratio(c, rival) for c in cells if c["tokens"] <= LARGE),
        geomean(ratio(c, rival) for c in cells if c["tokens"] >= LARGE),
        f"{ratio(worst, rival):.3f} ({worst['tokens']:,}, {worst['routing']})",
        f"{sum(ratio(c, rival) < 1 for c in cells)} of {len(cells)}",
    ]


def summaries(found: Sequence[Record], dtype: str, rival: str) -> Iterable[tuple[list[str], list[Cell]]]:
    """The summary of each model, then of all together, each with its cells."""
    records = of(found, dtype)
    for record in records:
        yield summary(record["model"], record["cells"], rival), record["cells"]
    if len(records) > 1:
        cells = [cell for record in records for cell in record["cells"]]
        yield summary("all", cells, rival), cells


HEAD = ("model", "1 to 2,048 tokens", "from 2,048", "worst cell", "faster in")


def models(found: Sequence[Record]) -> str:
    rows = []
    for row, cells in summaries(found, "fp8", "alpha_moe"):
        few = [c for c in cells if near(c) is not None]
        met = [sum(bool(near(c, time)) for c in few) for time in ("us", "clean_us")]
        rows.append([*row, *(f"{count} of {len(few)}" for count in met)])
    return table((*HEAD, "near the floor", "with a clean L2"), rows)


def contests(found: Sequence[Record], dtype: str, rival: str, name: str) -> str:
    """The table with a row for each cell."""
    rows = []
    for record in of(found, dtype):
        for cell in record["cells"]:
            both = cell["cute"], cell[rival]
            met = near(cell) if dtype == "fp8" else None
            row = [record["model"], f"{cell['tokens']:,}", cell["routing"], *(f"{k['us']:.1f}" for k in both)]
            row += [f"{ratio(cell, rival):.3f}", f"{cell['floor_us']:.1f}{NEAR[met]}"]
            rows.append(row + [f"{k['error']:.4f}" for k in both] + [k["config"] for k in both])
    head = ("model", "tokens", "routing", "cute, us", f"{name}, us", "ratio", "floor, us", "error of cute")
    return table((*head, f"of {name}", "configuration of cute", f"of {name}"), rows)


def cells(found: Sequence[Record]) -> str:
    return contests(found, "fp8", "alpha_moe", "Alpha-MoE")


def bf16_cells(found: Sequence[Record]) -> str:
    return contests(found, "bf16", "triton", "Triton")


def combine(found: Sequence[Record]) -> str:
    rows = []
    for record in found:
        by_tokens: dict[int, dict[str, list[Cell]]] = {}
        for row in record["combine"]:
            by_tokens.setdefault(row["tokens"], {}).setdefault(row["combine"], []).append(row)
        for tokens, by_combine in by_tokens.items():
            errors = [f"{statistics.mean(r['error'] for r in by_combine[how]):.5f}" for how in COMBINES]
            base = by_combine["bf16"]
            times = [
                geomean(a["us"] / b["us"] for a, b in zip(by_combine[how], base, strict=True)) for how in COMBINES[1:]
            ]
            rows.append((record["model"], record["dtype"], tokens, len(base), *errors, *times))
    head = ("model", "dtype", "tokens", "configurations", *(f"error, {how}" for how in COMBINES))
    return table((*head, *(f"time, {how} over bf16" for how in COMBINES[1:])), rows)


def polymorphic(found: Sequence[Record]) -> str:
    rows = []
    for record in found:
        by_config: dict[str, dict[int, list[float]]] = {}
        for row in record["polymorphic"]:
            by_block = by_config.setdefault(row["config"], {})
            by_block.setdefault(row["block"], []).append(row["us"] / row["alone_us"] - 1)
        for config, by_block in by_config.items():
            every = [more for of_block in by_block.values() for more in of_block]
            means = ", ".join(f"{block}: {statistics.mean(of_block):+.1%}" for block, of_block in by_block.items())
            within = f"{sum(more < 0.02 for more in every)} of {len(every)}"
            mean = f"{statistics.mean(every):+.1%}"
            rows.append((record["model"], record["dtype"], config, means, mean, f"{max(every):+.1%}", within))
    return table(("model", "dtype", "launch", "mean by block", "mean", "most", "below 2%"), rows)


def bf16(found: Sequence[Record]) -> str:
    return table(HEAD, (row for row, _ in summaries(found, "bf16", "triton")))


def sources(found: Sequence[Record]) -> str:
    rows = []
    for record in found:
        software = ", ".join(f"{name} {version}" for name, version in record["software"].items())
        kernels = ", ".join(f"{name} {version}" for name, version in record["kernels"].items())
        launches = ", ".join(f"{r['load_ms']:.0f} + {r['launch_ms']:.0f}" for r in record["first_launch"])
        counts = record["configurations"], len(record["skipped"])
        where = (record[key] for key in ("model", "dtype", "measured", "device"))
        rows.append((*where, f"{software}, {kernels}", *counts, launches or "-"))
    head = ("model", "dtype", "measured", "GPU", "software", "configurations", "left out")
    return table((*head, "first launches, ms"), rows)


def tables(folder: Path = HERE) -> Tables:
    """The makers of the page's tables, for a folder's files."""
    makers = (models, cells, combine, polymorphic, bf16, bf16_cells, sources)
    return over(
        lambda: [json.loads(file.read_text()) for file in sorted(folder.glob("cute_h200_*.json"))],
        {f"cute_{f.__name__}": f for f in makers},
    )


TABLES = tables()
