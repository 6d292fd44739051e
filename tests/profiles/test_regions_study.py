"""The study of the regions: what it measures, over a bench that makes up its times, and how it counts hits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from ramp_moe import Hardware, ProfileError, Registry
from ramp_moe.spec.kernel import usable_configs
from studies.regions import measure, tables

FOLDER = Path(tables.__file__).parent


class MadeUp:
    """A path takes 100 us, less what it gains by each thing that its name says; long ones are launched twice only."""

    def __init__(self, base: float = 100.0, **gains: float) -> None:
        self.base, self.gains, self.tokens, self.calls = base, gains, 0, 0

    def open(self, topk_ids: Any) -> None:
        self.tokens = len(topk_ids)

    def time(self, kernel: str, config: str, launches: int) -> list[float]:
        assert kernel == "triton"
        self.calls += 1
        up = config.split("-down")[0]
        us = self.base - sum(gain for what, gain in self.gains.items() if what in up)
        return [us] * (launches if us < 1000 else 2)


def record(registry: Registry, h200: Hardware, model: str, **gains: float) -> dict[str, Any]:
    shape = registry.shape(model, measure.DTYPE)
    cells = [measure.measure(MadeUp(**gains), shape, h200, *cell) for cell in measure.CELLS]
    about = {"device": "h200", "device_name": "NVIDIA H200", "gpu": "GPU-0", "kernel": "triton 1"}
    return {"model": model, "dtype": "fp8", **about, "measured": "2026-11-22T00:00:00+00:00", "cells": cells}


def test_every_model_can_be_measured(registry: Registry, h200: Hardware) -> None:
    assert len({registry.shape(m, measure.DTYPE) for m in measure.MODELS}) >= 11
    for model in measure.MODELS:
        shape = registry.shape(model, measure.DTYPE)
        names = {c.name for c in usable_configs(measure.StudiedTriton(), shape, h200)}
        found = measure.paths(shape, h200)
        assert {p.name for p in found} == names
        assert {p.up.block_m for p in found} == {16, 32, 64, 128}
        assert {p.up.split_k for p in found} == {1, 4}


def test_a_cell(registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    few = measure.measure(MadeUp(gm8=3.0), shape, h200, 8, "uniform")
    many = measure.measure(MadeUp(gm8=3.0), shape, h200, 512, "uniform")
    assert (few["tokens"], few["routing"]) == (8, "uniform")
    assert {p["split_k"] for p in few["paths"]} == {1, 4}
    assert {(p["split_k"], p["direct"], p["atomic"]) for p in many["paths"]} == {(1, False, False)}
    assert all(p["us"] == (97.0 if p["group_m"] == 8 else 100.0) for p in many["paths"])


def test_at_least_20_launches(registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    for base, calls in ((100.0, 4), (2000.0, 10)):
        bench = MadeUp(base)
        found = measure.measure(bench, shape, h200, 512, "uniform")
        assert bench.calls == calls * len(found["paths"])


def test_what_is_measured_is_kept(
    registry: Registry, h200: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose file is there is not measured again."""
    compiled: list[str] = []
    made: list[str] = []

    def make_bench(model: str, hardware: str) -> MadeUp:
        made.append(model)
        return MadeUp()

    for name, value in {
        "HERE": tmp_path,
        "detect": lambda: h200,
        "about": lambda hardware: {"device": hardware.name},
        "compile_all": lambda model, hardware: compiled.append(model),
        "make_bench": make_bench,
    }.items():
        monkeypatch.setattr(measure, name, value)
    measure.main(["olmoe-1b-7b"])
    measure.main(["olmoe-1b-7b", "mixtral-8x7b"])
    assert (compiled, made) == (["olmoe-1b-7b", "mixtral-8x7b"],) * 2
    found = json.loads((tmp_path / "olmoe-1b-7b.json").read_text())
    assert [(c["tokens"], c["routing"]) for c in found["cells"]] == list(measure.CELLS)
    measure.main(["olmoe-1b-7b"])
    assert len(made) == 2


def test_hits_and_misses(registry: Registry, h200: Hardware) -> None:
    """Where only GROUP_M pays, on every cell: the advice is right where it says so, and of the others where it does
    not."""
    found = list(tables.cases(record(registry, h200, "mixtral-8x7b", gm8=10.0), tables.advise))
    swizzle = [c for c in found if c.optimisation == "GROUP_M swizzle"]
    assert len(swizzle) == len(measure.CELLS)
    assert all(c.decided and c.gain == pytest.approx(100 / 90 - 1) for c in swizzle)
    assert [c.hit for c in swizzle] == [c.advised for c in swizzle]
    assert {c.advised for c in swizzle} == {False, True}
    # nothing else makes a difference, the rest being equal: split-K is not compared with paths that have GROUP_M
    assert not any(c.decided for c in found if c not in swizzle)
    assert {c.tokens for c in found if c.optimisation == "split-K"} == {1, 8, 64}


def test_what_costs_is_decided_too(registry: Registry, h200: Hardware) -> None:
    found = tables.cases(record(registry, h200, "olmoe-1b-7b", bm16=20.0), tables.advise)
    blocks = [c for c in found if c.optimisation == "large token block"]
    assert all(c.gain == pytest.approx(-0.2) and c.decided and c.hit == (not c.advised) for c in blocks)


def test_the_tables(registry: Registry, h200: Hardware, tmp_path: Path) -> None:
    tables.predict(tmp_path)
    assert tables.scores(tmp_path) == tables.misses(tmp_path) == tables.sources(tmp_path) == "Nothing is measured yet."
    for model in ("mixtral-8x7b", measure.HELD_OUT[0]):
        (tmp_path / f"{model}.json").write_text(json.dumps(record(registry, h200, model, gm8=10.0)))
    (first,) = tables.predictions(tmp_path)
    scores = tables.scores(tmp_path).splitlines()
    count = len(measure.CELLS)
    held_out = f"held out, predicted {first['made'][:16]}"
    for name, model in (("studied", "mixtral-8x7b"), (held_out, measure.HELD_OUT[0])):
        hits = sum(tables.advise(model, *cell)["GROUP_M swizzle"] for cell in measure.CELLS)
        assert 0 < hits < count
        assert f"| {name} | GROUP_M swizzle | {count} / 0 | 0 (0) | {hits} | {count - hits} | {count} |" in scores
        assert f"| {name} | all |  |  | {hits} | {count - hits} | {count} |" in scores
    assert "| studied | mixtral-8x7b | 1 | uniform | GROUP_M swizzle | does not | +11.1% |" in tables.misses(tmp_path)
    assert "| mixtral-8x7b | 2026-11-22T00:00 | NVIDIA H200 GPU-0 | triton 1 | 9 |" in tables.sources(tmp_path)


def test_what_is_said_where_nothing_is_decided(registry: Registry, h200: Hardware, tmp_path: Path) -> None:
    """All paths take as long: no hit and no miss, but it counts how often an optimisation is said to pay."""
    (tmp_path / "mixtral-8x7b.json").write_text(json.dumps(record(registry, h200, "mixtral-8x7b")))
    said = sum(tables.advise("mixtral-8x7b", *cell)["GROUP_M swizzle"] for cell in measure.CELLS)
    assert 0 < said < len(measure.CELLS)
    row = f"| studied | GROUP_M swizzle | 0 / 0 | {len(measure.CELLS)} ({said}) | 0 | 0 | 0 |"
    assert row in tables.scores(tmp_path).splitlines()


def test_sensitivity(registry: Registry, h200: Hardware, tmp_path: Path) -> None:
    """Constants are moved for the count only, and each count is that of the advice with it."""
    made_up = record(registry, h200, "mixtral-8x7b", bm16=20.0)
    (tmp_path / "mixtral-8x7b.json").write_text(json.dumps(made_up))
    before = {name: getattr(tables.regions, name) for name in tables.CONSTANTS}
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in tables.sensitivity(tmp_path).splitlines()[2:]}
    assert set(rows) == set(tables.CONSTANTS)
    assert {name: getattr(tables.regions, name) for name in tables.CONSTANTS} == before
    # block 16 is made to win: the more cells are said to be small, the more hits
    small = sum(not tables.advise("mixtral-8x7b", *cell)["large token block"] for cell in measure.CELLS)
    less, today, more = map(int, rows["L2_OVER_HBM"].removesuffix(" |").split(" | ")[2:])
    assert less <= today == small < more


def test_a_prediction_comes_first(registry: Registry, h200: Hardware, tmp_path: Path) -> None:
    """Once more after a correction, never after a measurement."""
    tables.predict(tmp_path)
    tables.predict(tmp_path)
    assert len(tables.predictions(tmp_path)) == 2
    held_out = measure.HELD_OUT[0]
    path = tmp_path / f"{held_out}.json"
    path.write_text(json.dumps(record(registry, h200, held_out, gm8=10.0)))
    with pytest.raises(ProfileError, match=f"{held_out} measured already: what is said now is no prediction"):
        tables.predict(tmp_path)
    path.write_text(path.read_text().replace('"h200"', '"h100-sxm"'))
    with pytest.raises(ProfileError, match=r"is of h100-sxm, the tables are of h200; move it"):
        tables.scores(tmp_path)


def test_the_predictions_ask_of_both_outcomes() -> None:
    """On the whole set, and on the three that are held out, every optimisation is said to pay somewhere, and somewhere
    not."""
    everywhere = [tables.advise(m, *cell) for m, cell in itertools.product(measure.MODELS, measure.CELLS)]
    predicted = [p["advice"] for p in tables.predictions(FOLDER)]
    assert all(set(p) == set(measure.HELD_OUT) for p in predicted)
    held_out = [[answers for of_model in p.values() for answers in of_model.values()] for p in predicted]
    for optimisation in tables.OPTIMISATIONS:
        for answers in (everywhere, *held_out):
            said = [a[optimisation] for a in answers]
            assert 0 < sum(said) < len(said)
