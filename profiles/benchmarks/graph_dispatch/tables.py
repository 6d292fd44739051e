"""Makes the tables of this folder's README from the files that benchmark.py wrote.

`python profiles/pages.py --write graph_dispatch` fills the page.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import Tables, over, table
from ramp_moe.evaluation.comparison import Ratios

HERE = Path(__file__).parent
Found = Sequence[dict[str, Any]]
"""Records, one per file."""


def _select(found: Found) -> str:
    columns = {"choosing, us": "select_us", "recorded, too": "recorded_us", "Triton schedule, us": "schedule_us"}
    rows = [(f["model"], r["tokens"], r["candidates"], *(f"{r[us]:.2f}" for us in columns.values()))
            for f in found for r in f["selection"]]  # fmt: skip
    return table(("model", "tokens", "candidates", *columns), rows)


def _bodies(found: Found) -> str:
    rows = [(f["model"], r["tokens"], r["mode"], r["bodies"], f"{r['overhead_us']:.2f}",
             "" if r["changing_us"] is None else f"{r['changing_us']:.2f}", f"{r['layer_kib']:.0f}",
             f"{r['buffers_mib']:.0f}") for f in found for r in f["bodies"]]  # fmt: skip
    head = ("model", "tokens", "mode", "bodies", "overhead, us per layer", "routing changes, us per layer",
            "driver, KiB per layer", "buffers, MiB")  # fmt: skip
    return table(head, rows)


def _end_to_end(found: Found) -> str:
    rows = []
    for f in found:
        for r in f["end_to_end"]:
            kinds = [Ratios.of(np.array(r["static_us"]) / r[us]) for us in ("planned_us", "choosing_us")]
            cells = [f"{k.geomean:.3f}x ({k.min:.2f} to {k.max:.2f})" for k in kinds]
            mode, bodies = r["choosing"]
            rows.append((f["model"], r["tokens"], f"{r['mode']}, {len(r['bodies'])}", cells[0], f"{mode}, {bodies}",
                         cells[1], f"{statistics.geometric_mean(r['static_us']):.1f}"))  # fmt: skip
    head = ("model", "tokens", "planned: mode, bodies", "planned over static", "up to 4 bodies: mode, bodies",
            "over static", "static, us per layer")  # fmt: skip
    return table(head, rows)


def tables(folder: Path = HERE) -> Tables:
    """The makers of the page's tables, for a folder's files."""
    makers = {"selection": _select, "bodies": _bodies, "end_to_end": _end_to_end}
    return over(lambda: [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))], makers)


TABLES = tables()
