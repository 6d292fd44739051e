"""Makes the tables of this folder's README from the files that benchmark.py wrote.

`python profiles/pages.py --write wrap` fills the page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import Tables, over, table

HERE = Path(__file__).parent
OURS = "ramp_moe"
Found = Sequence[dict[str, Any]]
"""Records, one per file."""
GROUPED = {"bf16": "grouped_mm", "fp8": "grouped_mm, bf16"}
"""Names of torch's grouped GEMM, which computes no block-scaled fp8."""


def of(f: dict[str, Any]) -> tuple[str, str]:
    return f["model"], f["dtype"]


def against(us: dict[str, float | str], other: str | None = None) -> list[str]:
    """Our microseconds, those of another implementation, its name, and the ratio.

    other: the other one; None: the fastest of Transformers' own.
    """
    rest = {k: v for k, v in us.items() if k != OURS and isinstance(v, float) and other in (None, k)}
    ours = us[OURS]
    if not isinstance(ours, float) or not rest:
        return [f"{ours:.0f}" if isinstance(ours, float) else str(ours), "", "", ""]
    best = min(rest, key=lambda k: rest[k])
    return [f"{ours:.0f}", f"{rest[best]:.0f}", best, f"{rest[best] / ours:.2f}x"]


WHAT = ("model", "experts")
OTHERS = ("ramp_moe, us", "Transformers', us", "which", "faster")


def _layer(found: Found) -> str:
    rows = [(*of(f), r["tokens"], r["routing"], *against(r["us"], GROUPED[f["dtype"]]), *against(r["us"])[1:])
            for f in found for r in f["layer"]]  # fmt: skip
    return table((*WHAT, "tokens", "routing", *OTHERS, "best, us", "which", "faster"), rows)


def _decode(found: Found) -> str:
    rows = [(*of(f), r["batch"], r["way"], *against(r["us"])) for f in found for r in f["decode"]]
    return table((*WHAT, "batch", "way", *OTHERS), rows)


def _prefill(found: Found) -> str:
    rows = [(*of(f), r["tokens"], r["way"], *against(r["us"])) for f in found for r in f["prefill"]]
    return table((*WHAT, "tokens", "way", *OTHERS), rows)


def _memory(found: Found) -> str:
    rows = []
    for f in found:
        m = f["memory"]
        shares = [f"{m[key] / m['weights_bytes']:.2%}" for key in ("wrapped_bytes", "workspace_bytes")]
        rows.append((*of(f), f["device"], f"{m['weights_bytes'] / 2**30:.2f}", *shares, f"{m['wrap_seconds']:.1f}",
                     *(f"{f['logits_apart'][name]:.1e}" for name in (OURS, "batched_mm"))))  # fmt: skip
    head = (*WHAT, "GPU", "weights, GiB", "added by wrapping", "buffers after all runs", "wrapping, s", "logits apart")
    return table((*head, "of batched_mm"), rows)


def tables(folder: Path = HERE) -> Tables:
    """The makers of the page's tables, for a folder's files."""
    makers = {"memory": _memory, "layer": _layer, "decode": _decode, "prefill": _prefill}
    return over(lambda: [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))], makers)


TABLES = tables()
