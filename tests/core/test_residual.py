"""What corrects the wave model: learnt where there are batches alike, nothing elsewhere, stored and joined."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import RECORDED, exhaustive
from ramp_moe import Hardware, ProfileError, ProfileStore, Registry
from ramp_moe.comparison import compare_recorded
from ramp_moe.cost_model import NEAR, CostModel, join
from ramp_moe.evaluation import regret
from ramp_moe.fit_file import load_fit, make_record, model_from_fit, save_fit
from ramp_moe.replay import Replay, load_replay
from ramp_moe.residual import FEWEST_ROWS, Correction, Residual, fit_residual


def alike(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, active, tiles, what to learn), spread as a profile's batches are."""
    rng = np.random.default_rng(seed)
    ids = np.round(8 * 2 ** rng.uniform(0, 12, rows)).astype(np.int64)
    active = np.minimum(np.ceil(64 * rng.uniform(0.1, 1, rows)).astype(np.int64), ids)
    tiles = np.maximum(ids // 16, active)
    return ids, active, tiles, 0.1 * np.sin(np.log(ids)) + 0.05 * np.log(active)


def factor(residual: Residual, name: str, ids: np.ndarray, active: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    us = np.ones((len(ids), 1))
    correction = Correction(residual, [0], [name], {16: 0})
    correction.apply(us, np.ones_like(us, bool), ids.astype(float), active.astype(float), tiles[:, None].astype(float))
    return us[:, 0]


def test_batches_alike_are_wrong_alike() -> None:
    ids, active, tiles, wrong = alike(90, 0)
    times = 100 * np.exp(np.stack([wrong, -wrong], 1))
    found = fit_residual(ids, active, {16: tiles}, ["k/a", "k/b"], [16, 16], times, np.full_like(times, 100.0))
    assert found is not None
    *other, expected = alike(60, 1)
    for name, sign in (("k/a", 1), ("k/b", -1)):
        left = np.log(factor(found, name, *other)) - sign * expected
        assert np.sqrt(np.mean(left**2)) < 0.35 * np.sqrt(np.mean(expected**2))
    # nothing is known of batches that are like none
    far = np.array([10**9]), np.array([1]), np.array([1])
    assert factor(found, "k/a", *far) == pytest.approx(1, abs=0.02)


def test_what_was_not_measured_teaches_nothing() -> None:
    ids, active, tiles, wrong = alike(40, 0)
    times = np.stack([100 * np.exp(wrong), np.full(40, np.nan)], 1)
    found = fit_residual(ids, active, {16: tiles}, ["k/a", "k/b"], [16, 16], times, np.full_like(times, 100.0))
    assert found is not None
    assert (found.weights["k/b"][1] == 0).all()
    assert np.abs(found.weights["k/a"][1]).max() > 0
    few = slice(FEWEST_ROWS - 1)
    assert fit_residual(ids[few], active[few], {16: tiles[few]}, ["k/a"], [16], times[few, :1], times[few, :1]) is None


@pytest.fixture
def smooth(replay: Replay) -> CostModel:
    return replay.fit(form="smooth")


def test_one_batch_or_many(smooth: CostModel, replay: Replay) -> None:
    many = smooth.cost(replay.histograms)
    for i in (0, 20, 77):
        assert smooth.cost(replay.histograms[i]) == pytest.approx(many[i], rel=1e-9)
        best, us, _ = smooth.choose(replay.histograms[i])
        assert (best, us) == (many[i].argmin(), pytest.approx(many[i].min()))
    assert np.isfinite(smooth.cost(np.zeros((2, 64), np.int64))).all()


def test_candidates_far_behind_stay_behind(smooth: CostModel, replay: Replay) -> None:
    plain, corrected = replay.fit(form="active").cost(replay.histograms), smooth.cost(replay.histograms)
    near = plain <= NEAR * plain.min(1, keepdims=True)
    assert 0.01 < near.mean() < 0.9
    assert (corrected[near] != plain[near]).mean() > 0.9
    slowest = np.where(near, corrected, 0).max(1, keepdims=True)
    assert (np.where(near, np.inf, corrected) >= slowest).all()
    # It was fitted to these batches, and knows them better.
    measured = replay.times_us
    assert regret(measured, corrected.argmin(1)).mean() < 0.5 * regret(measured, plain.argmin(1)).mean()


def test_restricted_and_joined(smooth: CostModel, replay: Replay) -> None:
    expected = smooth.cost(replay.histograms)
    assert smooth.restrict(["alpha_moe"]).cost(replay.histograms) == pytest.approx(expected)
    assert join([smooth]).cost(replay.histograms) == pytest.approx(expected)


def test_stored_and_read_again(smooth: CostModel, replay: Replay, tmp_path: Path) -> None:
    sweep, path = replay.recordings[0].sweep, tmp_path / "a.fit.json"
    record = make_record(smooth, sweep, {"mean": 0.0, "median": 0.0, "p95": 0.0, "max": 0.0})
    save_fit(path, record)
    again = model_from_fit(load_fit(path), replay.shape, replay.hardware, [c.config for c in smooth.candidates])
    assert again.cost(replay.histograms) == pytest.approx(smooth.cost(replay.histograms))
    assert record.residual is not None
    name, (block, weights) = next(iter(record.residual.weights.items()))
    flaws = [
        ({"ids": [0, *record.residual.ids[1:]]}, "not positive"),
        ({"active": record.residual.active[1:]}, "not as many as the batches"),
        ({"tiles": record.residual.tiles | {"sixteen": record.residual.ids}}, "token blocks that are no numbers"),
        ({"length": 1e6}, "a length of 1000000"),
        ({"weights": {name: (block, weights[1:])}}, f"the weights of {name} do not fit the batches"),
        ({"weights": {name: (7, weights)}}, f"the weights of {name} do not fit the batches"),
    ]
    for changed, message in flaws:
        bad = msgspec.structs.replace(record, residual=msgspec.structs.replace(record.residual, **changed))
        save_fit(path, bad)
        with pytest.raises(ProfileError, match=message) as caught:
            load_fit(path)
        assert str(path) in str(caught.value)
        assert "`$.residual`" in str(caught.value)


def test_stages_that_are_not_gemms(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    both = load_replay(registry, shipped, shape, h200, ["triton"], ["combine"])
    assert np.isfinite(both.fit(form="smooth").cost(both.histograms)).all()


@pytest.mark.parametrize("model", RECORDED)
def test_regret_falls(registry: Registry, shipped: ProfileStore, h200: Hardware, model: str) -> None:
    """On held-out kinds of routing, of whole paths; and of one launch, cross-validated."""
    shape = registry.shape(model, "fp8")
    whole = load_replay(registry, shipped, shape, h200, ["alpha_moe", "triton"])
    launch = load_replay(registry, exhaustive(shape), shape, h200, ["alpha_moe"])
    for replay, most in ((whole, 0.016), (launch, 0.027)):
        plain, smooth = (compare_recorded(replay, form).baselines["retrofitted"].mean for form in ("active", "smooth"))
        assert smooth < 0.8 * plain
        assert smooth < most
