"""The benchmark of 4-bit weights fits what it says, and says why it cannot run; its tables are those of its files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import UNMEASURED, load
from ramp_moe import MoEShape

pytest.importorskip("torch")
FOLDER = Path(__file__).parents[2] / "profiles" / "benchmarks" / "four_bits"
SHAPE = MoEShape(64, 8, 2048, 1024, "mxfp4")


def test_the_fit_finds_the_coefficients_and_the_fastest_pair() -> None:
    measure = load("benchmarks/four_bits/measure.py")
    generator = np.random.default_rng(0)
    drawn = [measure.Drawn(1, "", None, generator.integers(0, 60, 64)) for _ in range(8)]
    every = {which: measure.tiles(SHAPE, which)[::9] for which in measure.PROJECTIONS}
    truth = np.array([3.0, 0.5, 2.0, 0.01])

    def times(histogram: np.ndarray) -> dict:
        return {w: {t: float(measure.terms(SHAPE, w, t, histogram) @ truth) for t in ts} for w, ts in every.items()}

    fitted = measure.fit(SHAPE, [(d, times(d.histogram)) for d in drawn])
    assert set(fitted) == {(which, tile) for which, tiles in every.items() for tile in tiles}
    for (which, tile), coefficients in fitted.items():
        for d in drawn:
            predicted = measure.terms(SHAPE, which, tile, d.histogram) @ coefficients
            assert predicted == pytest.approx(times(d.histogram)[which][tile], rel=1e-6)
    up, down = measure.fastest(times(drawn[0].histogram))
    assert up.block_m == down.block_m


def test_ratios_are_over_the_models_choice() -> None:
    tables = load("benchmarks/four_bits/tables.py")
    rows = [{"us": {"model": 2.0, "own": 4.0}}, {"us": {"model": 1.0, "own": 0.5, "marlin": 3.0}}]
    assert tables.spread(tables.ratios(rows, "own")) == "1.000x (0.50 to 2.00)"
    assert tables.ratios(rows, "marlin") == [3.0]
    assert tables.spread([]) == "-"
    assert UNMEASURED in tables.tables(FOLDER / "none")["gains"]()


@pytest.mark.slow
def test_it_says_why_it_cannot_run(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "measure.py"), "--model", "mixtral-8x7b", "--out", str(tmp_path / "x.json")]
    done = subprocess.run([*command, "--dtype", "bf16"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "humming cannot run mixtral-8x7b (bf16) here" in done.stderr
    assert not [*tmp_path.iterdir()]
