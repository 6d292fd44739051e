"""Makes the Triton path's table of this folder's README, from the files of triton_path.py and of other stacks.

`python profiles/pages.py --write benchmarks` fills the page.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from pages import table

HERE = Path(__file__).parent
DTYPES = ("fp8", "bf16")
TOKENS = (1, 8, 32, 128, 512, 2048)
FEW = 512
"""Most tokens of the last row."""

Cell = tuple[str, int, str]
"""Model, tokens, routing."""


def ratios(dtype: str) -> dict[Cell, float]:
    """Time of the Triton path over that of vLLM's, by cell. Raises ValueError if the files have different cells."""
    peers = {
        (c["shape"], c["tokens"], c["routing"]): c for c in json.loads((HERE / "peers_h200.json").read_text())["cells"]
    }
    ours = json.loads((HERE / f"triton_h200_{dtype}.json").read_text())
    found = {(c["shape"], c["tokens"], c["routing"]): c["us"] for c in ours["cells"]}
    if found.keys() != peers.keys():
        raise ValueError(f"triton_h200_{dtype}.json and peers_h200.json have different cells: measure again")
    return {cell: us / peers[cell][f"vllm_{dtype}"] for cell, us in found.items()}


def summary(dtype: str, counts: Callable[[int], bool]) -> list[str]:
    """The geometric mean and the largest of the ratios, over the numbers of tokens that count."""
    values = [ratio for (_, tokens, _), ratio in ratios(dtype).items() if counts(tokens)]
    return [f"{statistics.geometric_mean(values):.3f}", f"{max(values):.3f}"]


def benchmarks() -> str:
    rows = [(f"{n:,} token{'s' * (n > 1)}", *(s for d in DTYPES for s in summary(d, n.__eq__))) for n in TOKENS]
    rows.append((f"up to {FEW} tokens", *(s for d in DTYPES for s in summary(d, FEW.__ge__))))
    head = (
        "time over vLLM 0.33 Triton, same dtype",
        *(f"{d} {what}" for d in DTYPES for what in ("geomean", "worst cell")),
    )
    return table(head, rows)


TABLES = {"benchmarks": benchmarks}
