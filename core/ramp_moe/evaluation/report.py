"""`ramp-moe compare --html`: one self-contained page, plots inline as SVG (matplotlib, the extra `plots`)."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RampMoEError
from ..measurements.json_file import check_target, write_atomically
from ..terminal import printable
from .comparison import Batch, Comparison, Pick, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "ramp-moe", "font.size": 10, "text.parse_math": False}
"""Settings of the plots. Text stays text, so that the page can be searched, and no label is a formula. A fixed salt
makes the same result give the same file."""

STATIC, HISTOGRAM, BEST = "#b3541e", "#1f6fb4", "#4d4d4d"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.banner { background: #f3f0e6; border-left: 4px solid #b3541e; padding: .6rem 1rem }
.figures { font-size: 1.7rem; font-weight: 600 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .18rem .6rem; text-align: right }
th { border-bottom: 1px solid #999 } td.l, th.l { text-align: left } tr:hover td { background: #f6f6f6 }
td.up { color: #186a2f } td.down { color: #a1281e }
svg { max-width: 100%; height: auto }
"""


def check_report(path: Path) -> None:
    """Raise what `write_report` would raise without matplotlib, or for a folder, before minutes of measuring."""
    _matplotlib()
    check_target(path)


def write_report(result: Comparison, path: Path) -> None:
    """Write the page, atomically. Raises RampMoEError without matplotlib, ProfileError if it cannot be written."""
    check_report(path)
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        # A user's own settings may need TeX, or fonts, that are not here.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        page = _page(result)
    write_atomically(path, printable(page).encode())


def _matplotlib() -> Any:
    """Import matplotlib, without the backend that the environment asks for (a notebook's, for one): no window is opened
    here."""
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ImportError:
        raise RampMoEError("--html draws its plots with matplotlib: pip install 'ramp-moe[plots]'") from None
    except Exception as e:
        raise RampMoEError(f"matplotlib, which draws --html, cannot be imported: {e}") from None
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    return matplotlib


def _page(result: Comparison) -> str:
    measured = result.mode != "predicted"
    title = f"ramp-moe: {result.model} ({result.dtype}) on {result.device}"
    s = result.speedup_over_static
    plots = [("Latency by batch size", _latency(result.batches))]
    if measured:
        plots.append(("Regret: how far from the oracle", _regret(result.batches)))
    plots.append(("Which configuration wins where", _winners(result.batches)))
    body = "\n".join(f"<h2>{html.escape(name)}</h2>\n{_svg(figure)}" for name, figure in plots)
    notes = "".join(f"<li>{html.escape(n)}</li>" for n in result.notes)
    methods = "".join(
        f"<li>{html.escape(x['kernel'])}: {html.escape(method)}</li>"
        for x in result.sources
        for method in dict.fromkeys(run["method"] for run in x["runs"])
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="banner">{html.escape(result.provenance())}</p>
<p><span class="figures">{s.geomean:.3f}x</span> {"" if measured else "predicted "}geometric mean speed-up of
histogram over static dispatch; min {s.min:.3f}x, max {s.max:.3f}x.
Kernels: {html.escape(", ".join(result.kernels))}.</p>
{_policies(result)}
{body}
{_plugins(result)}
<h2>Every batch</h2>
{_batches(result.batches)}
<h2>Notes</h2><ul>{notes}{methods}</ul>
</body></html>
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Make a table of cells that are HTML already. Columns in `left` are text."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f'<{tag} class="{"l" if i in left else ""}">{v}</{tag}>' for i, v in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _policies(result: Comparison) -> str:
    if not result.baselines:
        return ""
    rows = [[html.escape(name), *(percent(v) for v in s.as_dict().values())] for name, s in result.baselines.items()]
    return "<h2>Regret of each dispatch</h2>" + _table(["dispatch", "mean", "median", "p95", "max"], rows, [0])


def _plugins(result: Comparison) -> str:
    if not result.plugins:
        return ""
    rows = [
        [
            html.escape(" + ".join(row.kernels)),
            str(row.batches),
            f"{row.speedup_over_static.geomean:.3f}",
            percent(row.regret),
            percent(row.static_regret),
        ]
        for row in result.plugins
    ]
    head = ["kernels", "batches", "speed-up", "regret", "static's"]
    return "<h2>Plugins' kernels, alone and beside the others</h2>" + _table(head, rows, [0])


def _batches(batches: Sequence[Batch]) -> str:
    def pick(p: Pick | None) -> list[str]:
        return ["", ""] if p is None else [html.escape(f"{p.kernel}/{p.config}"), f"{p.us:.1f}"]

    head = ["tokens", "routing", "active", "static", "us", "histogram", "us", "best", "us", "speed-up", "regret"]
    rows = [
        [
            str(b.tokens),
            html.escape(b.routing),
            f"{b.active_experts:.0f}",
            *pick(b.static),
            *pick(b.histogram),
            *pick(b.best),
            f"{b.speedup:.3f}",
            percent(b.regret_of(b.histogram)),
        ]
        for b in batches
    ]
    return _table(head, rows, [1, 3, 5, 7])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)


def _token_axis(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(s) for s in sizes])
    axes.minorticks_off()
    axes.set_xlabel("tokens in the batch")


def _by_size(batches: Sequence[Batch], kinds: Sequence[str]) -> dict[str, dict[int, list[float]]]:
    """Microseconds by dispatch and batch size. Every routing of a size counts once."""
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in kinds}
    for b in batches:
        for kind, p in (("static", b.static), ("histogram", b.histogram), ("oracle", b.best)):
            if p is not None:
                found[kind].setdefault(b.tokens, []).append(p.us)
    return found


def _latency(batches: Sequence[Batch]) -> Figure:
    from matplotlib.figure import Figure

    colours = {"static": STATIC, "histogram": HISTOGRAM, "oracle": BEST}
    styles = {"static": "-", "histogram": "-", "oracle": ":"}
    times = {k: v for k, v in _by_size(batches, list(colours)).items() if v}
    sizes = sorted(times["static"])
    mean = {k: np.array([np.exp(np.log(v[s]).mean()) for s in sizes]) for k, v in times.items()}
    base = "oracle" if "oracle" in mean else "histogram"
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for kind, us in mean.items():
        left.plot(sizes, us, styles[kind], color=colours[kind], marker="o", markersize=3.5, label=kind)
        right.plot(sizes, us / mean[base], styles[kind], color=colours[kind], marker="o", markersize=3.5)
    left.set_yscale("log")
    left.set_ylabel("us, geometric mean over routings")
    left.legend(frameon=False)
    right.set_ylabel(f"times the {base}")
    for axes in (left, right):
        _plain(axes)
        _token_axis(axes, sizes)
        axes.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    return figure


def _regret(batches: Sequence[Batch]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6))
    axes = figure.subplots()
    share = np.arange(1, len(batches) + 1) / len(batches) * 100
    for name, colour in (("static", STATIC), ("histogram", HISTOGRAM)):
        values = sorted(100 * (b.regret_of(getattr(b, name)) or 0.0) for b in batches)
        axes.step(values, share, where="post", color=colour, label=name)
    _plain(axes)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.set_xlabel("regret, % slower than the oracle")
    axes.set_ylabel("% of batches at or below")
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def _winners(batches: Sequence[Batch]) -> Figure:
    """Plot batch size by routing, coloured by the token block of the winner.

    The winner is the oracle's choice, or the histogram choice if nothing was measured. A cross marks a histogram
    choice that is over 2% slower.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    sizes = sorted({b.tokens for b in batches})
    routings = list(dict.fromkeys(b.routing for b in batches))
    blocks = np.full((len(routings), len(sizes)), np.nan)
    figure = Figure(figsize=(1.6 + 0.78 * len(sizes), 1.4 + 0.42 * len(routings)))
    axes = figure.subplots()
    kernels = list(dict.fromkeys(p.kernel for b in batches for p in (b.best, b.histogram) if p is not None))
    for b in batches:
        winner = b.best or b.histogram
        y, x = routings.index(b.routing), sizes.index(b.tokens)
        blocks[y, x] = winner.token_block
        missed = (b.regret_of(b.histogram) or 0.0) > 0.02
        # Letters tell kernels apart if several compete.
        letter = f"{chr(ord('A') + kernels.index(winner.kernel))} " if len(kernels) > 1 else ""
        text = f"{letter}{winner.token_block}{' ×' if missed else ''}"
        axes.text(
            x, y, text, ha="center", va="center", fontsize=8, color="white" if winner.token_block > 48 else "black"
        )
    norm = LogNorm(vmin=4, vmax=max(256.0, float(np.nanmax(blocks))))
    axes.imshow(np.ma.masked_invalid(blocks), cmap="Blues", norm=norm, aspect="auto")
    axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
    axes.set_yticks(range(len(routings)), [printable(r) for r in routings])
    axes.set_xlabel("tokens in the batch")
    names = "; ".join(f"{chr(ord('A') + i)} = {k}" for i, k in enumerate(kernels)) if len(kernels) > 1 else kernels[0]
    axes.set_title(f"token block of the winner ({names}); × = histogram choice over 2% slower", fontsize=9, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.tight_layout()
    return figure
