"""No predicted time of a whole layer lies below the time in which its active experts' weights are read."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from ramp_moe import CostModel, Hardware, HardwareError, ProfileStore, Registry, expert_histogram, generate
from ramp_moe.cost_model.correction import Corrections
from ramp_moe.cost_model.roofline import expert_read_us
from ramp_moe.cost_model.transfer import transfer
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.measurements.sweep import PATH, load_sweep
from ramp_moe.spec.hardware import READ_SHARE
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.routing import KINDS, IntArray

NOISE = 0.98
"""Share of the floor that the fastest recorded time reaches: 4.35 TB/s were read once in a batch."""


@pytest.fixture(scope="module")
def guessed(registry: Registry, h200: Hardware) -> CostModel:
    store = ProfileStore(shipped=registry.profile_dirs)
    return load_model(registry, store, registry.shape("qwen1.5-moe-a2.7b", "bf16"), h200, ["cute"])[0]


@pytest.fixture(scope="module")
def fitted(registry: Registry, h200: Hardware) -> CostModel:
    """The form that fits worst."""
    store = ProfileStore(shipped=[DATA / "profiles"])
    return load_replay(registry, store, registry.shape("olmoe-1b-7b", "fp8"), h200, ["alpha_moe"]).fit(form="ceil")


def batches(model: CostModel) -> IntArray:
    """Histograms `[batches, num_experts]` of every kind of routing, from none to 4,096 tokens."""
    shape = model.shape
    kinds = [k.replace("V", "0.5") for k in KINDS]
    drawn = [generate(k, n, shape.num_experts, shape.top_k, seed=n) for k in kinds for n in (1, 8, 64, 700, 4096)]
    none = np.zeros(shape.num_experts, np.int64)
    return np.stack([none, *(expert_histogram(ids, shape.num_experts) for ids in drawn)])


def test_a_guess_of_what_memory_delivers(guessed: CostModel) -> None:
    """1.04 GB at 4.3 TB/s take 241 us. Without the part that grows with the routed ids it was 218."""
    histogram = expert_histogram(generate("uniform", 64, 60, 4, seed=0), 60)
    assert 241.4 < guessed.predict(histogram).us.min() < 300
    assert guessed.choose(histogram)[1] == pytest.approx(guessed.predict(histogram).us.min())


def test_joined_guesses_keep_every_part(registry: Registry, h200: Hardware) -> None:
    shape, store = registry.shape("qwen1.5-moe-a2.7b", "bf16"), ProfileStore(shipped=registry.profile_dirs)
    histogram = np.full(60, 300)
    alone = {}
    for name in ("cute", "deep_gemm"):
        configs_of = partial(usable_configs, registry.kernel(name), hardware=h200)
        model = transfer(store.of_other_shapes(name, shape, h200), configs_of, shape, h200)
        alone |= dict(zip([c.name for c in model.candidates], model.by_terms(histogram), strict=True))
    joined, _ = load_model(registry, store, shape, h200, ["cute", "deep_gemm"])
    assert joined.by_terms(histogram) == pytest.approx([alone[c.name] for c in joined.candidates])


@pytest.mark.parametrize("which", ["guessed", "fitted"])
def test_every_prediction_of_every_batch(which: str, request: pytest.FixtureRequest) -> None:
    """Stays above the floor; and what is chosen, and in which order the others follow, stays as it was."""
    model: CostModel = request.getfixturevalue(which)
    histograms = batches(model)
    least = (histograms > 0).sum(1) * expert_read_us(model.shape, model.hardware)
    us, terms = model.cost(histograms), model.by_terms(histograms)
    assert (us >= least[:, None] * (1 - 1e-12)).all()
    lifted = terms.min(1) < least
    assert lifted.any()
    assert not lifted.all()
    assert us[~lifted].tolist() == terms[~lifted].tolist()
    assert np.ptp(us / terms, axis=1) == pytest.approx(0, abs=1e-9)
    for histogram, cost in zip(histograms, us, strict=True):
        index, predicted, _ = model.choose(histogram)
        assert (index, predicted) == (int(cost.argmin()), pytest.approx(cost.min(), rel=1e-12))


def test_what_was_measured_here_comes_after_the_floor(guessed: CostModel) -> None:
    """A correction brings the prediction to the measured time, even to one that lies below the floor."""
    histogram = expert_histogram(generate("uniform", 64, 60, 4, seed=0), 60)
    name, us = guessed.candidates[0].name, guessed.cost(histogram)[0]
    measured = guessed.corrected(Corrections((64,), {name: np.log([100.0 / us])})).at(64)
    assert measured.cost(histogram)[0] == pytest.approx(100.0)
    assert measured.choose(histogram)[:2] == (0, pytest.approx(100.0))


def test_times_without_the_weights_have_no_floor(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    combining = load_replay(registry, shipped, shape, h200, ["triton"], ["combine"]).fit(form="ceil")
    histogram = expert_histogram(generate("uniform", 64, 64, 8, seed=0), 64)
    assert combining.cost(histogram).max() < 64 * expert_read_us(shape, h200) / 2


def test_no_recorded_time_contradicts_it(registry: Registry) -> None:
    paths = [p for folder in registry.profile_dirs for p in Path(folder).glob("*/*/*.json")]
    assert len(paths) > 30
    for path in paths:
        sweep = load_sweep(path)
        if PATH in sweep.stages:
            whole = sweep.only([PATH])
            least = (whole.histograms > 0).sum(1) * expert_read_us(sweep.shape, registry.device(sweep.device))
            timed = np.where(whole.only_bounded, np.inf, np.nan_to_num(whole.times_us, nan=np.inf))
            assert (timed.min(1) >= NOISE * least).all(), path


def test_a_rate_that_nobody_measured_is_a_share_of_the_data_sheet(h200: Hardware) -> None:
    assert h200.read_bytes_per_s == 4.3e12
    unknown = dataclasses.replace(h200, measured_bytes_per_s=None)
    assert unknown.read_bytes_per_s == READ_SHARE * 4.8e12
    for rate in (0.0, -1.0, 5e12, float("nan")):
        with pytest.raises(HardwareError, match="measured_bytes_per_s must lie between 0 and hbm_bytes_per_s"):
            dataclasses.replace(h200, measured_bytes_per_s=rate)


def test_predictions_that_left_all_bounds(registry: Registry, h200: Hardware) -> None:
    """A residual far from its batches may leave nothing of a time."""
    store, shape = ProfileStore(shipped=[DATA / "profiles"]), registry.shape("olmoe-1b-7b", "fp8")
    replay = load_replay(registry, store, shape, h200, ["alpha_moe"])
    model = replay.fit()
    (residual,) = model.residuals
    nothing = {name: (block, -1000.0, weights) for name, (block, _, weights) in residual.weights.items()}
    residuals = [dataclasses.replace(residual, weights=nothing)]
    about = shape, h200, model.form, model.candidates, model.fits, model.stages, (), None, residuals
    wild = CostModel(*about)
    for histogram in replay.histograms[::10]:
        least = (histogram > 0).sum() * expert_read_us(shape, h200)
        us, (index, predicted, _) = wild.cost(histogram), wild.choose(histogram)
        assert np.isfinite(us).all()
        assert us.min() >= least
        assert (index, predicted) == (us.argmin(), us.min())
