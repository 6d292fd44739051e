"""Computes the tables and plots of the cross-kernel study in the README beside this from the shipped profiles.

`python profiles/pages.py --write families` fills the page and the repository's README, writes cells.csv and draws the
plots. It takes seconds, without a GPU. All families with a profile take part. The others are named as missing.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pages import table
from studies.families.policies import (
    CHOOSE_AMONG,
    DTYPES,
    FAMILIES,
    REGIMES,
    Cell,
    cases,
    cells,
    choosing_us,
    judged,
    present,
    switching_us,
)
from studies.families.unseen import unseen_cells
from studies.shipped import MODELS, h200, registry, store

HERE = Path(__file__).parent
DECODE = 512
"""Most tokens of the batches to which the aims apply."""
LOST = 0.98
"""Speed-up below which dispatch by histogram counts as a loss. Most cells of two runs differ by less."""
TRACE = "trace"
"""The kind of routing in the held-out study that was recorded."""
VARIANTS = {
    "dispatch": "free",
    "choosing": "with choosing",
    "planned": "planned",
}
"""Names of the variants of dispatch by histogram, by policy."""
INCLUDED = "choosing"
"""The variant in tables that show only one."""
AIMS = (
    ("flashinfer_cutlass alone", "by default", 1.13, "flashinfer_cutlass itself", ("dispatch", "choosing")),
    ("flashinfer_cutlass alone", "tuned by batch size", 1.13, "flashinfer_cutlass tuned", ("dispatch", "choosing")),
    ("deep_gemm alone", "by default", 1.41, "deep_gemm itself", ("dispatch", "choosing")),
    ("deep_gemm alone", "tuned by batch size", 1.41, "deep_gemm tuned", ("dispatch", "choosing")),
    ("one configuration of our best kernel", "by all families", 1.22, "single", ("dispatch", "choosing")),
    ("one configuration of our best kernel", "by that kernel", 1.22, "single", ("own kernel", "own kernel, choosing")),
)
"""(rival, how it is configured, speed-up aimed at, the rival's policy, variants of dispatch without and with
overheads)."""


def speedup(some: Sequence[Cell], policy: str, variant: str = INCLUDED, spread: bool = False) -> str:
    """Geometric mean of the speed-ups over the cells in which the policy was measured."""
    ratios = np.array([c.over(policy, variant) for c in some])
    ratios = ratios[np.isfinite(ratios)]
    if not len(ratios):
        return ""
    mean = f"{np.exp(np.log(ratios).mean()):.3f}x"
    return f"{mean} ({ratios.min():.2f} to {ratios.max():.2f})" if spread else mean


def sources() -> str:
    """The configurations and batches of each family's profile."""
    rows = []
    for case in cases():
        row = [case.model, case.dtype]
        for family in FAMILIES:
            found = store.find(family, case.shape, h200)
            if found is None:
                reason = registry.kernel(family).unsupported(case.shape, h200)
                row.append("not measured" if reason is None else f"does not take {case.dtype}")
                continue
            sweep, count = found[1], len(case.of([family]))
            split = f"{len(sweep.batches_of('tune'))} + {len(sweep.batches_of('test'))}"
            row.append(f"{count} on {split}, {', '.join(sorted({r.gpu for r in sweep.record.runs}))}")
        bounds = case.test.bounded[np.arange(len(case.test.labels)), case.dispatched(case.families)].sum()
        rows.append([*row, f"{len(case.tune.labels)} + {len(case.test.labels)}", bounds])
    head = ("model", "dtype", *FAMILIES, "batches of all: to tune + to judge", "choices judged by a bound")
    return table(head, rows)


def winners() -> str:
    """The share of all batches that each family wins in hindsight."""
    kinds = sorted({c.routing for c in cells()})
    found = [(d, m, r, [c for c in cells() if (c.dtype, c.model, c.regime) == (d, m, r)])
             for d in DTYPES for m in MODELS for r in REGIMES]  # fmt: skip
    found += [(d, "all models", k, [c for c in cells() if (c.dtype, c.routing) == (d, k)])
              for d in DTYPES for k in kinds]  # fmt: skip
    rows = []
    for *names, some in found:
        won = Counter(c.best.split("/")[0] for c in some)
        shares = (f"{won[f] / len(some):.0%}" if won[f] else "" for f in present)
        rows.append((*names, len(some), *shares, len({c.best for c in some})))
    return table(("dtype", "model", "tokens, or routing", "batches", *present, "configurations that win"), rows)


HEAD = ("batches", *(f"over {f} alone" for f in present), "over static", "over static, all kinds", "over oracle")


def against(some: Sequence[Cell], variant: str = INCLUDED) -> list[object]:
    policies = (*(f"{f} tuned" for f in present), "static", "static, all kinds", "oracle")
    return [len(some), *(speedup(some, p, variant) for p in policies)]


def variants() -> str:
    """Speed-ups of each variant of dispatch, the models together: the cost of overhead and layouts."""
    rows = ((d, r, name, *against(judged(dtype=d, regime=r), v)) for d in DTYPES for r in REGIMES
            for v, name in VARIANTS.items())  # fmt: skip
    return table(("dtype", "tokens", "dispatch", *HEAD), rows)


def groups() -> str:
    """Speed-ups by model and batch size, and by skew."""
    kinds = sorted({c.routing for c in judged()})
    found = [(d, m, r, judged(dtype=d, model=m, regime=r)) for d in DTYPES for m in MODELS for r in REGIMES]
    found += [(d, "all models", k, judged(dtype=d, routing=k)) for d in DTYPES for k in kinds]
    return table(("dtype", "model", "tokens, or routing", *HEAD), [(*n, *against(some)) for *n, some in found if some])


def aims() -> str:
    """Speed-ups against the aims up to DECODE tokens, for the models together and for each."""
    rows = []
    for name, how, aim, policy, ways in AIMS:
        for dtype in DTYPES:
            some = [c for c in judged(dtype=dtype) if c.tokens <= DECODE and np.isfinite(c.over(policy, INCLUDED))]
            got = [speedup(some, policy, v, True) for v in ways]
            reached = ["yes" if float(x.split("x")[0]) >= aim else "no" for x in got if x]
            by_model = (" / ".join(speedup([c for c in some if c.model == m], policy, v) for v in ways) for m in MODELS)
            cells = (*got, " / ".join(reached), *by_model) if some else ("not measured",)
            row = (name, how, dtype, len(some), f"{aim:.2f}x", *cells)
            rows.append([*row, *[""] * (8 + len(MODELS) - len(row))])
    head = ("against", "", "dtype", "batches", "aim", "without overheads", "with choosing", "reached")
    return table((*head, *MODELS), rows)


def summary() -> str:
    """Speed-ups over the best family alone, which is known only in hindsight, and over static dispatch over all."""
    rows = []
    for dtype, limit in ((d, t) for d in DTYPES for t in (DECODE, 1 << 30)):
        some = [c for c in judged(dtype=dtype) if c.tokens <= limit]
        everywhere = [f for f in present if all(f"{f} tuned" in c.us for c in some)]
        best = min(everywhere, key=lambda f: sum(np.log(c.us[f"{f} tuned"]) for c in some))
        policies = (f"{best} tuned", "static", "static, all kinds", "oracle")
        cells = (" / ".join(speedup(some, p, v) for v in VARIANTS) for p in policies)
        lost = " / ".join(f"{np.mean([c.over('static', v) < LOST for c in some]):.0%}" for v in VARIANTS)
        rows.append((dtype, f"up to {limit}" if limit == DECODE else "all", len(some), best, *cells, lost))
    head = ("dtype", "tokens", "batches", "best family alone", "over it", "over static", "over static, all kinds",
            "over oracle", "slower than static by more than 2%")  # fmt: skip
    return table(head, rows)


def unseen() -> str:
    """Speed-ups on routings that no profile has seen, by kind, and on the trace by batch size. The models together."""
    kinds, sizes = (sorted({of(c) for c in unseen_cells()}) for of in (lambda c: c.routing, lambda c: c.tokens))
    names = [(d, k, "all") for d in DTYPES for k in kinds] + [(d, TRACE, str(t)) for d in DTYPES for t in sizes]
    found = [
        (d, k, t, [c for c in unseen_cells() if (c.dtype, c.routing) == (d, k) and t in ("all", str(c.tokens))])
        for d, k, t in names
    ]
    policies = (*(f"{f} tuned" for f in present), "static", "oracle")
    rows = []
    for *name, some in found:
        if not some:
            continue
        pairs = [[speedup(some, p, v) for v in ("dispatch", "choosing")] for p in policies]
        won = Counter(c.best.split("/")[0] for c in some)
        shares = ", ".join(f"{f} {n / len(some):.0%}" for f, n in won.most_common())
        rows.append((*name, len(some), shares, *(" / ".join(pair) if pair[0] else "-" for pair in pairs)))
    head = ("dtype", "routing", "tokens", "batches", "wins in hindsight", *(f"over {f} alone" for f in present),
            "over static", "over oracle")  # fmt: skip
    return table(head, rows)


def headline() -> str:
    """Speed-ups of dispatch, free and planned, over each family, over static dispatch over all, and over the oracle."""
    policies = (*(f"{f} tuned" for f in present), "static", "oracle")
    rows = []
    for dtype, limit in ((d, t) for d in DTYPES for t in (DECODE, 1 << 30)):
        some = [c for c in judged(dtype=dtype) if c.tokens <= limit]
        pairs = [[speedup(some, policy, v) for v in ("dispatch", "planned")] for policy in policies]
        cells = (" / ".join(pair) if pair[0] else "-" for pair in pairs)
        rows.append((dtype, f"up to {limit}" if limit == DECODE else "all", len(some), *cells))
    return table(
        ("dtype", "tokens", "batches", *(f"over {f}" for f in present), "over all, static", "over oracle"), rows
    )


def overheads() -> str:
    """Microseconds that are counted for choosing and for switching."""
    sizes = (1, 64, 512, 2048)
    rows = [(m, *(f"{choosing_us(m, t):.2f} / {switching_us(m, t):.2f}" for t in sizes)) for m in MODELS]
    head = (
        f"us per layer, {CHOOSE_AMONG} candidates: choosing / all of switching in a graph",
        *(f"{t} tokens" for t in sizes),
    )
    return table(head, rows)


def layouts() -> str:
    """The layouts that weights are held in, by the number of copies."""
    rows = []
    for case in cases():
        some, free = case.policies, case.layouts(len(FAMILIES))
        for copies, policy in ((1, "one copy"), (2, "two copies")):
            held = case.layouts(copies)
            ratio = np.exp(np.log(some[policy] / some["dispatch"]).mean())
            rows.append((case.model, case.dtype, copies, " and ".join(held.layouts), ", ".join(held.kernels),
                         f"{held.bytes / 2**20:.0f}", f"{held.loss - free.loss:.2%}", f"{ratio - 1:.2%}"))  # fmt: skip
    head = ("model", "dtype", "copies allowed", "held", "kernels", "MiB per layer", "predicted to lose", "loses")
    return table(head, rows)


def losers() -> str:
    """How often dispatch is slower than each policy by more than LOST allows."""
    rows = []
    for dtype in DTYPES:
        for regime in REGIMES:
            some = judged(dtype=dtype, regime=regime)
            for policy in ("static", *(f"{f} tuned" for f in present)):
                ratios = [[c.over(policy, v) for c in some if policy in c.us] for v in VARIANTS]
                if ratios[0]:
                    cells = (f"{np.mean(np.array(x) < LOST):.0%}, at worst {min(x):.2f}x" for x in ratios)
                    rows.append((dtype, regime, policy.removesuffix(" tuned"), len(ratios[0]), *cells))
    return table(("dtype", "tokens", "against", "batches", *VARIANTS.values()), rows)


def losses() -> str:
    """Batches on which dispatch, free or planned, is slower than static dispatch by more than LOST allows."""
    rows = []
    for c in sorted(judged(), key=lambda c: (c.dtype, c.model, c.tokens, c.routing)):
        by = [c.over("static", v) for v in VARIANTS]
        if min(by[0], by[-1]) < LOST:
            rows.append((c.dtype, c.model, c.tokens, c.routing, c.best, c.chosen, *(f"{x:.2f}x" for x in by)))
    return table(("dtype", "model", "tokens", "routing", "best", "dispatch ran", *VARIANTS.values()), rows)


PAGE = (aims, summary, unseen, sources, winners, variants, groups, layouts, overheads, losers, losses)
TABLES = {f.__name__: f for f in PAGE}
FRONT = {"headline": headline}


def sheet() -> str:
    """Every batch as CSV: its winner, and the microseconds of each policy if it is one to judge."""
    policies = list(dict.fromkeys(p for c in judged() for p in c.us))
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("model", "dtype", "tokens", "routing", "wins", "dispatch runs", *policies))
    for c in sorted(cells(), key=lambda c: (c.dtype, c.model, c.tokens, c.routing, not c.us)):
        us = (f"{c.us[p]:.2f}" if np.isfinite(c.us.get(p, np.nan)) else "" for p in policies)
        lines.writerow((c.model, c.dtype, c.tokens, c.routing, c.best, c.chosen, *us))
    return out.getvalue()


FILES = {"cells.csv": sheet}


def draw() -> None:
    """Draw winners.png, the family that wins each batch, and speedups.png, dispatch over each family by batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(FAMILIES, plt.get_cmap("tab10").colors, strict=False))
    kinds = sorted({c.routing for c in cells()})
    shared = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(len(DTYPES), len(MODELS), figsize=(13, 5), **shared)
    for case, axis in zip(cases(), axes.flat, strict=True):
        for family in present:
            won = [c for c in cells() if (c.model, c.dtype, c.best.split("/")[0]) == (case.model, case.dtype, family)]
            x, y = [c.tokens for c in won], [kinds.index(c.routing) for c in won]
            axis.scatter(x, y, color=colours[family], label=family, s=28, marker="s")
        axis.set(title=f"{case.model} {case.dtype}", xscale="log", yticks=range(len(kinds)), yticklabels=kinds)
    axes[0, -1].legend(fontsize=7)
    figure.savefig(HERE / "winners.png", dpi=75)
    figure, axes = plt.subplots(1, len(DTYPES), figsize=(11, 3.5), **shared)
    for dtype, axis in zip(DTYPES, axes, strict=True):
        for family in present:
            some = judged(dtype=dtype)
            axis.scatter([c.tokens for c in some], [c.over(f"{family} tuned", INCLUDED) for c in some], s=9,
                         color=colours[family], label=family)  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=dtype, xscale="log", yscale="log", xlabel="tokens")
    axes[0].set_ylabel("dispatch over the family, tuned")
    axes[0].legend(fontsize=7)
    figure.savefig(HERE / "speedups.png", dpi=75)
