"""Evaluation on the shipped measurements: the figures are recomputed here and must not get worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import RECORDED, exhaustive
from ramp_moe import Hardware, MoEShape, ProfileError, ProfileStore, Registry, RoutingError, load_sweep, load_trace
from ramp_moe.cost_model.model import DEFAULT_FORM, CostModel
from ramp_moe.dispatch.load_model import fitted_on, load_model
from ramp_moe.dispatch.profile_store import relative_path, user_data_dir
from ramp_moe.evaluation.comparison import compare_recorded, compare_trace
from ramp_moe.evaluation.regret import (
    DEALS,
    IndexArray,
    Summary,
    cross_validated_choices,
    folds,
    regret,
    selection_noise,
    single_choices,
    sparse_table,
    split_half_regret,
    static_table,
    table_choice,
    table_choices,
)
from ramp_moe.evaluation.replay import Replay, load_replay
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
from simulated_bench import HARDWARE, SHAPE, Simulated
from tiers import slow_except


def test_folds_cover_every_row_once() -> None:
    parts = folds(78)
    assert len(parts) == 5
    assert sorted(np.concatenate(parts).tolist()) == list(range(78))
    assert len(folds(3)) == 3
    with pytest.raises(ProfileError, match="at least two batches"):
        folds(1)


def test_no_choice_comes_from_a_fit_that_saw_the_row(replay: Replay) -> None:
    seen: list[set[int]] = []

    def fit(rows):
        seen.append(set(rows.tolist()))
        return replay.fit(rows)

    cross_validated_choices(replay.histograms, fit)
    parts = folds(len(replay.labels))
    assert [set(p.tolist()) & s for p, s in zip(parts, seen, strict=True)] == [set()] * 5
    assert all(len(p) + len(s) == 78 for p, s in zip(parts, seen, strict=True))


def test_regret_and_policies_on_a_table_made_by_hand() -> None:
    labels = [(1, "uniform"), (1, "zipf1.0"), (8, "uniform"), (8, "zipf1.0"), (9, "zipf1.0")]
    times = np.array([[10.0, 12], [20, 10], [30, 15], [10, 20], [40, 50]])
    assert static_table(times, labels) == {1: 0, 8: 1}
    static = table_choices(static_table(times, labels), labels)
    assert static.tolist() == [0, 0, 1, 1, 1]
    assert regret(times, static).tolist() == [0, 1, 0, 1, 0.25]
    assert sparse_table(static_table(times, labels)) == {1: 0}
    assert sparse_table({8: 1}) == {8: 1}
    assert table_choice({1: 5, 9: 6}, 5) == 5
    assert Summary.of(regret(times, static)) == Summary(0.45, 0.25, pytest.approx(1.0), 1.0)
    with pytest.raises(ProfileError, match="no batch with uniform routing"):
        static_table(times[1:2], labels[1:2])


def test_one_configuration_is_chosen_without_the_row() -> None:
    times = np.array([[1.0, 2]] * 5 + [[1.0, 1000]])
    assert single_choices(times).tolist() == [0] * 6


# mean regret: histogram (cross-validated), static. Rounded up; a better model lowers them.
EXPECTED = {
    "olmoe-1b-7b": (0.0265, 0.061),
    "qwen3-30b-a3b": (0.0275, 0.066),
    "deepseek-v3-tp8": (0.039, 0.075),
    "mixtral-8x7b-tp4": (0.0275, 0.067),
}


@pytest.mark.parametrize("model", slow_except(RECORDED[:1], RECORDED))
def test_regret_on_the_shipped_sweeps(registry: Registry, h200: Hardware, model: str) -> None:
    shape = registry.shape(model, "fp8")
    replay = load_replay(registry, exhaustive(shape), shape, h200, ["alpha_moe"])
    found = compare_recorded(replay)
    by_histogram, static = EXPECTED[model]
    assert found.baselines["histogram"].mean < by_histogram
    assert static - 0.002 < found.baselines["static"].mean < static
    assert found.baselines["histogram"].mean < min(s.mean for name, s in found.baselines.items() if name != "histogram")
    assert found.speedup_over_static.geomean > 1.025
    paper = compare_recorded(replay, "paper")
    assert found.baselines["histogram"].mean < paper.baselines["histogram"].mean, "the default form is no worse"


def test_comparison_adds_up(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: dict[tuple[bytes, str], CostModel] = {}  # those of the folds, which the test needs again

    def fit_once(self: Replay, rows: IndexArray, form: str = DEFAULT_FORM) -> CostModel:
        key = rows.tobytes(), form
        if key not in fits:
            fits[key] = fit(self, rows, form)
        return fits[key]

    fit = Replay.fit
    monkeypatch.setattr(Replay, "fit", fit_once)
    found = compare_recorded(replay).as_dict()
    times = replay.times_us
    assert found["mode"] == "replay"
    assert len(found["batches"]) == 78
    for i, batch in enumerate(found["batches"]):
        assert batch["best"]["us"] == times[i].min()
        assert batch["speedup"] == batch["static"]["us"] / batch["histogram"]["us"]
        assert batch["regret"] == batch["histogram"]["us"] / batch["best"]["us"] - 1
        assert batch["regret"] >= 0
    # The table shows the first way of dealing the folds, the figures pool all of them.
    deals = [cross_validated_choices(replay.histograms, replay.fit, seed=deal) for deal in range(DEALS)]
    assert len(fits) == 5 * DEALS
    assert [b["regret"] for b in found["batches"]] == regret(times, deals[0]).tolist()
    regrets = np.concatenate([regret(times, choices) for choices in deals])
    assert found["regret"]["mean"] == pytest.approx(np.mean(regrets))
    assert found["regret"]["p95"] == pytest.approx(np.quantile(regrets, 0.95))
    assert found["static_regret"]["max"] == pytest.approx(max(b["static_regret"] for b in found["batches"]))
    speedups = [b["static"]["us"] / times[i, c[i]] for c in deals for i, b in enumerate(found["batches"])]
    assert found["speedup_over_static"]["geomean"] == pytest.approx(np.exp(np.log(speedups).mean()))
    assert found["speedup_over_static"]["min"] == pytest.approx(min(speedups))
    static = [b["static"]["us"] / b["best"]["us"] for b in found["batches"]]
    assert found["best_over_static"]["geomean"] == pytest.approx(np.exp(np.log(static).mean()))
    assert found["stages"] == ["gemm"]
    assert found["stages_left_out"] == {"alpha_moe": ["schedule"]}


def write_trace(path: Path, experts: int = 64, top_k: int = 8, tokens: int = 300) -> Path:
    rng = np.random.default_rng(0)
    ids = [rng.permutation(experts)[:top_k].tolist() for _ in range(tokens)]
    path.write_text(json.dumps({"num_experts": experts, "top_k": top_k, "topk_ids": ids}))
    return path


def test_trace_figures_are_predictions_and_say_so(replay: Replay, tmp_path: Path) -> None:
    found = compare_trace(replay, load_trace(write_trace(tmp_path / "t.json"))).as_dict()
    assert found["mode"] == "predicted"
    assert found["regret"] == dict.fromkeys(("mean", "median", "p95", "max"))
    assert any("predictions of the cost model" in n for n in found["notes"])
    assert [(b["routing"], b["tokens"], b["steps"]) for b in found["batches"]] == [
        ("trace decode", 1, 300),
        ("trace decode", 4, 75),
        ("trace decode", 16, 18),
        ("trace decode", 64, 4),
        ("trace decode", 256, 1),
        ("trace prefill", 64, 4),
        ("trace prefill", 256, 1),
    ]
    assert all(b["speedup"] >= 1 and b["best"] is None for b in found["batches"])


def test_trace_of_another_shape(replay: Replay, tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="the trace names 2 of 8 experts a token, olmoe-1b-7b 8 of 64"):
        compare_trace(replay, load_trace(write_trace(tmp_path / "t.json", 8, 2)))


def test_repeated_batches_are_kept_apart(registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["batches"].append(raw["batches"][4] | {"runs_us": [[2 * t for t in raw["batches"][4]["runs_us"][0]]]})
    sweep_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert replay.notes == []
    assert replay.times_us.shape == (79, 152)
    assert replay.times_us[78].tolist() == (2 * replay.times_us[4]).tolist()


def test_a_column_of_another_kind_drops_candidates_with_a_note(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["columns"].append({"stage": "schedule", "key": "alpha_moe/prepare/bm8", "params": {}})
    for row in raw["batches"]:
        row["runs_us"][0].append(3.0)
    sweep_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert len(replay.candidates) == 10
    assert "142 of 152 configurations left out" in replay.notes[0]


def test_an_unasked_kernel_that_cannot_take_part_is_left_out_everywhere_with_a_note(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    store = ProfileStore(shipped=registry.profile_dirs)
    unknown = user_data_dir() / relative_path("vllm_triton", olmoe, h200)
    unknown.parent.mkdir(parents=True)
    unknown.write_text(sweep_file.read_text().replace("alpha_moe", "vllm_triton"))
    note = "vllm_triton left out: the sweep of vllm_triton for olmoe-1b-7b on h200 has no column that fits"
    assert any(n.startswith(note) for n in load_replay(registry, store, olmoe, h200).notes)
    assert any(n.startswith(note) for n in load_model(registry, store, olmoe, h200)[1])
    with pytest.raises(ProfileError, match="has no column that fits"):
        load_model(registry, store, olmoe, h200, ["vllm_triton"])


def test_recorded_kernels_only(registry: Registry, store: ProfileStore, olmoe: MoEShape, h200: Hardware) -> None:
    with pytest.raises(ProfileError, match="no sweep of vllm_triton for olmoe-1b-7b"):
        load_replay(registry, store, olmoe, h200, ["vllm_triton"])
    assert "vllm_triton" not in load_replay(registry, store, olmoe, h200).kernels


def test_configurations_with_gaps_are_left_out_and_noted(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["batches"][7]["runs_us"][0][3] = None
    sweep_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert replay.times_us.shape == (78, 151)
    assert np.isfinite(replay.times_us).all()
    assert replay.notes == ["alpha_moe: 1 configurations left out, not measured on every batch"]


def test_noise_of_two_runs_made_by_hand() -> None:
    runs = np.array([[[10.0, 12.0], [20.0, 30.0]], [[11.0, 10.0], [20.0, 32.0]]])
    # First batch: the first run's best costs 11 / 10 in the second, the second's 12 / 10 in the first.
    assert selection_noise(runs) == pytest.approx(np.array([[0.1, 0.0], [0.2, 0.0]]))
    choices = np.array([1, 1])
    assert split_half_regret(runs, choices) == pytest.approx(np.array([[10 / 11 - 1, 0.6], [0.0, 0.5]]))
    assert selection_noise(runs[:1]).size == 0


@pytest.fixture
def held_out_file(sweep_file: Path) -> Path:
    """Every third batch is kept for judging; a second run is 2% slower, and its second configuration another 10%."""
    raw = json.loads(sweep_file.read_text())
    raw["runs"].append(raw["runs"][0])
    for i, row in enumerate(raw["batches"]):
        row["split"] = "test" if i % 3 == 0 else "tune"
        row["runs_us"].append([t * (1.122 if j == 1 else 1.02) for j, t in enumerate(row["runs_us"][0])])
    sweep_file.write_text(json.dumps(raw))
    return sweep_file


def test_held_out_batches_are_judged_by_what_the_others_taught(
    registry: Registry, held_out_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    replay = load_replay(registry, ProfileStore([held_out_file]), olmoe, h200, ["alpha_moe"])
    tune, test = replay.of("tune"), replay.of("test")
    assert tune is not None
    assert test is not None
    assert (len(tune.labels), len(test.labels)) == (52, 26)
    assert tune.of("test") is None
    found = compare_recorded(replay)
    assert [(b.tokens, b.routing) for b in found.batches] == test.labels
    chosen = tune.fit().cost(test.histograms).argmin(1)
    assert [b.histogram.config for b in found.batches] == [replay.candidates[c].config.name for c in chosen]
    static = table_choices(static_table(tune.times_us, tune.labels), test.labels)
    assert [b.static.us for b in found.batches] == test.times_us[np.arange(26), static].tolist()
    assert found.noise is not None
    assert found.noise.batches == 26
    assert found.noise.selection.mean == pytest.approx(selection_noise(test.runs_us).mean())
    assert found.noise.regret["static"] == pytest.approx(split_half_regret(test.runs_us, static).mean())
    assert set(found.noise.regret) == set(found.baselines)
    # Dispatching uses the same fit: batches that are kept for judging never enter it.
    model, _ = load_model(registry, ProfileStore([held_out_file]), olmoe, h200, ["alpha_moe"])
    assert model.cost(test.histograms) == pytest.approx(tune.fit().cost(test.histograms))


def test_cells_that_one_run_missed_or_spoilt_have_no_part_in_the_noise(
    registry: Registry, held_out_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    raw = json.loads(held_out_file.read_text())
    rows = [row for row in raw["batches"] if row["split"] == "test"]
    rows[0]["runs_us"][1][5] = None
    best = min(rows[1]["runs_us"][0])
    rows[1]["runs_us"][0] = [best * (1 + i) for i in range(len(rows[1]["runs_us"][0]))]
    rows[1]["runs_us"][1] = [30 * best, *rows[1]["runs_us"][0][1:]]
    rows[2]["runs_us"][1] = None
    held_out_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([held_out_file]), olmoe, h200, ["alpha_moe"]).of("test")
    assert replay is not None
    batches, runs = replay.repeated()
    assert batches.tolist() == [0, 1, *range(3, 26)]
    assert np.argwhere(np.isinf(runs)).tolist() == [[0, 0, 5], [0, 1, 0], [1, 0, 5], [1, 1, 0]]
    assert selection_noise(runs)[:, 1] == pytest.approx(0)  # the best of those that both measured, in either
    found = compare_recorded(load_replay(registry, ProfileStore([held_out_file]), olmoe, h200, ["alpha_moe"]))
    assert found.noise is not None
    assert found.noise.batches == 25
    assert np.isfinite(list(found.noise.regret.values())).all()


def test_a_profile_without_batches_to_fit_on(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    raw = json.loads(sweep_file.read_text())
    for row in raw["batches"]:
        row["split"] = "test"
    sweep_file.write_text(json.dumps(raw))
    store = ProfileStore([sweep_file])
    with pytest.raises(ProfileError, match="no batches to fit on"):
        compare_recorded(load_replay(registry, store, olmoe, h200, ["alpha_moe"]))
    with pytest.raises(ProfileError, match="no batches to fit on"):
        load_model(registry, store, olmoe, h200, ["alpha_moe"])


def test_stages_can_be_judged_alone(registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware) -> None:
    """A whole path beside the stages is what is compared, unless the stages are asked for."""
    raw = json.loads(sweep_file.read_text())
    raw["columns"].append({"stage": "path", "key": "path/alpha_moe/bm8-bn64-wn4-st1", "params": {}})
    for row in raw["batches"]:
        row["runs_us"][0].append(99.0)
    sweep_file.write_text(json.dumps(raw))
    store = ProfileStore([sweep_file])
    path = load_replay(registry, store, olmoe, h200, ["alpha_moe"])
    assert path.stages == ("path",)
    assert path.stages_left_out == {"alpha_moe": []}
    assert path.times_us.tolist() == [[99.0]] * 78
    gemm = load_replay(registry, store, olmoe, h200, ["alpha_moe"], ["gemm"])
    assert gemm.times_us.shape == (78, 152)
    with pytest.raises(ProfileError, match="has no times of combine; it has path, gemm"):
        load_replay(registry, store, olmoe, h200, ["alpha_moe"], ["combine"])


def write_paths(folder: Path, kernel: Simulated, runs: list[list[int]]) -> None:
    """A profile of whole paths of four batches: run r of a batch took 100 (r + 1) + 10 row us, and each configuration
    1 us more than the one before; `runs` says which batches each run measured."""
    configs = kernel.configs(SHAPE, HARDWARE)
    us = {(r, i): [100.0 * (r + 1) + 10 * i + c for c in range(len(configs))] for r, of in enumerate(runs) for i in of}
    rows = [
        MeasuredBatch(
            8, "uniform", [16 - i, i, *[0] * 6], [us.get((r, i)) for r in range(len(runs))], i, "test" if i else "tune"
        )
        for i in range(4)
    ]
    record = SweepRecord(
        FORMAT,
        VERSION,
        HARDWARE.name,
        kernel.name,
        "1",
        ShapeRecord.of(SHAPE),
        [Run(f"2026-11-2{r}", "NVIDIA H200", "580.1", {}, "by hand") for r in range(len(runs))],
        [Column("path", path_key(kernel.name, c.name)) for c in configs],
        [],
        rows,
    )
    make_sweep(record).save(folder / relative_path(kernel.name, SHAPE, HARDWARE))


def test_runs_of_kernels_that_were_measured_at_different_times(tmp_path: Path) -> None:
    """A batch's first run of one kernel stands beside the first of the other, whichever runs these were."""
    kernels = Simulated("one"), Simulated("two")
    write_paths(tmp_path, kernels[0], [[0, 1, 2, 3], [0, 1, 2, 3]])
    write_paths(tmp_path, kernels[1], [[0, 1], [2, 3], [0, 2, 3], [3]])
    registry = Registry(load_entry_points=False)
    registry.kernels = {k.name: k for k in kernels}
    replay = load_replay(registry, ProfileStore([tmp_path]), SHAPE, HARDWARE)
    assert replay.kernels == ["one", "two"]
    first = replay.runs_us[:, :, [0, 6]]
    expected = [
        [[100.0, 100.0], [110.0, 110.0], [120.0, 220.0], [130.0, 230.0]],
        [[200.0, 300.0], [210.0, np.nan], [220.0, 320.0], [230.0, 330.0]],
    ]
    assert np.array_equal(first, expected, equal_nan=True)


def test_runs_that_measured_none_of_the_chosen_batches_do_not_count(tmp_path: Path) -> None:
    """The batch to fit on was measured four times, those to judge on twice."""
    kernel = Simulated()
    write_paths(tmp_path, kernel, [[0], [0], [0, 1, 2, 3], [0, 1, 2, 3]])
    registry = Registry(load_entry_points=False)
    registry.kernels = {kernel.name: kernel}
    replay = load_replay(registry, ProfileStore([tmp_path]), SHAPE, HARDWARE)
    test = replay.of("test")
    assert len(replay.runs_us) == 4
    assert test is not None
    assert test.runs_us[:, :, 0].tolist() == [[310.0, 320.0, 330.0], [410.0, 420.0, 430.0]]


@pytest.mark.slow
def test_choices_that_were_never_timed_are_told(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    static = table_choices(static_table(replay.times_us, replay.labels), replay.labels)
    raw = json.loads(sweep_file.read_text())
    row = next(i for i, (_, kind) in enumerate(replay.labels) if kind != "uniform")
    times = raw["batches"][row]["runs_us"][0]
    times[static[row]] *= -1
    sweep_file.write_text(json.dumps(raw))
    bounded = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert np.argwhere(bounded.bounded).tolist() == [[row, static[row]]]
    assert np.array_equal(bounded.times_us, replay.times_us)
    (note,) = (n for n in compare_recorded(bounded).notes if "never timed" in n)
    assert "1 of static" in note
    assert not any("never timed" in n for n in compare_recorded(replay).notes)


def test_a_long_trace_is_judged_on_batches_spread_over_it(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ramp_moe.evaluation.comparison.STEPS", 4)
    header, batch = {"top_k": 8, "num_experts": 64}, {"tokens": 8, "histogram": [1] * 64}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [header, *[batch] * 10])))
    found = compare_trace(replay, load_trace(tmp_path / "t.jsonl"))
    assert [b.steps for b in found.batches] == [4]
    assert "of each kind 4 batches at most are judged, evenly spread over the trace: 6 are not" in found.notes


def test_batches_of_which_no_path_was_timed_are_not_fitted_to(sweep_file: Path) -> None:
    """And those that were are the sweep's own batches to fit on, not others that stand in their places."""
    raw = json.loads(sweep_file.read_text())
    path = {"stage": "path", "key": "path/alpha_moe/x", "params": {}}
    raw["columns"] = [*raw["columns"][:1], path]
    for i, row in enumerate(raw["batches"]):
        row["split"] = "test" if i % 2 else "tune"
        row["runs_us"] = [[times[0], None if i < 10 else times[1]] for times in row["runs_us"]]
    sweep_file.write_text(json.dumps(raw))
    seen = fitted_on(load_sweep(sweep_file))
    assert {row.split for row in seen.record.batches} == {"tune"}
    assert [row.histogram for row in seen.record.batches] == [row["histogram"] for row in raw["batches"][10::2]]


def test_sizes_count_by_how_often_they_ran(replay: Replay, tmp_path: Path) -> None:
    """A sample says how many batches each stands for; speed-ups are weighted by it."""
    few, many = ([0] * 63 + [8], [4] * 64)

    def speedup(*runs: float) -> float:
        lines = [{"num_experts": 64, "top_k": 8}]
        lines += [{"tokens": sum(h) // 8, "histogram": h, "runs": n} for h, n in zip((few, many), runs, strict=True)]
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        found = compare_trace(replay, load_trace(path))
        assert [b.runs for b in found.batches] == list(runs)
        return found.speedup_over_static.geomean

    alone = speedup(1e9, 1.0), speedup(1.0, 1e9)
    assert speedup(3.0, 1.0) == pytest.approx(alone[0] ** 0.75 * alone[1] ** 0.25, rel=1e-6)


@pytest.mark.parametrize("runs", [0, -1, "many", True, None])
def test_runs_that_are_none(runs: object, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = {"tokens": 1, "histogram": [1, 1], "runs": runs}
    path.write_text(json.dumps({"top_k": 2}) + "\n" + json.dumps(line))
    with pytest.raises(RoutingError, match=r"batch 0 has no tokens and histogram that fit together: .*number of runs"):
        load_trace(path)
