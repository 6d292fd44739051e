"""Renders results for a person, as rich renderables. Nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from ..cost_model.model import CostModel
from ..cost_model.regions import Regions
from ..evaluation.comparison import Batch, Comparison, Noise, Pick, Row, percent
from ..profiler.drift import Drift
from ..spec.hardware import Hardware
from ..spec.routing import IntArray, active_experts
from ..spec.shapes import MoEShape


def comparison(result: Comparison) -> list[RenderableType]:
    table = Table(title=f"{result.model} ({result.dtype}) on {result.device}")
    measured = result.mode != "predicted"
    table.add_column("tokens", justify="right")
    table.add_column("routing")
    table.add_column("active", justify="right")
    table.add_column("static")
    table.add_column("us", justify="right")
    table.add_column("histogram")
    table.add_column("us", justify="right")
    if measured:
        table.add_column("best")
        table.add_column("us", justify="right")
    else:
        table.add_column("steps", justify="right")
        table.add_column("differ", justify="right")
    table.add_column("speed-up", justify="right")
    if measured:
        table.add_column("regret", justify="right")
    tokens = 0
    batches = sorted(result.batches, key=lambda b: b.tokens)
    labels = _labels(batches)
    for batch in batches:
        if tokens and batch.tokens != tokens:
            table.add_section()
        tokens = batch.tokens
        table.add_row(*_batch_cells(batch, labels))
    legend = Table("", "configuration", box=None, show_header=False, padding=(0, 1))
    for (kernel, config), label in labels.items():
        legend.add_row(label, escape(f"{kernel}/{config}"))
    lines: list[RenderableType] = [table, legend, escape(result.provenance())]
    if result.baselines:
        lines.append(_policies(result))
    s = result.speedup_over_static
    kind = "" if measured else "predicted "
    lines.append(
        f"[bold]{kind}speed-up of histogram over static dispatch: geometric mean {s.geomean:.3f}x[/bold], "
        f"min {s.min:.3f}x, max {s.max:.3f}x over {len(result.batches)} "
        + ("batches" if measured else "kinds of batch")
    )
    if result.best_over_static:
        lines.append(
            f"oracle (best in hindsight) over static dispatch: geometric mean {result.best_over_static.geomean:.3f}x"
        )
    if result.noise:
        lines.append(_noise(result.noise))
    if result.plugins:
        lines.append(_plugin_rows(result.plugins))
    return [*lines, *(f"[dim]note: {escape(n)}" for n in result.notes)]


def _plugin_rows(rows: Sequence[Row]) -> Table:
    table = Table(title="plugins' kernels, alone and beside those above")
    table.add_column("kernels", overflow="fold")
    for what in ("batches", "histogram over static", "best over static", "regret of histogram", "of static"):
        table.add_column(what, justify="right")
    for row in rows:
        speedups = (f"{r.geomean:.3f}x" for r in (row.speedup_over_static, row.best_over_static))
        table.add_row(
            escape(" + ".join(row.kernels)), str(row.batches), *speedups, *map(percent, (row.regret, row.static_regret))
        )
    return table


def _noise(noise: Noise) -> str:
    regrets = ", ".join(f"{name} {percent(value)}" for name, value in noise.regret.items())
    return (
        "noise of measuring: choosing on one run and judging on another costs "
        f"{percent(noise.selection.mean)} (p95 {percent(noise.selection.p95)}); "
        f"mean regret against the best so chosen: {regrets}"
    )


def _labels(batches: Sequence[Batch]) -> dict[tuple[str, str], str]:
    """Short labels of configurations, whose names are too long for a column.

    A label is the first letters of the kernel and a number, in order of appearance.
    """
    chosen = [(p.kernel, p.config) for b in batches for p in (b.static, b.histogram, b.best) if p]
    kernels = {kernel: "" for kernel, _ in chosen}
    for kernel in kernels:
        lengths = range(1, len(kernel) + 1)
        kernels[kernel] = next(
            kernel[:n] for n in lengths if n == len(kernel) or sum(k.startswith(kernel[:n]) for k in kernels) == 1
        )
    found: dict[tuple[str, str], str] = {}
    for kernel, config in sorted(dict.fromkeys(chosen), key=lambda c: kernels[c[0]]):
        number = 1 + sum(k == kernel for k, _ in found)
        found[kernel, config] = f"{kernels[kernel]}{number}"
    return found


def _batch_cells(batch: Batch, labels: Mapping[tuple[str, str], str]) -> list[str]:
    def pick(p: Pick) -> list[str]:
        return [escape(labels[p.kernel, p.config]), f"{p.us:.1f}"]

    colour = "[green]" if batch.speedup > 1.02 else "[red]" if batch.speedup < 0.98 else ""
    cells = [str(batch.tokens), escape(batch.routing), f"{batch.active_experts:.0f}", *pick(batch.static)]
    cells += pick(batch.histogram)
    cells += [str(batch.steps), percent(batch.changed)] if batch.best is None else pick(batch.best)
    cells.append(f"{colour}{batch.speedup:.3f}x")
    if batch.best is not None:
        cells.append(percent(batch.regret_of(batch.histogram)))
    return cells


def _policies(result: Comparison) -> Table:
    table = Table(title="regret against the oracle")
    table.add_column("dispatch")
    for what in ("mean", "median", "p95", "max"):
        table.add_column(what, justify="right")
    for name, summary in result.baselines.items():
        table.add_row(name, *(percent(v) for v in summary.as_dict().values()))
    return table


def regions(shape: MoEShape, hardware: Hardware, batch: str, found: Regions) -> list[RenderableType]:
    metrics = ", ".join(f"{k} {v:.4g}" for k, v in found.metrics.items())
    table = Table("optimisation", "pays", "metric", "value", "threshold", "why")
    for a in found.advice:
        why = f"{escape(a.reason)}\n[dim]threshold: {escape(a.derivation)}"
        pays = "[green]yes" if a.pays else "no"
        table.add_row(a.optimisation, pays, a.metric, f"{a.value:.4g}", f"{a.threshold:.4g}", why)
    return [
        f"{shape.title} on {hardware.name}: {escape(batch)}",
        metrics,
        table,
        f"token block advised: {found.token_block}",
        "[dim]predictions from hardware constants, not measurements",
    ]


def fits(shape: MoEShape, hardware: Hardware, written: Sequence[dict[str, Any]]) -> list[RenderableType]:
    table = Table(title=f"{shape.title} on {hardware.name}")
    for what in ("kernel", "form", "batches recorded", "fits", "error (rms, median)", "regret mean", "p95", "max"):
        table.add_column(what, justify="left" if what in ("kernel", "form") else "right")
    for w in written:
        regret = (percent(w["regret"][k]) for k in ("mean", "p95", "max"))
        error = percent(w["rms_error"]["median"])
        table.add_row(w["kernel"], w["form"], str(w["batches"]), str(w["stages"]), error, *regret)
    lines = [f"recorded: {w['measured']}; written to {w['file']}" for w in written]
    return [table, "Regret is measured on batches that the fit has not seen.", *(escape(line) for line in lines)]


def profiles(shape: MoEShape, hardware: Hardware, rows: Sequence[dict[str, Any]]) -> list[RenderableType]:
    table = Table(title=f"{shape.title} on {hardware.name}")
    for what in ("kernel", "version", "runs", "to fit on", "to judge on", "configurations", "left out", "stages"):
        table.add_column(what, justify="left" if what in ("kernel", "version") else "right", overflow="fold")
    lines: list[RenderableType] = [table]
    for row in rows:
        columns = dict(row["columns"])
        left_out = sum(len(x["configs"]) for x in row["left_out"])
        table.add_row(
            row["kernel"],
            escape(row["kernel_version"]),
            str(len(row["runs"])),
            str(row["batches"]["tune"]),
            str(row["batches"]["test"]),
            str(columns.pop("path", 0)),
            str(left_out),
            str(sum(columns.values())),
        )
        lines += [
            f"{escape(row['kernel'])}: {escape(run['device_name'])} {escape(run['gpu'])}, {escape(run['measured'])}"
            for run in row["runs"]
        ]
        if row["spread"]:
            lines.append(_spread(row["kernel"], row["spread"]))
        if bias := row["stages_over_path"]:
            lines.append(
                f"{escape(row['kernel'])}: stages timed one by one add up to {percent(bias['median'])} over the whole "
                f"path (median; 95% of times are within {percent(bias['p95'])} either way)"
            )
    return [*lines, *(f"[dim]{escape(row['file'])}" for row in rows)]


def _spread(kernel: str, spread: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{kernel}: one run against another")
    for what in ("latency", "cells", "median", "p95", "offset"):
        table.add_column(what, justify="left" if what == "latency" else "right")
    for s in spread:
        bounds = "all" if not s["low"] and s["high"] is None else f"{s['low']:.0f} to {s['high'] or math.inf:.0f} us"
        table.add_row(bounds, str(s["cells"]), f"{s['median']:.2%}", f"{s['p95']:.2%}", f"{s['offset']:+.2%}")
    return table


def grid_table() -> Table:
    table = Table()
    for what in ("candidate", "predicted us", "M-tiles", "CTAs", "waves", "last wave", "padding", ""):
        table.add_column(what, justify="left" if what in ("candidate", "") else "right", overflow="fold")
    return table


def grid_cells(gemms: Sequence[dict[str, Any]]) -> list[str]:
    slots = [
        ("m_tiles", "{}"),
        ("ctas", "{}"),
        ("waves", "{}"),
        ("tail_utilisation", "{:.0%}"),
        ("padding_waste", "{:.0%}"),
    ]
    return [" + ".join(form.format(grid[key]) for grid in gemms) for key, form in slots]


def batch_title(shape: MoEShape, hardware: Hardware, batch: str, histogram: IntArray) -> str:
    active, hottest = int(active_experts(histogram)), int(histogram.max())
    return (
        f"{shape.title} on {hardware.name}: {escape(batch)}; "
        f"{active} of {shape.num_experts} experts active, the hottest with {hottest} ids"
    )


def explanation(
    model: CostModel,
    batch: str,
    histogram: IntArray,
    candidates: Sequence[dict[str, Any]],
    layouts: Mapping[str, Any],
    notes: Sequence[str],
) -> list[RenderableType]:
    table = grid_table()
    for i, c in enumerate(candidates):
        mark = ("[green]wins" if i == 0 else "") + (" [yellow]extrapolated" if c["extrapolated"] else "")
        cells = grid_cells(c["gemms"])
        table.add_row(escape(f"{c['kernel']}/{c['config']}"), f"{c['predicted_us']:.1f}", *cells, mark)
    return [
        batch_title(model.shape, model.hardware, batch, histogram),
        table,
        f"{len(model.candidates)} candidates. {'GUESSED' if model.guessed else 'PREDICTED'} by the cost model "
        f"(form {model.form}), which was fitted to "
        f"recorded measurements of {escape(' and '.join(model.measured))}; times cover: {', '.join(model.covered)}.",
        escape(_held(layouts)),
        *(f"[dim]note: {escape(n)}" for n in notes),
    ]


def _held(layouts: Mapping[str, Any]) -> str:
    one, gain = layouts["one_copy"], layouts["gain_of_second"]
    over = "the profiled batches" if layouts["weighed"]["profiled"] else "uniform batches of up to 4096 tokens"
    return (
        f"weights in {one['layouts'][0]} (one copy) serve {', '.join(one['kernels'])}; a second copy would gain "
        f"{percent(gain['this_batch'])} on this batch, {percent(gain['weighed'])} over {over}"
    )


def drift(found: Drift) -> list[RenderableType]:
    table = Table(title=f"{found.model} ({found.dtype}) on {found.device}: {', '.join(found.kernels)}")
    for what in ("tokens", "routing", "configuration", "recorded us", "measured us", "ratio", "dispatch's choice"):
        left = what in ("routing", "configuration", "dispatch's choice")
        table.add_column(what, justify="left" if left else "right", overflow="fold")
    for c in found.cells:
        times = (
            ["failed", ""]
            if c.measured_us is None
            else [f"{c.measured_us:.1f}", f"{c.measured_us / c.recorded_us:.3f}"]
        )
        name = escape(f"{c.kernel}/{c.config}")
        mark = "yes" if c.chosen else ""
        table.add_row(str(c.tokens), escape(c.routing), name, f"{c.recorded_us:.1f}", *times, mark)
    colour = {"holds": "green", "shifted": "yellow", "does not hold": "red"}[found.verdict]
    figures = (
        f"median of measured / recorded {found.offset:+.1%}, besides {found.spread:.1%} off; dispatch's choices lose "
        f"{found.loss:.1%} more than when recorded; by noise alone up to {found.tolerance:.1%}; the fastest recorded "
        f"still is on {found.still_best} of {found.batches} batches; {found.seconds:.0f} s"
    )
    verdict = f"[bold {colour}]{found.verdict}[/]"
    if found.verdict == "shifted":
        verdict += ": all times by one factor, the choices still hold"
    changed = [f"{c.what}: {c.recorded} when recorded, {c.now} now" for c in found.changes]
    failed = dict.fromkeys(f"{c.kernel}/{c.config} fails: {c.failed}" for c in found.cells if c.failed is not None)
    return [
        table,
        *(f"[dim]{escape(line)}" for line in (*failed, *changed)),
        *(f"[dim]note: {escape(n)}" for n in found.notes),
        figures,
        verdict,
        *(escape(reason) for reason in found.reasons),
    ]
