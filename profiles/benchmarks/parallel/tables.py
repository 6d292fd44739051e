"""Makes the table of this folder's README from the files that measure.py wrote on two GPUs.

`python profiles/pages.py --write parallel` fills the page.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pages import table
from ramp_moe.evaluation.comparison import Ratios

HERE = Path(__file__).parent
HEAD = ("model", "dtype", "way", "apart", "uniform: whole", "its kernels", "one GPU", "skewed: whole", "its kernels",
        "one GPU", "by histogram over by size")  # fmt: skip


def rows() -> list[tuple[str, ...]]:
    """A row per file, dtype and way. Microseconds are the slowest rank's. Ratios are over every batch and rank."""
    found = []
    for file in sorted(HERE.glob("h200-x2-*.json")):
        record = json.loads(file.read_text())
        for dtype, way in dict.fromkeys((cell["dtype"], cell["way"]) for cell in record["cells"]):
            cells = {c["batch"]: c for c in record["cells"] if (c["dtype"], c["way"]) == (dtype, way)}
            times: list[str] = []
            for cell in (cells["uniform"], cells["skewed"]):
                slowest = (max(did[what] for did in cell["ranks"]) for what in ("all_us", "chosen_us"))
                times += (f"{us:.0f}" for us in (*slowest, cell["one_gpu_us"]))
            worked = [did for cell in cells.values() for did in cell["ranks"] if "chosen_us" in did]
            gain = Ratios.of(np.array([did["static_us"] / did["chosen_us"] for did in worked]))
            apart = max(cell["apart"] for cell in cells.values())
            found.append((record["model"], dtype, way, f"{apart:.3f}", *times,
                          f"{gain.geomean:.2f}x ({gain.min:.2f} to {gain.max:.2f})"))  # fmt: skip
    return found


TABLES = {"measured": lambda: table(HEAD, rows())}
