"""The cost model against an independent fit, on synthetic times whose coefficients are known, and out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ramp_moe import (
    FORMS,
    Candidate,
    CostModel,
    GridGeometry,
    Hardware,
    KernelConfig,
    KernelError,
    MoEShape,
    ProfileError,
    Stage,
    Sweep,
    UnknownNameError,
    expert_histogram,
    fit_sweep,
    generate,
)
from ramp_moe.cost_model.fitting import RESIDENT, least_squares
from ramp_moe.cost_model.model import candidates_of, get_form, incomparable, join, path_times
from ramp_moe.evaluation.replay import Replay
from ramp_moe.measurements.sweep import (
    FORMAT,
    VERSION,
    Column,
    MeasuredBatch,
    Run,
    ShapeRecord,
    SweepRecord,
    make_sweep,
    path_key,
)

SHAPE = MoEShape(16, 2, 256, 256)
UP = GridGeometry(block_m=16, block_n=128, block_k=128, n=512, k=256, expert_bytes=1)
DOWN = GridGeometry(block_m=16, block_n=64, block_k=128, n=256, k=256, expert_bytes=1)


def histograms() -> list[tuple[int, np.ndarray]]:
    sizes = (1, 4, 16, 64, 256, 1024)
    kinds = ("uniform", "zipf1.2", "active0.25", "balancedness0.5")
    return [(t, expert_histogram(generate(k, t, 16, 2, seed=t), 16)) for t in sizes for k in kinds]


def config(name: str, *stages: Stage) -> KernelConfig:
    return KernelConfig(name, stages)


TWO_GEMMS = config(
    "a", Stage("schedule", "schedule/bm16"), Stage("gemm", "k/up/a", UP), Stage("gemm", "k/down/a", DOWN)
)


def synthetic(hardware: Hardware, stages: dict[str, tuple[Stage, tuple[float, ...]]], form: str = "active") -> Sweep:
    """A sweep whose times follow a form exactly; written out here by hand, not with the library's terms."""
    rows = []
    for tokens, h in histograms():
        times = []
        for stage, (a, b, c, d) in stages.values():
            if stage.geometry is None:
                g, waves = int(h.sum()), 0
            else:
                g = sum(math.ceil(n / stage.geometry.block_m) for n in h.tolist()) * stage.geometry.tiles_n
                waves = math.ceil(g / hardware.num_sms) if form != "paper" else g / hardware.num_sms
            last = int((h > 0).sum()) if form == "active" else math.log(g + 1)
            times.append(a + b * waves + c * g + d * last)
        rows.append(MeasuredBatch(tokens, "uniform", h.tolist(), [times]))
    columns = [Column(stage.kind, key) for key, (stage, _) in stages.items()]
    record = SweepRecord(
        format=FORMAT, version=VERSION, device="h200", kernel="k", kernel_version="1", shape=ShapeRecord.of(SHAPE),
        runs=[Run("2026-01-01", "NVIDIA H200", "", {}, "made up")], columns=columns, left_out=[], batches=rows,
    )  # fmt: skip
    return make_sweep(record)


def stages_of(c: KernelConfig, *coefficients: tuple[float, ...]) -> dict[str, tuple[Stage, tuple[float, ...]]]:
    return {s.key: (s, k) for s, k in zip(c.stages, coefficients, strict=True)}


def test_known_coefficients_are_recovered_and_stages_summed(h200: Hardware) -> None:
    known = [(2.0, 0.0, 0.01, 0.05), (5.0, 3.0, 0.02, 0.4), (4.0, 2.0, 0.01, 0.3)]
    sweep = synthetic(h200, stages_of(TWO_GEMMS, *known))
    model = fit_sweep(sweep, candidates_of(sweep, [TWO_GEMMS]), h200)
    for key, expected in zip(("schedule/bm16", "k/up/a", "k/down/a"), known, strict=True):
        assert model.fits[key].coefficients == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert model.fits[key].max_error < 1e-9
    assert model.cost(sweep.histograms)[:, 0] == pytest.approx(sweep.times_us.sum(1))
    assert path_times(sweep, model.candidates)[:, 0] == pytest.approx(sweep.times_us.sum(1))


def test_the_literal_paper_form_predicts_though_its_terms_are_collinear(h200: Hardware) -> None:
    c = config("a", Stage("gemm", "k/up/a", UP))
    sweep = synthetic(h200, stages_of(c, (5.0, 3.0, 0.02, 1.5)), form="paper")
    model = fit_sweep(sweep, candidates_of(sweep, [c]), h200, "paper")
    assert model.cost(sweep.histograms)[:, 0] == pytest.approx(sweep.times_us[:, 0])
    # b / SMs + c is all that the data determine
    a, b, c_, d = model.fits["k/up/a"].coefficients
    assert (a, b / h200.num_sms + c_, d) == pytest.approx((5.0, 3.0 / 132 + 0.02, 1.5))


def test_fit_minimises_relative_error_like_numpy(replay: Replay, h200: Hardware) -> None:
    model = replay.fit(form="ceil")
    sweep = replay.recordings[0].sweep
    for i in (0, 77, 151):
        candidate = model.candidates[i]
        g = candidate.config.gemms[0].logical(sweep.histograms)
        t = replay.times_us[:, i]
        x = np.stack([np.ones(len(g)), np.ceil(g / 132), g, np.log(g + 1)], 1)
        expected, *_ = np.linalg.lstsq(x / t[:, None], np.ones(len(g)), rcond=None)
        predicted = np.maximum(x @ expected, t.min() / 2)
        assert model.by_terms(sweep.histograms)[:, i] == pytest.approx(predicted, rel=1e-6)
        fit = model.fits[candidate.config.stages[-1].key]
        assert fit.rms_error == pytest.approx(np.sqrt(np.mean((x @ expected / t - 1) ** 2)), rel=1e-6)
        assert fit.rows == 78


def test_non_negative_fit_is_optimal(replay: Replay) -> None:
    """Karush-Kuhn-Tucker: the slope of the loss is zero along positive terms, and not negative along the others."""
    model = replay.fit(form="active")
    sweep = replay.recordings[0].sweep
    active = (sweep.histograms > 0).sum(1)
    at_zero = 0
    for i, candidate in enumerate(model.candidates):
        fit = model.fits[candidate.config.stages[-1].key]
        c, slots = np.array(fit.coefficients), fit.part.grids[0].cta_slots(132)
        assert (c >= 0).all()
        g = candidate.config.gemms[0].logical(sweep.histograms)
        x = np.stack([np.ones(len(g)), np.ceil(g / slots), g, active], 1) / replay.times_us[:, i, None]
        slope = x.T @ (x @ c - 1) / np.abs(x).max(0)
        at_zero += int((c == 0).sum())
        assert slope[c > 0] == pytest.approx(0, abs=1e-6)
        assert (slope[c == 0] > -1e-6).all()
    assert at_zero > 0


def test_ctas_on_an_sm_are_those_that_explain_the_times_best(replay: Replay) -> None:
    model = replay.fit(form="active")
    sweep, seen = replay.recordings[0].sweep, set()
    for i, candidate in enumerate(model.candidates):
        fit = model.fits[candidate.config.stages[-1].key]
        seen.add(fit.part.grids[0].ctas_per_sm)
        g, t = candidate.config.gemms[0].logical(sweep.histograms), replay.times_us[:, i]
        errors = []
        for resident in RESIDENT:
            x = np.stack([np.ones(len(g)), np.ceil(g / 132 / resident), g, (sweep.histograms > 0).sum(1)], 1)
            _, relative = least_squares(x[:, None], t[:, None], True)
            errors.append(np.sqrt(np.mean(relative**2)))
        assert fit.rms_error == pytest.approx(min(errors), rel=1e-9)
        assert fit.part.grids[0].ctas_per_sm == RESIDENT[int(np.argmin(errors))]
    assert seen == set(RESIDENT)


@pytest.mark.parametrize("form", FORMS)
def test_no_prediction_is_negative_and_extrapolation_is_flagged(replay: Replay, form: str) -> None:
    model = replay.fit(form=form)
    seen = model.predict(replay.histograms)
    assert not seen.extrapolated.any()
    outside = np.zeros((3, 64), np.int64)
    outside[1, 0] = 10**6
    outside[2, :] = 50_000
    prediction = model.predict(outside)
    assert prediction.extrapolated.all()
    assert (prediction.us > 0).all()
    assert prediction.us.shape == (3, 152)


def test_one_histogram_or_a_batch(replay: Replay) -> None:
    model = replay.fit()
    batch = model.predict(replay.histograms[:5])
    for i in range(5):
        one = model.predict(replay.histograms[i])
        assert one.us == pytest.approx(batch.us[i], rel=1e-6)
        assert one.extrapolated.tolist() == batch.extrapolated[i].tolist()


def test_unmeasured_rows_do_not_count(replay: Replay, h200: Hardware) -> None:
    recording = replay.recordings[0]
    sweep = recording.sweep
    times = sweep.times_us.copy()
    times[40:, 0] = np.nan
    times[2:, 1] = np.nan
    gaps = Sweep(sweep.record, sweep.shape, sweep.histograms, times[None])
    model = fit_sweep(gaps, recording.candidates, h200)
    # two rows are too few for four terms: that candidate is gone; the other equals a fit of its forty rows
    assert len(model.candidates) == 151
    assert recording.candidates[1] not in model.candidates
    short = fit_sweep(sweep.select(list(range(40))), recording.candidates, h200)
    key = recording.candidates[0].config.stages[-1].key
    assert model.fits[key] == short.fits[key]


def test_too_few_rows(replay: Replay, h200: Hardware) -> None:
    recording = replay.recordings[0]
    with pytest.raises(ProfileError, match=r"^3 batches of alpha_moe .* are too few to fit 4 terms"):
        fit_sweep(recording.sweep.select([0, 1, 2]), recording.candidates, h200)


def test_unknown_form() -> None:
    with pytest.raises(UnknownNameError, match="unknown cost model form 'activ'; did you mean 'active'"):
        get_form("activ")


def test_shared_stages_are_fitted_once_and_kernels_joined(h200: Hardware) -> None:
    other = config("b", Stage("schedule", "schedule/bm16"), Stage("gemm", "k2/b", DOWN))
    one = synthetic(h200, stages_of(TWO_GEMMS, (2, 0, 0.01, 0.05), (5, 3, 0.02, 0.4), (4, 2, 0.01, 0.3)))
    two = synthetic(h200, stages_of(other, (9, 0, 0.01, 0.05), (5, 3, 0.02, 0.4)))
    models = [fit_sweep(s, [Candidate(k, c)], h200) for s, k, c in ((one, "k", TWO_GEMMS), (two, "k2", other))]
    joint = join(models)
    assert [c.name for c in joint.candidates] == ["k/a", "k2/b"]
    assert len(joint.fits) == 4
    # the shared schedule costs what the first kernel's sweep says
    assert joint.fits["schedule/bm16"].coefficients[0] == pytest.approx(2)
    h = one.histograms
    assert joint.cost(h)[:, 0] == pytest.approx(models[0].cost(h)[:, 0])
    assert models[1].cost(h)[:, 0] - joint.cost(h)[:, 1] == pytest.approx(7)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (("gemm", "activation"), None),
        (("gemm",), "the times of other leave out activation"),
        (("gemm", "activation", "zero"), "the times of k leave out zero, those of other do not"),
    ],
)
def test_what_can_be_compared(h200: Hardware, columns: tuple[str, ...], reason: str | None) -> None:
    """The first kernel fuses its activation and was timed without zeroing."""
    fused = config("a", Stage("zero", "zero"), Stage("gemm", "k/a", UP))
    split = config("b", Stage("zero", "zero"), Stage("gemm", "other/b", UP), Stage("activation", "act"))
    one = synthetic(h200, stages_of(config("a", fused.stages[1]), (5, 3, 0.02, 0.4)))
    measured = config("b", *(s for s in split.stages if s.kind in columns))
    two = synthetic(h200, stages_of(measured, *[(5, 3, 0.02, 0.4)] * len(measured.stages)))
    models = [fit_sweep(s, [Candidate(k, c)], h200) for s, k, c in ((one, "k", fused), (two, "other", split))]
    assert incomparable(*models) == reason
    if reason is None:
        assert len(join(models).candidates) == 2
    else:
        with pytest.raises(ProfileError, match=reason):
            join(models)


def test_candidates_need_their_stages(h200: Hardware) -> None:
    sweep = synthetic(h200, stages_of(config("a", Stage("gemm", "k/up/a", UP)), (5, 3, 0.02, 0.4)))
    renamed = config("b", Stage("gemm", "k/up/b", UP))
    with pytest.raises(ProfileError, match="has no column that fits a configuration"):
        candidates_of(sweep, [renamed])
    with pytest.raises(KernelError, match="candidate k/b needs 'k/up/b', which is not fitted"):
        CostModel(SHAPE, h200, "active", [Candidate("k", renamed)], {}, ["gemm"], [])
    with pytest.raises(KernelError, match="no candidate"):
        CostModel(SHAPE, h200, "active", [], {}, ["gemm"], [])


def test_persistent_grids_wait_in_waves_of_their_own_ctas(h200: Hardware) -> None:
    grid = GridGeometry(block_m=16, block_n=128, block_k=128, n=512, k=256, expert_bytes=1, persistent_ctas=8)
    c = config("p", Stage("gemm", "k/p", grid))
    known = (5.0, 3.0, 0.0, 0.0)
    rows = [(t, h, 5.0 + 3.0 * math.ceil(int(grid.logical(h)) / 8)) for t, h in histograms()]
    sweep = synthetic(h200, stages_of(c, known))
    times = np.array([[t] for _, _, t in rows])
    model = fit_sweep(Sweep(sweep.record, SHAPE, sweep.histograms, times[None]), [Candidate("k", c)], h200)
    assert model.fits["k/p"].coefficients == pytest.approx(known, abs=1e-6)


def test_a_whole_path_adds_up_its_grids_by_work(h200: Hardware) -> None:
    """One column for the path of two GEMMs: a CTA of the second does a quarter of the work of one of the first (half
    the weight rows, half the reduction)."""
    down = GridGeometry(block_m=16, block_n=64, block_k=128, n=256, k=128, expert_bytes=1)
    path = config("a", TWO_GEMMS.stages[0], TWO_GEMMS.stages[1], Stage("gemm", "k/down/a", down))
    a, b, c, d = known = (7.0, 3.0, 0.02, 0.4)
    times = []
    for _, h in histograms():
        tiles = sum(math.ceil(n / 16) for n in h.tolist())
        grids = tiles * UP.tiles_n, tiles * down.tiles_n
        waves = math.ceil(grids[0] / 132) + math.ceil(grids[1] / 132) / 4
        times.append([a + b * waves + c * (grids[0] + grids[1] / 4) + d * int((h > 0).sum())])
    sweep = synthetic(h200, stages_of(config("a", TWO_GEMMS.stages[1]), known))
    record = sweep.record
    record.columns = [Column("path", path_key("k", "a"))]
    whole = Sweep(record, SHAPE, sweep.histograms, np.array([times]))
    candidates = candidates_of(whole, [path])
    model = fit_sweep(whole, candidates, h200)
    assert model.fits["path/k/a"].coefficients == pytest.approx(known)
    assert path_times(whole, candidates).tolist() == times
    assert model.cost(whole.histograms)[:, 0] == pytest.approx(path_times(whole, candidates)[:, 0])
    best, us, extrapolated = model.choose(whole.histograms[3])
    assert (best, us, extrapolated) == (0, pytest.approx(times[3][0]), False)
    assert model.choose(100 * whole.histograms[-1])[2]
    # a path leaves nothing out, and so cannot be compared with a GEMM alone
    assert incomparable(model, model) is None
    alone = synthetic(h200, stages_of(config("a", TWO_GEMMS.stages[1]), known))
    gemm = fit_sweep(alone, candidates_of(alone, [config("a", *TWO_GEMMS.stages[:2])]), h200)
    assert incomparable(model, gemm) == "the times of k leave out schedule, those of k do not"


def test_a_bound_is_no_time_to_fit_to_unless_the_fit_is_below_it(h200: Hardware) -> None:
    c = config("a", Stage("gemm", "k/up/a", UP))
    known = (5.0, 3.0, 0.02, 0.4)
    sweep = synthetic(h200, stages_of(c, known))
    bounded = [i for i, (tokens, _) in enumerate(sweep.labels) if tokens == 1024]

    def with_bounds(share: float) -> Sweep:
        for i in bounded:
            sweep.record.batches[i].runs_us = [[-share * float(sweep.times_us[i, 0])]]
        return make_sweep(sweep.record)

    low = with_bounds(0.2)
    assert low.bounded[0, :, 0].nonzero()[0].tolist() == bounded
    assert low.times_us[bounded, 0] == pytest.approx(0.2 * sweep.times_us[bounded, 0])
    fit = fit_sweep(low, [Candidate("k", c)], h200).fits["k/up/a"]
    assert fit.coefficients == pytest.approx(known)
    assert fit.rows == len(sweep.labels) - len(bounded)
    high = fit_sweep(with_bounds(50.0), [Candidate("k", c)], h200)
    # the fit of the other batches would be below it: the bounds count, as little as any four batches do
    assert (high.cost(sweep.histograms[bounded]) > 1.1 * sweep.times_us[bounded]).all()


def test_what_has_hardly_more_than_bounds_stays_a_candidate(h200: Hardware) -> None:
    """A replay counts on the model's candidates being its own, in its order."""
    c, behind = config("a", Stage("gemm", "k/up/a", UP)), config("b", Stage("gemm", "k/up/b", UP))
    sweep = synthetic(h200, stages_of(c, (5.0, 3.0, 0.02, 0.4)))
    record = sweep.record
    record.columns.insert(0, Column("gemm", "k/up/b"))
    for i, row in enumerate(record.batches):
        us = float(sweep.times_us[i, 0])
        row.runs_us = [[20 * us if i < 3 else -3 * us, us]]
    candidates = [Candidate("k", behind), Candidate("k", c)]
    model = fit_sweep(make_sweep(record), candidates, h200)
    assert list(model.candidates) == candidates
    assert model.cost(sweep.histograms).argmin(1).tolist() == [1] * len(record.batches)
