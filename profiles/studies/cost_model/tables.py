"""Computes the tables on the cost model in the README beside this, from sweeps in the repository.

`python profiles/pages.py --write cost_model` fills the page and draws the plots. It takes a minute or two, without a
GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from pages import table
from ramp_moe import ProfileStore
from ramp_moe.cost_model.model import FORMS, CostModel, join
from ramp_moe.cost_model.transfer import transfer
from ramp_moe.evaluation.regret import (
    cross_validated_choices,
    pooled_regret,
    regret,
    single_choice,
    split_half_regret,
    static_table,
    table_choices,
)
from ramp_moe.evaluation.replay import Replay, load_replay
from ramp_moe.spec.kernel import usable_configs
from studies.shipped import MODELS, fitted, h200, registry, split, store

HERE = Path(__file__).parent
KERNELS = (
    ("fp8", ("alpha_moe",)),
    ("fp8", ("cute",)),
    ("fp8", ("deep_gemm",)),
    ("fp8", ("triton",)),
    ("fp8", ("alpha_moe", "triton")),
    ("fp8", ("alpha_moe", "deep_gemm", "triton")),
    ("fp8", ("alpha_moe", "cute", "deep_gemm", "triton")),
    ("bf16", ("triton",)),
)
UNSEEN = (
    ("fp8", ("alpha_moe",)),
    ("fp8", ("cute",)),
    ("fp8", ("deep_gemm",)),
    ("fp8", ("triton",)),
    ("fp8", ("alpha_moe", "cute", "deep_gemm", "triton")),
    ("bf16", ("cute",)),
    ("bf16", ("deep_gemm",)),
    ("bf16", ("flashinfer_cutlass",)),
    ("bf16", ("triton",)),
    ("bf16", ("cute", "deep_gemm", "flashinfer_cutlass", "triton")),
)
"""Kernels, alone and together, for which a shape without a profile is predicted."""
FIRST_SWEEPS = Path(__file__).parents[2] / "archive" / "h200" / "alpha_moe"
TREES = {
    "olmoe-1b-7b": (0.0125, 0.067),
    "qwen3-30b-a3b": (0.017, 0.079),
    "deepseek-v3-tp8": (0.023, 0.126),
    "mixtral-8x7b-tp4": (0.011, 0.046),
}
"""Mean and p95 of the regret of a tree ensemble on the first sweeps. Its features are configuration, CTAs, M-tiles,
active experts, tokens and the largest expert. It stands for a model that knows nothing about the kernel."""
DEALS = 5
COUNTS = (8, 12, 16, 24, 32, 48)
"""Numbers of batches at which the learning curve is shown."""


def percent(value: float) -> str:
    return f"{value:.2%}"


@cache
def first_sweep(model: str) -> Replay:
    """The first sweep of a model: Alpha-MoE's launch alone, 152 configurations on 78 batches."""
    shape = registry.shape(model, "fp8")
    (file,) = FIRST_SWEEPS.glob(f"{shape.slug}.2026-11-20.json")
    return load_replay(registry, ProfileStore([file]), shape, h200, ["alpha_moe"])


def cases() -> Iterator[tuple[str, str, tuple[str, ...], Replay, Replay]]:
    """(model, dtype, kernels, batches to fit on, batches to judge) of the shipped profiles."""
    for dtype, kernels in KERNELS:
        for model in MODELS:
            yield model, dtype, kernels, *split(model, dtype, kernels)


def cross_validated(model: str, form: str, deals: int = DEALS) -> np.ndarray:
    """Regret `[deals * batches]` on the first sweep, by five-fold cross-validation. Folds are dealt `deals` ways."""
    replay = first_sweep(model)
    choices = [
        cross_validated_choices(replay.histograms, lambda rows: replay.fit(rows, form), seed=seed)
        for seed in range(deals)
    ]
    return pooled_regret(replay.times_us, choices)


def held_out(model: str, dtype: str, kernels: tuple[str, ...], form: str) -> tuple[np.ndarray, float]:
    """Regret `[batches]` on the batches to judge, and its mean against the split-half best: the best candidate of one
    run, judged by another. The mean is NaN if there is one run."""
    _, test = split(model, dtype, kernels)
    choices = fitted(model, dtype, kernels, form).cost(test.histograms).argmin(1)
    rows, runs = test.repeated()
    against = split_half_regret(runs, choices[rows])
    known = against[np.isfinite(against)]
    return regret(test.times_us, choices), float(known.mean()) if len(known) else np.nan


@cache
def guess(model: str, dtype: str, kernel: str) -> CostModel:
    """The cost model of a kernel, predicted from the profiles of the other models."""
    shape = registry.shape(model, dtype)
    others = store.of_other_shapes(kernel, shape, h200)
    configs_of = partial(usable_configs, registry.kernel(kernel), hardware=h200)
    return transfer([s for s in others if s.shape.label in MODELS], configs_of, shape, h200)


def transferred(model: str, dtype: str, kernels: Sequence[str], test: Replay) -> tuple[np.ndarray, int, float]:
    """Choices by the other models' profiles, among the configurations that the model's own profile has timed. Returns
    their regret `[batches]`, the number of these configurations, and the share of batches that are judged. A batch is
    judged if the choice among all configurations was timed."""
    guessed = join([guess(model, dtype, k) for k in kernels])
    us = dict(zip([c.name for c in guessed.candidates], guessed.cost(test.histograms).T, strict=True))
    never = np.full(len(test.labels), np.inf)
    timed = np.stack([us.get(c.name, never) for c in test.candidates], 1)
    # Equal predictions count as one choice, although rounding may tell them apart.
    judged = timed.min(1) <= np.stack(list(us.values())).min(0) * (1 + 1e-9)
    return regret(test.times_us, timed.argmin(1)), int(np.isfinite(timed).any(0).sum()), float(judged.mean())


def forms() -> str:
    """Cross-validated regret of every form on the first sweeps."""
    rows = []
    for model in MODELS:
        replay = first_sweep(model)
        static = regret(replay.times_us, table_choices(static_table(replay.times_us, replay.labels), replay.labels))
        for form in FORMS:
            lost = cross_validated(model, form)
            rows.append((model, form, percent(lost.mean()), percent(np.quantile(lost, 0.95)), percent(lost.max())))
        rows.append((model, "tree ensemble", *map(percent, TREES[model]), ""))
        rows.append((model, "static", *(percent(x) for x in (static.mean(), np.quantile(static, 0.95), static.max()))))
    return table(("model", "form", "mean", "p95", "max"), rows)


def profiles() -> str:
    """Regret of the forms on the held-out batches of the shipped profiles."""
    rows = []
    for model, dtype, kernels, _, _ in cases():
        cells = [model, f"{' + '.join(kernels)} {dtype}"]
        for form in ("paper", "active", "smooth"):
            lost, against = held_out(model, dtype, kernels, form)
            twice = "-" if np.isnan(against) else percent(against)
            cells += [f"{percent(lost.mean())} / {twice} / {lost.max():.1%}"]
        rows.append(cells)
    return table(("model", "kernels", *(f"{f}: mean / split-half / max" for f in ("paper", "active", "smooth"))), rows)


def regions() -> str:
    """Regret and error of the default form by region, over the held-out batches of all single kernels."""
    records = []
    for model, dtype, kernels, _, test in cases():
        if len(kernels) > 1:
            continue
        cost = fitted(model, dtype, kernels, "smooth").cost(test.histograms)
        best = test.times_us.argmin(1)
        lost, rows = regret(test.times_us, cost.argmin(1)), np.arange(len(best))
        error = np.abs(np.log(cost[rows, best] / test.times_us[rows, best]))
        active = (test.histograms > 0).mean(1)
        grid = [test.candidates[b].config.gemms[0] for b in best]
        waves = [int(g.waves(h, h200.num_sms)) for g, h in zip(grid, test.histograms, strict=True)]
        tokens = [t for t, _ in test.labels]
        records += list(zip(tokens, active, waves, lost, error, strict=True))
    found = np.array(records)
    rows = []
    for name, column, edges in (
        ("tokens", 0, (1, 16, 128, 1024, np.inf)),
        ("share of experts active", 1, (0, 0.25, 0.75, 1, np.inf)),
        ("waves of the best candidate", 2, (1, 2, 4, 16, np.inf)),
    ):
        for low, high in itertools.pairwise(edges):
            some = found[(found[:, column] >= low) & (found[:, column] < high)]
            if len(some):
                where = f"{low:g}" if high == np.inf and column == 1 else f"{low:g} to {high:g}"
                lost, error = some[:, 3], some[:, 4]
                rows.append(
                    (name, where, len(some), percent(lost.mean()), percent(lost.max()), percent(np.median(error)))
                )
    head = ("by", "from, to below", "batches", "mean regret", "max", "median error of the best candidate's time")
    return table(head, rows)


def orders(tune: Replay) -> dict[str, list[np.ndarray]]:
    """Orders in which to measure the batches, by name. An order is one or several permutations of the rows."""
    n = len(tune.labels)
    uniform = [i for i, (_, kind) in enumerate(tune.labels) if kind == "uniform"]
    by_size = sorted(range(n), key=lambda i: tune.labels[i][0])
    return {
        "as measured": [np.arange(n)],
        "at random": [np.random.default_rng(seed).permutation(n) for seed in range(DEALS)],
        "uniform first": [np.array(uniform + [i for i in range(n) if i not in uniform])],
        "small batches first": [np.array(by_size)],
    }


@cache
def curve() -> dict[str, dict[int, float]]:
    """Mean held-out regret over all shipped cases of single kernels, by order and number of batches."""
    found: dict[str, dict[int, list[float]]] = {}
    for _, _, kernels, tune, test in cases():
        if len(kernels) > 1:
            continue
        for name, ways in orders(tune).items():
            for count in COUNTS:
                lost = [
                    regret(test.times_us, tune.fit(np.sort(way[:count])).cost(test.histograms).argmin(1)).mean()
                    for way in ways
                ]
                found.setdefault(name, {}).setdefault(count, []).append(float(np.mean(lost)))
    return {name: {n: float(np.mean(v)) for n, v in by_count.items()} for name, by_count in found.items()}


def design() -> str:
    """The learning curve: regret by the number of batches measured, and by their order."""
    shares = []
    for _, _, kernels, tune, test in cases():
        if len(kernels) == 1:
            run = tune.recordings[0].sweep.record.runs[-1]
            shares.append((run.seconds or 0) / (len(tune.labels) + len(test.labels)))
    rows = [
        (f"{n}, about {n * np.mean(shares):.0f} s", *(percent(by_count[n]) for by_count in curve().values()))
        for n in COUNTS
    ]
    return table(("batches", *curve()), rows)


def shapes() -> str:
    """Regret on a shape that is predicted from the other shapes."""
    rows = []
    for (dtype, kernels), model in itertools.product(UNSEEN, MODELS):
        tune, test = split(model, dtype, kernels)
        lost, known, judged = transferred(model, dtype, kernels, test)
        own, _ = held_out(model, dtype, kernels, "smooth")
        static = regret(test.times_us, table_choices(static_table(tune.times_us, tune.labels), test.labels))
        single = regret(test.times_us, np.full(len(test.labels), single_choice(tune.times_us)))
        cells = (percent(lost.mean()), percent(np.quantile(lost, 0.95)), f"{lost.max():.1%}")
        measured = (percent(x.mean()) for x in (own, static, single))
        which = f"{' + '.join(kernels)} {dtype}"
        rows.append((model, which, f"{known} of {len(test.candidates)}", f"{judged:.0%}", *cells, *measured))
    head = ("model", "kernels", "configurations known", "choices timed", "transferred: mean", "p95", "max",
            "own profile", "static, tuned on its own profile", "its own best single configuration")  # fmt: skip
    return table(head, rows)


PAGE: tuple[Callable[[], str], ...] = (forms, profiles, regions, design, shapes)
TABLES = {f.__name__: f for f in PAGE}
HEAVY = ("forms", "design")


def draw() -> None:
    """Draw forms.png, the distribution of regret by form on the first sweeps, and design.png, the learning curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(12, 3), sharey=True, layout="constrained")
    for model, axis in zip(MODELS, axes, strict=True):
        for form in FORMS:
            lost = np.sort(cross_validated(model, form, 1))
            axis.plot(100 * lost, np.linspace(0, 1, len(lost)), label=form)
        axis.set(title=model, xlabel="regret, %", xlim=(0, 15), ylim=(0.4, 1))
    axes[0].set_ylabel("share of batches")
    axes[-1].legend()
    figure.savefig(HERE / "forms.png", dpi=70)
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, by_count in curve().items():
        axis.plot(list(by_count), [100 * v for v in by_count.values()], marker="o", label=name)
    axis.set(xlabel="batches measured", ylabel="mean held-out regret, %", yscale="log")
    axis.legend()
    figure.savefig(HERE / "design.png", dpi=70)
