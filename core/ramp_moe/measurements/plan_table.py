"""What is done with batches of each size, as a short table for a person."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .calibration_file import PlanRow

HEAD = ("tokens", "kernel", "mode", "bodies", "predicted", "measured", "{engine}", "histogram")
"""The times are of one layer. The last is what following the histogram would save if choosing took no time."""


def table(rows: Sequence[PlanRow], engine: str) -> list[str]:
    """Lines of the table. Sizes that follow each other and are treated alike share one, with the times of the largest
    that was measured. engine: its name."""
    cells = [[name.format(engine=engine) for name in HEAD]]
    for _, alike in itertools.groupby(rows, key=lambda r: (r.choice, r.mode, r.bodies)):
        group = list(alike)
        last = next((r for r in reversed(group) if r.engine_us is not None or r.measured_us is not None), group[-1])
        sizes = f"{group[0].tokens}" if len(group) == 1 else f"{group[0].tokens}-{group[-1].tokens}"
        times = (last.predicted_us, last.measured_us, last.engine_us, last.histogram_us)
        cells.append([sizes, last.choice or f"{engine}'s own", last.mode, str(last.bodies), *map(_us, times)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _us(us: float | None) -> str:
    return "" if us is None else f"{us:.1f} us"
