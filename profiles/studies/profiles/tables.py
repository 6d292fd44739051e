"""Computes the tables of the README beside this from the shipped profiles.

`python profiles/pages.py --write profiles` fills the page.
"""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
from pages import table
from ramp_moe import ProfileError
from ramp_moe.cost_model.model import DEFAULT_FORM
from ramp_moe.dispatch.load_model import view
from ramp_moe.evaluation.comparison import Comparison, Ratios, compare_recorded
from ramp_moe.evaluation.regret import regret, selection_noise, sparse_table, static_table, table_choices
from ramp_moe.evaluation.repeatability import RANGES_US
from ramp_moe.evaluation.replay import Replay
from ramp_moe.measurements.sweep import Sweep
from ramp_moe.spec.launchable import LaunchableKernel
from ramp_moe.spec.routing import IntArray
from studies.shipped import MODELS, fitted, h200, registry, replay, split, store

HERE = Path(__file__).parent
KERNELS = (
    ("fp8", ("alpha_moe",)),
    ("fp8", ("cute",)),
    ("fp8", ("deep_gemm",)),
    ("fp8", ("triton",)),
    ("fp8", ("alpha_moe", "triton")),
    ("fp8", ("deep_gemm", "triton")),
    ("fp8", ("alpha_moe", "deep_gemm", "triton")),
    ("fp8", ("alpha_moe", "cute", "deep_gemm", "triton")),
    ("bf16", ("cute",)),
    ("bf16", ("deep_gemm",)),
    ("bf16", ("flashinfer_cutlass",)),
    ("bf16", ("triton",)),
    ("bf16", ("deep_gemm", "triton")),
    ("bf16", ("cute", "deep_gemm", "flashinfer_cutlass", "triton")),
)
CURVE = (8, 12, 16, 24, 32, 48, 64)
"""Numbers of tune batches at which the learning curve is shown."""
JUDGED = ("uniform", "distinct0.5", "dirichlet0.3", "zipf2.0")
"""Kinds of routing of the batches to judge."""
DECODE = 512
"""Most tokens for which DeepGEMM alone is compared cell by cell."""


@cache
def find(model: str, dtype: str, kernel: str) -> Sweep | None:
    found = store.find(kernel, registry.shape(model, dtype), h200)
    return found and found[1]


SINGLE = [(dtype, *kernels) for dtype, kernels in KERNELS if len(kernels) == 1]
SWEEPS = [s for dtype, kernel in SINGLE for m in MODELS if (s := find(m, dtype, kernel))]
CASES = [
    (dtype, kernels, m) for (dtype, kernels), m in itertools.product(KERNELS, MODELS)
    if all(find(m, dtype, k) for k in kernels)
]  # fmt: skip


def percent(value: float) -> str:
    return f"{value:.1%}"


def profiles() -> str:
    """The sweeps: their versions, counts and runs."""
    rows = []
    for s in SWEEPS:
        runs = s.record.runs
        rows.append(
            (
                f"{s.shape.label} {s.shape.dtype}",
                f"{s.kernel} {s.record.kernel_version}",
                s.only(["path"]).times_us.shape[1],
                sum(len(x.configs) for x in s.record.left_out),
                f"{len(s.batches_of('tune'))} + {len(s.batches_of('test'))}",
                "; ".join(f"{r.measured[:16]} {r.gpu} {r.seconds or 0:.0f} s" for r in runs),
            )
        )
    head = ("model", "kernel", "configurations", "pruned", "batches to fit + to judge", "runs: when, GPU, all kernels")
    return table(head, rows)


def repeatability() -> str:
    """|b / a - 1| between two runs a and b, by range of latency, pooled over the four models."""
    rows = []
    for dtype, kernel in SINGLE:
        pairs = []
        for s in SWEEPS:
            if (s.kernel, s.shape.dtype) == (kernel, dtype):
                us = view(s).runs_us
                pairs += [np.stack([us[a], us[b]], -1) for a, b in itertools.combinations(range(len(us)), 2)]
        both = np.concatenate([p[np.isfinite(p).all(-1)] for p in pairs]) if pairs else np.empty((0, 2))
        mean = np.sqrt(both.prod(-1))
        for low, high in (*zip((0.0, *RANGES_US), (*RANGES_US, np.inf), strict=True), (0.0, np.inf)):
            cells = both[(low <= mean) & (mean < high)]
            if len(cells):
                ratio = cells[:, 1] / cells[:, 0] - 1
                name = "all" if (low, high) == (0, np.inf) else f"{low:.0f} to {high:.0f} us"
                size = np.abs(ratio)
                p95 = np.quantile(size, 0.95)
                rows.append((kernel, dtype, name, len(cells), f"{np.median(size):.2%}", f"{p95:.2%}",
                             f"{np.median(ratio):+.2%}"))  # fmt: skip
    return table(("kernel", "dtype", "latency", "cells", "median", "p95", "median of b / a - 1"), rows)


def compared(model: str, dtype: str, kernels: tuple[str, ...], form: str = DEFAULT_FORM) -> Comparison:
    return compare_recorded(replay(model, dtype, kernels), form)


def dispatch() -> str:
    """Static and histogram dispatch on held-out batches, and the share of the regrets that is noise."""
    rows = []
    for dtype, kernels, model in CASES:
        found = compared(model, dtype, kernels)
        best, noise = found.best_over_static, found.noise
        assert best is not None
        speedup = found.speedup_over_static
        rows.append(
            (
                model,
                f"{' + '.join(kernels)} {dtype}",
                len(found.batches),
                f"{speedup.geomean:.3f}x ({speedup.min:.2f} to {speedup.max:.2f})",
                f"{best.geomean:.3f}x ({best.max:.2f})",
                percent(found.baselines["histogram"].mean),
                percent(compared(model, dtype, kernels, "active").baselines["histogram"].mean),
                *(percent(found.baselines[k].mean) for k in ("static", "nearest-batch table")),
                percent(noise.selection.mean) if noise else "",
                f"{percent(noise.regret['histogram'])} / {percent(noise.regret['static'])}" if noise else "",
            )
        )
    head = ("model", "kernels", "batches", "histogram over static (min to max)", "best over static (max)",
            "regret: histogram", "with --form active", "static", "nearest-batch table", "noise of choosing",
            "against the split-half best: histogram / static")  # fmt: skip
    return table(head, rows)


def alpha_moe() -> str:
    """Speed-up of Alpha-MoE by histogram over its own tables, for whole paths and for its launch alone. Rows are kinds
    of held-out routing, pooled over the four models."""
    rows = []
    for stages, table_name in itertools.product(((), ("gemm",)), ("static", "nearest-batch table")):
        by_kind: dict[str, list[float]] = {}
        for model in MODELS:
            tune, _ = split(model, "fp8", ("alpha_moe",), stages)
            test, chosen = held_out(model, "fp8", ("alpha_moe",), stages)
            entries = static_table(tune.times_us, tune.labels)
            if table_name != "static":
                entries = sparse_table(entries)
            static = table_choices(entries, test.labels)
            index = np.arange(len(test.labels))
            ratio = test.times_us[index, static] / test.times_us[index, chosen]
            for (_, kind), r in zip(test.labels, ratio.tolist(), strict=True):
                by_kind.setdefault(kind, []).append(r)
                by_kind.setdefault("all", []).append(r)
        for kind, ratios in sorted(by_kind.items(), key=lambda item: (item[0] == "all", item[0])):
            r = Ratios.of(np.array(ratios))
            losing = sum(x < 0.98 for x in ratios) / len(ratios)
            what = "its launch alone" if stages else "whole path"
            rows.append((what, table_name, kind, len(ratios), f"{r.geomean:.3f}x", f"{r.max:.3f}x", f"{r.min:.3f}x",
                         percent(losing)))  # fmt: skip
    head = ("time", "against", "routing", "batches", "geometric mean", "max", "min", "batches over 2% slower")
    return table(head, rows)


def held_out(model: str, dtype: str, kernels: tuple[str, ...], stages: tuple[str, ...] = ()) -> tuple[Replay, IntArray]:
    """The batches to judge, and the candidates `[batches]` that dispatch fitted on the others chooses for them."""
    _, test = split(model, dtype, kernels, stages)
    return test, fitted(model, dtype, kernels, stages=stages).cost(test.histograms).argmin(1)


def layouts() -> str:
    """Time of fp8 dispatch over the kernels that one copy of the weights serves, over that of all three kernels."""
    rows = []
    sets = (("alpha_moe", "triton"), ("deep_gemm", "triton"), ("alpha_moe", "deep_gemm", "triton"))
    for model in MODELS:
        test, chosen = held_out(model, "fp8", sets[-1])
        index = np.arange(len(chosen))
        all_us = test.times_us[index, chosen]
        kernels = np.array([c.kernel for c in test.candidates])
        shares = [f"{k} {percent(float((kernels[chosen] == k).mean()))}" for k in sets[-1]]
        cells = []
        for names in sets[:-1]:
            few, picked = held_out(model, "fp8", names)
            assert few.labels == test.labels
            r = Ratios.of(few.times_us[index, picked] / all_us)
            cells.append(f"{r.geomean:.3f} ({r.min:.2f} to {r.max:.2f})")
        rows.append((model, *cells, ", ".join(shares)))
    head = ("model", "one copy, interleaved: alpha_moe + triton", "one copy, gate first: deep_gemm + triton",
            "chosen by dispatch over all three, in two copies")  # fmt: skip
    return table(head, rows)


def deep_gemm() -> str:
    """Time of DeepGEMM with its own choice of tiles over that of dispatch over all kernels, with the kernel chosen."""
    rows: list[tuple[object, ...]] = []
    for dtype, kernels in (("fp8", ("alpha_moe", "deep_gemm", "triton")), ("bf16", ("deep_gemm", "triton"))):
        for model in MODELS:
            test, chosen = held_out(model, dtype, kernels)
            index = {c.name: i for i, c in enumerate(test.candidates)}
            kernel = registry.kernel("deep_gemm")
            assert isinstance(kernel, LaunchableKernel)
            cells: dict[int, dict[str, str]] = {}
            ratios = []
            for i, (tokens, routing) in enumerate(test.labels):
                if tokens <= DECODE:
                    alone = index[f"deep_gemm/{kernel.default_config(test.shape, h200, tokens).name}"]
                    ratio = test.times_us[i, alone] / test.times_us[i, chosen[i]]
                    ratios.append(ratio)
                    cell = f"{ratio:.2f}x {test.candidates[chosen[i]].kernel}"
                    cells.setdefault(tokens, {})[routing] = cell
            rows += [(model, dtype, t, *(cells[t].get(r, "") for r in JUDGED)) for t in sorted(cells)]
            all_of = Ratios.of(np.array(ratios))
            mean = f"**{all_of.geomean:.2f}x** ({all_of.min:.2f} to {all_of.max:.2f})"
            rows.append((model, dtype, f"all {len(ratios)} batches", mean, "", "", ""))
    return table(("model", "dtype", "tokens", *JUDGED), rows)


def live() -> str:
    """Speed-ups that `ramp-moe compare --live` measured, from the files beside this."""
    rows = []
    for file in sorted(HERE.glob("live_*.json")):
        found = json.loads(file.read_text())
        kinds: dict[str, list[float]] = {}
        for b in found["batches"]:
            kinds.setdefault(b["routing"], []).append(b["speedup"])
            kinds.setdefault("all", []).append(b["speedup"])
        for kind, values in kinds.items():
            r = Ratios.of(np.array(values))
            name = f"{found['model']} {' + '.join(found['kernels'])}"
            rows.append((name, kind, len(values), f"{r.geomean:.3f}x", f"{r.max:.3f}x", f"{r.min:.3f}x"))
    return table(("profile", "routing", "batches", "histogram over static, geometric mean", "max", "min"), rows)


def curve() -> str:
    """Mean regret on the test batches, by the number of tune batches that the fit and the static table saw. Dispatch is
    over all kernels of a dtype. Tune batches are taken in the order in which they were measured."""
    rows = []
    for dtype, kernels, model in CASES:
        if len(kernels) != {"fp8": 3, "bf16": 2}[dtype]:
            continue
        tune, test = split(model, dtype, kernels)
        for count in (*(n for n in CURVE if n < len(tune.labels)), len(tune.labels)):
            chosen = tune.fit(np.arange(count)).cost(test.histograms).argmin(1)
            values = [percent(regret(test.times_us, chosen).mean())]
            try:
                static = table_choices(static_table(tune.times_us[:count], tune.labels[:count]), test.labels)
                values.append(percent(regret(test.times_us, static).mean()))
            except ProfileError:
                values.append("")
            rows.append((model, f"{' + '.join(kernels)} {dtype}", count, *values))
    return table(("model", "kernels", "tune batches", "regret: histogram", "static"), rows)


def exhaustive() -> str:
    """Regret of the shipped profiles against exhaustive ones, from exhaustive.json."""
    rows = []
    for found in json.loads((HERE / "exhaustive.json").read_text()):
        batches, configurations, seconds, lost = (found[k] for k in ("batches", "configurations", "seconds", "regret"))
        short = found["regret by batches of the profile"]
        rows.append(
            (
                found["model"],
                f"{' + '.join(found['kernels'])} {found['dtype']}",
                f"{configurations['all']} on {batches['to fit']} + {batches['to judge']}, {sum(seconds['all']):.0f} s",
                f"{configurations['kept']} on {batches['profile']}",
                percent(lost["all"]),
                percent(lost["profile"]),
                *(percent(short[n]) for n in ("8", "16", "32")),
                f"{found['best kept over best']:.2%}",
            )
        )
    head = ("model", "kernels", "exhaustive: configurations on batches", "profile", "regret: exhaustive", "profile",
            "its first 8 batches", "16", "32", "lost by pruning")  # fmt: skip
    return table(head, rows)


def noise_of_choosing() -> str:
    """Regret of choosing by one run and judging by another, over all batches that two runs measured."""
    rows = []
    for dtype, kernels, model in CASES:
        twice, runs_us = replay(model, dtype, kernels).repeated()
        if len(twice):
            lost = selection_noise(runs_us).ravel()
            rows.append((model, f"{' + '.join(kernels)} {dtype}", len(twice), f"{lost.mean():.2%}",
                         f"{np.quantile(lost, 0.95):.2%}"))  # fmt: skip
    return table(("model", "kernels", "batches", "mean", "p95"), rows)


PAGE = (profiles, repeatability, noise_of_choosing, dispatch, layouts, alpha_moe, deep_gemm, live, curve, exhaustive)
TABLES = {f.__name__: f for f in PAGE}
HEAVY = ("curve",)
"""Tables that need dozens of fits."""
