"""What corrects the wave model: learnt where there are batches alike, nothing elsewhere, stored and joined."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import RECORDED
from ramp_moe import Hardware, ProfileError, ProfileStore, Registry
from ramp_moe.cost_model.fit_file import load_fit, make_record, model_from_fit, save_fit
from ramp_moe.cost_model.fitting import CONTEND
from ramp_moe.cost_model.model import CostModel, join
from ramp_moe.cost_model.residual import FEWEST_ROWS, Correction, Residual, fit_residual
from ramp_moe.evaluation.comparison import compare_recorded
from ramp_moe.evaluation.regret import regret
from ramp_moe.evaluation.replay import Replay, load_replay
from ramp_moe.spec.routing import MAX_COUNT


def alike(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, active, tiles, what to learn), spread as a profile's batches are."""
    rng = np.random.default_rng(seed)
    ids = np.round(8 * 2 ** rng.uniform(0, 12, rows)).astype(np.int64)
    active = np.minimum(np.ceil(64 * rng.uniform(0.1, 1, rows)).astype(np.int64), ids)
    tiles = np.maximum(ids // 16, active)
    return ids, active, tiles, 0.1 * np.sin(np.log(ids)) + 0.05 * np.log(active)


def factor(residual: Residual, name: str, ids: np.ndarray, active: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    correction = Correction([residual], [name], [1, 16, MAX_COUNT])
    return correction.factors(np.stack([ids, tiles, active], 1).astype(float))[:, 0]


def test_batches_alike_are_wrong_alike() -> None:
    ids, active, tiles, wrong = alike(90, 0)
    times = 100 * np.exp(np.stack([wrong, -wrong], 1))
    found = fit_residual(ids, active, {16: tiles}, ["k/a", "k/b"], [16, 16], times, np.full_like(times, 100.0))
    assert found is not None
    *other, expected = alike(60, 1)
    for name, sign in (("k/a", 1), ("k/b", -1)):
        left = np.log(factor(found, name, *other)) - sign * expected
        assert np.sqrt(np.mean(left**2)) < 0.35 * np.sqrt(np.mean(expected**2))
    # beyond the batches the correction levels off
    ids = 10 ** np.array([6, 7, 8])
    far = np.log(factor(found, "k/a", ids, np.full(3, 64), ids // 16))
    assert far == pytest.approx(far[0].item(), abs=0.05)
    assert np.abs(far).max() < 0.4


def test_what_was_not_measured_teaches_nothing() -> None:
    ids, active, tiles, wrong = alike(40, 0)
    times = np.stack([100 * np.exp(wrong), np.full(40, np.nan)], 1)
    found = fit_residual(ids, active, {16: tiles}, ["k/a", "k/b"], [16, 16], times, np.full_like(times, 100.0))
    assert found is not None
    assert (found.weights["k/b"][2] == 0).all()
    assert np.abs(found.weights["k/a"][2]).max() > 0
    few = slice(FEWEST_ROWS - 1)
    assert fit_residual(ids[few], active[few], {16: tiles[few]}, ["k/a"], [16], times[few, :1], times[few, :1]) is None


@pytest.fixture
def smooth(replay: Replay) -> CostModel:
    return replay.fit(form="smooth")


def test_one_batch_or_many(smooth: CostModel, replay: Replay) -> None:
    many = smooth.cost(replay.histograms)
    for i in (0, 20, 77):
        assert smooth.cost(replay.histograms[i]) == pytest.approx(many[i], rel=1e-6)
    assert np.isfinite(smooth.cost(np.zeros((2, 64), np.int64))).all()


def test_what_is_chosen_is_the_cheapest_of_all(smooth: CostModel, replay: Replay) -> None:
    """For batches like the fitted ones and for others, an empty one too."""
    rng = np.random.default_rng(0)
    others = [
        rng.multinomial(n, rng.dirichlet(np.full(64, a))) for n in (0, 1, 40, 3000, 10**6) for a in (0.02, 0.3, 9)
    ]
    for histogram in [*replay.histograms, *others]:
        best, us, _ = smooth.choose(histogram)
        cost = smooth.cost(histogram)
        assert (best, us) == (cost.argmin(), cost.min())


def test_who_is_never_near_is_not_corrected_and_not_chosen(smooth: CostModel, replay: Replay) -> None:
    plain, corrected = replay.fit(form="active").cost(replay.histograms), smooth.cost(replay.histograms)
    assert (
        smooth.contenders.tolist() == np.flatnonzero((plain <= CONTEND * plain.min(1, keepdims=True)).any(0)).tolist()
    )
    assert 20 < len(smooth.contenders) < 130
    others = np.setdiff1d(np.arange(152), smooth.contenders)
    fastest = corrected[:, smooth.contenders].min(1, keepdims=True)
    assert corrected[:, others] == pytest.approx(np.maximum(plain[:, others], fastest))
    assert (corrected[:, others] > fastest).all()
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
    name, (block, constant, weights) = next(iter(record.residual.weights.items()))
    flaws = [
        ({"ids": [0, *record.residual.ids[1:]]}, "not positive"),
        ({"active": record.residual.active[1:]}, "not as many as the batches"),
        ({"tiles": record.residual.tiles | {"sixteen": record.residual.ids}}, "token blocks that are no numbers"),
        ({"weights": {name: (block, constant, weights[1:])}}, f"the weights of {name} do not fit the batches"),
        ({"weights": {name: (7, constant, weights)}}, f"the weights of {name} do not fit the batches"),
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
    """On held-out kinds of routing, of whole paths. (Of one launch, cross-validated, the study's test has it.)"""
    replay = load_replay(registry, shipped, registry.shape(model, "fp8"), h200, ["alpha_moe", "triton"])
    plain, smooth = (compare_recorded(replay, form).baselines["histogram"].mean for form in ("active", "smooth"))
    assert smooth < 0.8 * plain
    assert smooth < 0.012
