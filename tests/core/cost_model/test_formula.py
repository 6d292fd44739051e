"""Four evaluators of one formula: numpy, the table, Triton and CUDA give the same golden numbers and choices.

`slow` computes what `ramp_moe.cost_model.formula` says, step by step and in exact fractions as far as they go, and
shares no code with the four. Its numbers are stored in DATA; `python tests/core/cost_model/test_formula.py` writes
them again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ramp_moe import FORMS, Candidate, CostModel, GridGeometry, Hardware, KernelConfig, MoEShape, Stage
from ramp_moe.cost_model import formula
from ramp_moe.cost_model.model import IDS, Part, PartFit
from ramp_moe.cost_model.residual import SCALES, Residual
from ramp_moe.measurements.sweep import PATH, path_key

ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests" / "data" / "formula.json"
SMS, EXPERTS = 8, 6
FLOAT32, DEVICE = 1e-5, 1e-3
"""Relative tolerances that the formula's page states."""
MARGIN = 0.01
"""Between the best candidate and the next, unless they are equal: far above any tolerance."""

HISTOGRAMS = (
    (0, 0, 0, 0, 0, 0),
    (0, 1, 0, 0, 0, 0),
    (16, 32, 0, 64, 16, 0),  # whole blocks
    (17, 33, 1, 65, 17, 0),  # one more each
    (0, 0, 300, 0, 0, 0),
    (20, 20, 20, 20, 20, 20),
    (3, 1, 4, 1, 5, 9),
    (1000, 500, 3, 0, 0, 70),
    (128, 128, 0, 0, 0, 0),  # whole waves of a/plain
    (2000, 2000, 2000, 2000, 2000, 2000),
)


class Grid(NamedTuple):
    """One grid, in the words of the formula's page."""

    block: int
    tile_rows: int
    rows: int
    reduction: int
    split: int = 1
    cluster: int = 1
    persistent: int | None = None
    resident: int = 1

    def geometry(self, resident: int) -> GridGeometry:
        return GridGeometry(
            block_m=self.block, block_n=self.tile_rows, block_k=32, n=self.rows,
            k=self.reduction, expert_bytes=1, split_k=self.split, persistent_ctas=self.persistent,
            ctas_per_sm=resident, cluster_m=self.cluster,
        )  # fmt: skip


@dataclass(frozen=True)
class APart:
    """A fitted part: coefficients by term, and the ranges of its fitted rows."""

    grids: tuple[Grid, ...]
    us: dict[str, float]
    floor: float = 0.5
    ctas: tuple[float, float] = (0, 1e9)
    active: tuple[int, int] = (0, EXPERTS)


@dataclass(frozen=True)
class Corrected:
    """A candidate's correction: which of RESIDUALS, its block, the constant and a weight per fitted batch."""

    residual: int
    block: int
    constant: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class One:
    """A candidate; `parts` by the names of the stages that they are."""

    kernel: str
    name: str
    parts: dict[str, APart]
    corrected: Corrected | None = None


@dataclass(frozen=True)
class Case:
    form: str
    stages: tuple[str, ...]
    candidates: tuple[One, ...]


@dataclass(frozen=True)
class Fitted:
    """Fitted batches of a residual: routed ids, active experts and, by block, M-tiles."""

    ids: tuple[int, ...]
    active: tuple[int, ...]
    tiles: dict[int, tuple[int, ...]]


RESIDUALS = (
    Fitted((1, 20, 120, 900, 4000), (1, 5, 6, 3, 6), {16: (1, 6, 12, 60, 255), 64: (1, 5, 6, 17, 66)}),
    Fitted((6, 240, 5000), (4, 6, 6), {32: (4, 12, 160)}),
)

PLAIN = (Grid(16, 64, 256, 256), Grid(16, 64, 128, 128))
CLUSTERED = (Grid(64, 128, 256, 256, cluster=4, resident=2), Grid(64, 32, 128, 128, cluster=2))
PERSISTENT = (Grid(32, 64, 256, 256, persistent=6), Grid(32, 64, 128, 128, split=4, persistent=100))
SPLIT = (Grid(16, 32, 240, 256, split=2),)


def smooth(one: float, wave: float, cta: float, active: float) -> dict[str, float]:
    return {"one": one, "ceil_waves": wave, "ctas": cta, "active": active}


TWIN = APart((Grid(128, 128, 256, 256),), smooth(5, 1.25, 0.002, 0.1))
_PATHS = (
    ("a", "plain", APart(PLAIN, smooth(3, 0.5, 0.01, 0.4), 4.5, (10, 500), (1, 5)), smooth(0.5, 0, 0.001, 0.1)),
    ("a", "clustered", APart(CLUSTERED, smooth(4, 1, 0.02, 0.25), 4, (0, 40)), smooth(0.25, 0, 0.001, 0.1)),
    ("a", "known_not", APart(SPLIT, smooth(1, 0.05, 0, 0)), smooth(0.1, 0, 0, 0)),
    ("b", "gridless", APart((), smooth(2, 0, 0.0625, 0), 3), smooth(0.25, 0, 0.03125, 0.1)),
    ("b", "twin_first", TWIN, smooth(0.25, 0, 0.0015, 0.1)),
    ("b", "twin_second", TWIN, smooth(0.25, 0, 0.0015, 0.1)),
    ("c", "persistent", APart(PERSISTENT, smooth(3, 0.25, 0.004, 0.5), 5, active=(2, 6)), smooth(0.5, 0, 0.002, 0)),
    ("c", "split", APart(SPLIT, smooth(2.5, 0.5, 0.01, 0.3)), smooth(0.5, 0, 0.002, 0)),
)
_CORRECTED = {
    "plain": Corrected(0, 16, 0.05, (0.02, -0.03, 0.04, -0.01, -0.02)),
    "clustered": Corrected(0, 64, -0.04, (-0.05, 0.02, 0.01, 0.03, -0.01)),
    "persistent": Corrected(1, 32, 0.1, (0.03, -0.05, 0.02)),
    "split": Corrected(1, 32, -0.02, (-0.01, 0.03, -0.02)),
}


def paths(form: str, ids: bool, corrected: bool) -> Case:
    """The paths, each with the part that goes with the routed ids or without."""
    terms = {"waves": "ceil_waves", "log_ctas": "active"}  # what takes over the others' coefficients

    def of_form(part: APart) -> APart:
        us = {t: part.us[terms.get(t, t)] for t in FORMS[form].terms}
        return APart(part.grids, us, part.floor, part.ctas, part.active)

    candidates = []
    for kernel, name, path, of_ids in _PATHS:
        parts = {PATH: of_form(path)} | ({IDS: of_form(APart((), of_ids, 0.25))} if ids else {})
        candidates.append(One(kernel, name, parts, _CORRECTED.get(name) if corrected else None))
    return Case(form, (PATH, IDS) if ids else (PATH,), tuple(candidates))


def paper(one: float, wave: float, cta: float, log_cta: float) -> dict[str, float]:
    return {"one": one, "waves": wave, "ctas": cta, "log_ctas": log_cta}


SHARED = APart((), paper(1, 0, 0.001, 0.5), 1.5)
STAGES = Case("paper", ("gemm", "schedule", "combine"), (
    One("s", "small", {
        "schedule": SHARED,
        "up": APart(PLAIN[:1], paper(2, 1.5, 0.01, -0.25), 1.75, (4, 300)),
        "down": APart(PLAIN[1:], paper(1, 0.75, 0.02, 0.125)),
        "combine": APart((), paper(1, 0, 0.004, 0.25)),
    }),
    One("s", "large", {
        "schedule": SHARED,
        "up": APart(CLUSTERED[:1], paper(4, 2, 0.0625, 0.25)),
        "down": APart(CLUSTERED[1:], paper(2, 1, 0.03125, 0.25), 3, active=(1, 4)),
    }),
    One("s", "fused", {"fused": APart(PERSISTENT[:1], paper(4, 1, 0.02, 0.5))}),
))  # fmt: skip

CASES = {
    "stages": STAGES,
    "paths": paths("ceil", ids=False, corrected=False),
    "paths_ids": paths("active", ids=True, corrected=False),
    "paths_corrected": paths("smooth", ids=False, corrected=True),
    "paths_ids_corrected": paths("smooth", ids=True, corrected=True),
}


# --- The formula, slowly ---------------------------------------------------------------------------------------------


def count(histogram: tuple[int, ...], block: int) -> int:
    """Step 1."""
    return sum(math.ceil(Fraction(h, block)) for h in histogram)


def slow_part(part: APart, histogram: tuple[int, ...]) -> tuple[float, float, bool]:
    """Steps 2 to 4, and of step 9: (microseconds, CTAs weighted by work, whether they are outside)."""
    active = sum(1 for h in histogram if h)
    waves, ceil_waves, all_ctas = Fraction(0), Fraction(0), Fraction(0)
    if part.grids:
        first = Fraction(part.grids[0].tile_rows * part.grids[0].reduction, part.grids[0].split)
        for g in part.grids:
            per_tile = math.ceil(Fraction(g.rows, g.tile_rows)) * g.split
            ctas = math.ceil(Fraction(count(histogram, g.block), g.cluster)) * g.cluster * per_tile
            slots = SMS * g.resident
            if g.persistent is not None:
                slots = min(slots, g.persistent)
            work = Fraction(g.tile_rows * g.reduction, g.split) / first
            waves += work * Fraction(ctas, slots)
            ceil_waves += work * math.ceil(Fraction(ctas, slots))
            all_ctas += work * ctas
    else:
        all_ctas = Fraction(sum(histogram))
    terms = {"one": 1.0, "waves": float(waves), "ceil_waves": float(ceil_waves), "ctas": float(all_ctas),
             "log_ctas": math.log(1 + all_ctas), "active": float(active)}  # fmt: skip
    us = max(part.floor, math.fsum(c * terms[term] for term, c in part.us.items()))
    inside = part.ctas[0] <= all_ctas <= part.ctas[1] and part.active[0] <= active <= part.active[1]
    return us, float(all_ctas), not inside


def slow_factor(corrected: Corrected, histogram: tuple[int, ...]) -> float:
    """Step 6."""
    fitted = RESIDUALS[corrected.residual]
    batch = (sum(histogram), sum(1 for h in histogram if h), count(histogram, corrected.block))
    square = [0.0] * len(fitted.ids)
    for n, points, scale in zip(batch, (fitted.ids, fitted.active, fitted.tiles[corrected.block]), SCALES, strict=True):
        logs = [math.log(p) for p in points]
        mean = math.fsum(logs) / len(logs)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / len(logs))
        unit = scale / max(deviation, 1e-9)
        square = [s + ((math.log(max(n, 1)) - x) * unit) ** 2 for s, x in zip(square, logs, strict=True)]
    return math.exp(
        corrected.constant + math.fsum(w * math.sqrt(s) for w, s in zip(corrected.weights, square, strict=True))
    )


def contenders(case: Case) -> list[int]:
    """Of step 7."""
    known = {c.kernel for c in case.candidates if c.corrected}
    return [i for i, c in enumerate(case.candidates) if c.corrected or c.kernel not in known]


def slow(case: Case, histogram: tuple[int, ...]) -> dict[str, Any]:
    """All steps: microseconds and extrapolation of each candidate, and the choice."""
    us, outside = [], []
    for candidate in case.candidates:
        parts = [slow_part(part, histogram) for part in candidate.parts.values()]
        factor = slow_factor(candidate.corrected, histogram) if candidate.corrected else 1.0
        us.append(math.fsum(p[0] for p in parts) * factor)
        outside.append(any(p[2] for p in parts))
    able = contenders(case)
    choice = min(able, key=lambda i: (us[i], i))
    us = [t if i in able else max(t, us[choice]) for i, t in enumerate(us)]
    return {"histogram": list(histogram), "us": us, "extrapolated": outside, "choice": choice}


def write_golden() -> None:
    """Store the numbers, one batch a line."""
    lines = []
    for name, case in CASES.items():
        batches = []
        for histogram in HISTOGRAMS:
            found = slow(case, histogram)
            batches.append(json.dumps(found | {"us": [float(f"{t:.12g}") for t in found["us"]]}))
        lines.append(f'"{name}": [\n' + ",\n".join(batches) + "\n]")
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# --- The four evaluators ---------------------------------------------------------------------------------------------


def model_of(case: Case) -> CostModel:
    """The case as the library has it. Kernels describe one CTA per SM; the fits know better."""
    # Memory so fast that the floor of step 10, which is numpy's alone, never shows.
    hardware = Hardware("h", ("h",), "sm_90", SMS, 1, 1, 1e18, 1.0, 1.0, "none")
    candidates, fits = [], {}
    terms = FORMS[case.form].terms
    for one in case.candidates:
        key = path_key(one.kernel, one.name)
        stages = []
        for name, part in one.parts.items():
            described = [g.geometry(resident=1) for g in part.grids]
            fitted = tuple(g.geometry(g.resident) for g in part.grids)
            if PATH not in case.stages:
                kind = name if name in ("schedule", "combine") else "gemm"
                part_key = name if name == "schedule" else f"{one.name}/{name}"
                stages.append(Stage(kind, part_key, *described))  # type: ignore[arg-type]
            else:
                part_key = key if name == PATH else f"{key}/{name}"
                stages += [Stage("gemm", f"{part_key}/{i}", g) for i, g in enumerate(described)]
            us = tuple(part.us[t] for t in terms)
            fits[part_key] = PartFit(Part(part_key, fitted), us, 9, 0.0, 0.0, part.ctas, part.active, part.floor)
        candidates.append(Candidate(one.kernel, KernelConfig(one.name, tuple(stages))))
    residuals = [
        Residual(np.array(fitted.ids), np.array(fitted.active), {b: np.array(t) for b, t in fitted.tiles.items()}, {
            f"{one.kernel}/{one.name}": (one.corrected.block, one.corrected.constant, np.array(one.corrected.weights))
            for one in case.candidates if one.corrected and one.corrected.residual == i
        })
        for i, fitted in enumerate(RESIDUALS) if any(one.corrected for one in case.candidates)
    ]  # fmt: skip
    shape = MoEShape(EXPERTS, 1, 256, 128, "bf16")
    return CostModel(shape, hardware, case.form, candidates, fits, case.stages, [], None, residuals)


def golden(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DATA.read_text())[name]
    return found


def check_contenders(name: str, costs: Callable[[tuple[int, ...]], tuple[Any, int | None]], tolerance: float) -> None:
    """What an evaluator of the table costs and chooses, for all batches. `costs` gives both of a histogram, the choice
    as an index of the table, or None: then the first of the least is taken."""
    able = contenders(CASES[name])
    for batch in golden(name):
        us, choice = costs(tuple(batch["histogram"]))
        assert us == pytest.approx([batch["us"][i] for i in able], rel=tolerance), batch["histogram"]
        assert able[int(np.argmin(us)) if choice is None else choice] == batch["choice"], batch["histogram"]


@pytest.mark.parametrize("name", CASES)
def test_golden_numbers_are_the_formula(name: str) -> None:
    assert [tuple(batch["histogram"]) for batch in golden(name)] == list(HISTOGRAMS)
    able = contenders(CASES[name])
    for batch in golden(name):
        found = slow(CASES[name], tuple(batch["histogram"]))
        assert batch["us"] == pytest.approx(found["us"], rel=1e-9)
        assert (batch["choice"], batch["extrapolated"]) == (found["choice"], found["extrapolated"])
        least = batch["us"][batch["choice"]]
        near = [i for i in able if least < batch["us"][i] < least * (1 + MARGIN)]
        assert not near, f"{name}, {batch['histogram']}: tolerances must not decide; change a coefficient"


@pytest.mark.parametrize("name", CASES)
def test_numpy(name: str) -> None:
    model, batches = model_of(CASES[name]), golden(name)
    assert model.contenders.tolist() == contenders(CASES[name])
    histograms = np.array([batch["histogram"] for batch in batches])
    predicted = model.predict(histograms)
    assert predicted.us == pytest.approx(np.array([batch["us"] for batch in batches]), rel=FLOAT32)
    assert predicted.extrapolated.tolist() == [batch["extrapolated"] for batch in batches]
    assert model.cost(histograms).argmin(-1).tolist() == [batch["choice"] for batch in batches]
    for histogram, batch in zip(histograms, batches, strict=True):
        choice, us, extrapolated = model.choose(histogram)
        assert (choice, extrapolated) == (batch["choice"], batch["extrapolated"][choice])
        assert us == pytest.approx(batch["us"][choice], rel=FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_table(name: str) -> None:
    pytest.importorskip("torch")
    from ramp_moe.runtime.graphs.cost_table import CostTable
    from select_cases import by_hand

    table = CostTable.of(model_of(CASES[name]), contenders(CASES[name]))
    check_contenders(name, lambda histogram: (by_hand(table, np.array(histogram)), None), FLOAT32)


def routed(histogram: tuple[int, ...], device: str) -> Any:
    """topk_ids int32 `[T, 1]` with this histogram; one token without an expert if it is empty."""
    import torch

    ids = np.repeat(np.arange(EXPERTS), histogram) if sum(histogram) else np.array([-1])
    return torch.from_numpy(np.random.default_rng(0).permutation(ids)).int()[:, None].to(device)


@pytest.mark.parametrize("name", CASES)
def test_triton(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from ramp_moe.runtime.graphs.cost_table import CostTable
    from ramp_moe.runtime.graphs.selector_triton import TritonSelector

    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = CostTable.of(model_of(CASES[name]), contenders(CASES[name]))
    selector = TritonSelector(table, EXPERTS, device)
    cost = torch.empty(table.num_candidates, dtype=torch.float32, device=device)

    def costs(histogram: tuple[int, ...]) -> tuple[Any, int]:
        selector.launch(routed(histogram, device), cost_us=cost)
        return cost.cpu().numpy(), int(selector.choice.item())

    check_contenders(name, costs, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str) -> None:
    import torch
    from ramp_moe.runtime.graphs import nvrtc
    from ramp_moe.runtime.graphs.cost_table import CostTable
    from ramp_moe.runtime.graphs.selector_cuda import CudaSelector

    if reason := nvrtc.unavailable():
        pytest.skip(reason)
    table = CostTable.of(model_of(CASES[name]), contenders(CASES[name]))
    selector = CudaSelector(table, EXPERTS, torch.device("cuda"), with_cost=True)

    def costs(histogram: tuple[int, ...]) -> tuple[Any, int]:
        selector.launch(routed(histogram, "cuda"))
        assert selector.cost is not None
        return selector.cost.cpu().numpy(), int(selector.choice.item())

    check_contenders(name, costs, DEVICE)


# --- That nothing of the formula is missed ---------------------------------------------------------------------------


def test_cases_reach_every_part_of_the_formula() -> None:
    candidates = [one for case in CASES.values() for one in case.candidates]
    parts = [part for one in candidates for part in one.parts.values()]
    grids = [g for part in parts for g in part.grids]
    assert {case.form for case in CASES.values()} == set(FORMS), "a form that no case has"
    assert {term for part in parts for term, c in part.us.items() if c} == set(formula.TERMS)
    assert {term for form in FORMS.values() for term in form.terms} == set(formula.TERMS)
    assert any(g.split > 1 for g in grids)
    assert any(g.cluster > 1 for g in grids)
    assert any(g.resident > 1 for g in grids)
    assert any(g.rows % g.tile_rows for g in grids)
    assert any(g.persistent is not None and g.persistent < SMS for g in grids)
    assert any(g.persistent is not None and g.persistent > SMS for g in grids)
    assert {min(len(part.grids), 2) for part in parts} == {0, 1, 2}
    assert {min(len(one.parts), 2) for one in candidates} == {1, 2}
    assert any(one.corrected for one in candidates)
    assert any(len(contenders(case)) < len(case.candidates) for case in CASES.values())
    batches = [batch | {"of": name} for name in CASES for batch in golden(name)]
    ties = [batch for batch in batches if batch["us"].count(batch["us"][batch["choice"]]) > 1]
    assert ties, "no batch has two best candidates"
    for flag in (True, False):
        assert any(batch["extrapolated"][batch["choice"]] is flag for batch in batches)
    for name, case in CASES.items():
        assert len({batch["choice"] for batch in golden(name)}) > 1, f"{name} always chooses the same"
        floors = [slow_part(p, h)[0] == p.floor for one in case.candidates for p in one.parts.values()
                  for h in HISTOGRAMS]  # fmt: skip
        assert any(floors), f"{name} never needs a floor"
        assert not all(floors)


def test_whoever_evaluates_a_term_names_the_formula() -> None:
    """A file that computes with the terms of step 3 is an evaluator; its page lists them all."""
    own = re.compile(r"\b(ceil_waves|log_ctas)\b")
    files = [f for f in (ROOT / "core").rglob("*") if f.suffix in (".py", ".cu", ".cuh", ".cpp")]
    evaluators = {f for f in files if own.search(f.read_text()) and f.name != "formula.py"}
    assert {f.name for f in evaluators} >= {"grids.py", "model.py", "select.cu"}
    for file in evaluators | {f for f in files if f.name in ("cost_table.py", "residual.py", "selector_triton.py")}:
        assert re.search(r"`(ramp_moe\.cost_model\.)?formula`|cost_model/formula\.py", file.read_text()), (
            f"{file.name} evaluates the cost model's formula without naming its page, ramp_moe.cost_model.formula"
        )


if __name__ == "__main__":
    write_golden()
