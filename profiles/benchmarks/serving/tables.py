"""Makes the tables of this folder's README from the files that measure.py wrote.

`python profiles/pages.py --write serving` fills the page. Files of the same engine, model, dtype and GPU are merged, so
that a variant can be run by itself. Figures are medians of repeats.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pages import Tables, over, table

HERE = Path(__file__).parent
STOCK, PLUGIN, WITHOUT_EXPERTS = "stock", "plugin", "without_experts"
BYTES_PER_MS = 4.3e9
"""Bandwidth at which a copy reads an H200's memory."""
GPU, TOKEN = "gpu", "step"
"""Names of the milliseconds of a decode step: of its graph, and per output token as the engine times it."""


class Setting:
    """All measurements of one engine, model, dtype and GPU."""

    def __init__(self, files: Sequence[dict[str, Any]]) -> None:
        f = files[0]
        self.label = [f["engine"], f["model"], f["dtype"]]
        self.layers, self.experts = f["layers"], f["experts"]
        self.variants = {name: of for file in files for name, of in file["variants"].items()}
        self._files = files

    def rows(self, part: str, **wanted: Any) -> list[dict[str, Any]]:
        rows = [row for file in self._files for row in file.get(part, [])]
        return [row for row in rows if all(row[k] == v for k, v in wanted.items())]

    def value(self, part: str, what: str, variant: str, **wanted: Any) -> float | None:
        """The median of the repeats of a cell; None if it was not measured."""
        values = [v for row in self.rows(part, variant=variant, **wanted) for v in row.get(what, ()) if v is not None]
        return statistics.median(values) if values else None

    def values(self, part: str, *names: str) -> list[tuple[Any, ...]]:
        """The distinct values of some columns of a part, ascending."""
        return sorted({tuple(row[name] for name in names) for row in self.rows(part)})

    def others(self, part: str) -> list[str]:
        """The engine's backends among the variants of a part: all but STOCK, PLUGIN and WITHOUT_EXPERTS."""
        ours = (STOCK, PLUGIN, WITHOUT_EXPERTS)
        return sorted({row["variant"] for row in self.rows(part)} - set(ours))

    def active(self, batch: int, skew: float) -> float | None:
        """Active experts of a layer in a decode batch: measured, or else those of even routing, if there is no skew."""
        found = [row["active_experts"] for row in self.rows("decode", batch=batch, skew=skew)]
        known: list[float] = [x for x in found if x is not None]
        if known:
            return known[0]
        number, top_k = self.experts["number"], self.experts["top_k"]
        return None if skew else float(number * (1 - (1 - top_k / number) ** batch))

    def floor(self, batch: int, skew: float) -> float | None:
        """Milliseconds of a decode step whose experts only take the time of reading the weights of the active ones.

        It is the step without experts plus that time. None if the step without experts was not measured.
        """
        rest, active = self.value("decode", GPU, WITHOUT_EXPERTS, batch=batch, skew=skew), self.active(batch, skew)
        if rest is None or active is None:
            return None
        return rest + self.layers * active * float(self.experts["bytes"]) / BYTES_PER_MS


def settings(folder: Path) -> list[Setting]:
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for file in files:
        groups.setdefault((file["engine"], file["model"], file["dtype"], file["device"]), []).append(file)
    return [Setting(group) for group in groups.values()]


def ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None or not b else f"{a / b:.2f}x"


def number(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def share(stock: float | None, ours: float | None, floor: float | None) -> str:
    """The gain over stock as a share of the possible gain."""
    if stock is None or ours is None or floor is None or stock <= floor:
        return "-"
    return f"{(stock - ours) / (stock - floor):.2f}"


def _ratios(s: Setting, other: str) -> list[float]:
    """Another variant's time over ours, for each decode batch that has both, without skew."""
    found = []
    for row in s.rows("decode", variant=PLUGIN, skew=0.0):
        theirs, ours = (s.value("decode", GPU, name, batch=row["batch"], skew=0.0) for name in (other, PLUGIN))
        if theirs and ours:
            found.append(theirs / ours)
    return found


def _summary(found: Sequence[Setting]) -> str:
    rows = []
    for s in found:
        for other in (STOCK, *s.others("decode")):
            if ratios := _ratios(s, other):
                mean, worst = statistics.geometric_mean(ratios), min(ratios)
                rows.append([*s.label, other, len(ratios), f"{mean:.3f}x", f"{worst:.2f}x"])
    return table(("engine", "model", "dtype", "over", "batch sizes", "geometric mean", "worst"), rows)


def _decode(found: Sequence[Setting]) -> str:
    rows = []
    for s in found:
        for skew, batch in s.values("decode", "skew", "batch"):
            cell = {"batch": batch, "skew": skew}
            stock, ours = (s.value("decode", GPU, name, **cell) for name in (STOCK, PLUGIN))
            tokens = [s.value("decode", TOKEN, name, **cell) for name in (STOCK, PLUGIN)]
            floor = s.floor(batch, skew)
            figures = [number(s.active(batch, skew), 1), number(stock, 3), number(ours, 3), ratio(stock, ours)]
            possible = [number(floor, 3), share(stock, ours, floor)]
            rows.append([*s.label, f"{skew:g}", batch, *figures, ratio(*tokens), *possible])
    head = ("engine", "model", "dtype", "skew", "batch", "experts active", "stock, ms", "ramp_moe, ms", "faster")
    return table((*head, "per token", "floor, ms", "of what is possible"), rows)


def _first_token(found: Sequence[Setting]) -> str:
    rows = []
    for s in found:
        for (prompt,) in s.values("first_token", "prompt"):
            what = "first_token" if s.value("first_token", "first_token", STOCK, prompt=prompt) else "wall"
            stock, ours = (s.value("first_token", what, name, prompt=prompt) for name in (STOCK, PLUGIN))
            rows.append([*s.label, prompt, number(stock), number(ours), ratio(stock, ours)])
    return table(("engine", "model", "dtype", "prompt", "stock, ms", "ramp_moe, ms", "faster"), rows)


def _throughput(found: Sequence[Setting]) -> str:
    rows = []
    for s in found:
        for part, what, inverse in (("mixed", "wall", True), ("http", "tokens_per_s", False)):
            pair = [s.value(part, what, name) for name in (STOCK, PLUGIN)]
            if None not in pair:
                failed = sum(sum(row.get("failed", ())) for row in s.rows(part))
                figures = [number(x, 0) for x in pair]
                rows.append([*s.label, part, *figures, ratio(*(pair if inverse else pair[::-1])), failed])
    head = ("engine", "model", "dtype", "run", "stock", "ramp_moe", "faster", "failed requests")
    return table(head, rows)


def _start(found: Sequence[Setting]) -> str:
    rows = []
    for s in found:
        for name, of in s.variants.items():
            if "start_s" in of or "ready_s" in of:
                used = of.get("memory_gib", {})
                ready = statistics.median(of["ready_s"]) if of.get("ready_s") else None
                begun = "warm" if of.get("warm") else "cold"
                first = "-" if "start_s" not in of else f"{of['start_s']:.1f} ({begun})"
                rows.append([*s.label, name, first, number(ready, 1), number(used.get("reserved"))])
    head = ("engine", "model", "dtype", "variant", "engines together, s", "server alone, s", "GPU memory, GiB")
    return table(head, rows)


def _accuracy(found: Sequence[Setting]) -> str:
    rows = [
        [*s.label, row["variant"], row["tokens"], f"{row['rms']:.4f}", f"{row['most']:.3f}"]
        for s in found
        for row in s.rows("accuracy")
    ]
    return table(("engine", "model", "dtype", "variant", "tokens", "rms", "largest"), rows)


def _endurance(found: Sequence[Setting]) -> str:
    rows: Iterable[list[Any]] = [
        [*s.label, row["variant"], row["answered"], row["cancelled"], row["failed"]]
        + [f"{row[f'{where}_grown_bytes'] / 2**20:.0f}" for where in ("gpu", "host")]
        for s in found
        for row in s.rows("endurance")
    ]
    head = (
        "engine",
        "model",
        "dtype",
        "variant",
        "answered",
        "cancelled",
        "failed",
        "GPU grown, MiB",
        "host grown, MiB",
    )
    return table(head, rows)


MAKERS = {
    "summary": _summary,
    "decode": _decode,
    "first_token": _first_token,
    "throughput": _throughput,
    "start": _start,
    "accuracy": _accuracy,
    "endurance": _endurance,
}


def _servers(found: Sequence[Setting]) -> str:
    """For the repository's README: what the plugin gains over the engine's own choice."""
    rows = []
    for s in found:
        if ratios := _ratios(s, STOCK):
            first = [
                ratio(*(s.value("first_token", "first_token", name, prompt=prompt) for name in (STOCK, PLUGIN)))
                for (prompt,) in s.values("first_token", "prompt")
            ]
            mixed = ratio(*(s.value("mixed", "wall", name) for name in (STOCK, PLUGIN)))
            decode = f"{statistics.geometric_mean(ratios):.2f}x (worst {min(ratios):.2f}x)"
            rows.append([*s.label, decode, " / ".join(first) or "-", mixed])
    head = (
        "engine",
        "model",
        "dtype",
        "decode, GPU time, batch 1 to 256",
        "first token of 512 / 2,048 / 8,192",
        "mixed",
    )
    return table(head, rows)


def tables(folder: Path = HERE) -> Tables:
    """The makers of the page's tables, for a folder's files."""
    return over(lambda: settings(folder), MAKERS)


TABLES = tables()
FRONT = over(lambda: settings(HERE), {"servers": _servers})


def draw() -> None:
    """Draw decode.png: how much faster a decode step is than stock, by batch size, for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for s in settings(HERE):
        batches = [batch for skew, batch in s.values("decode", "skew", "batch") if not skew]
        times = [[s.value("decode", GPU, name, batch=b, skew=0.0) for name in (STOCK, PLUGIN)] for b in batches]
        gains = [(b, stock / ours) for b, (stock, ours) in zip(batches, times, strict=True) if stock and ours]
        axis.plot(*zip(*gains, strict=True), marker="o", label=" ".join(s.label))
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(
        xscale="log", xlabel="batch", ylabel="times as fast as stock", title="GPU time of a decode step on an H200"
    )
    axis.set_xticks([1, 8, 32, 128, 256], ["1", "8", "32", "128", "256"])
    axis.legend(fontsize=8)
    figure.savefig(HERE / "decode.png", dpi=100)
