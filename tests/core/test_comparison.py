"""Evaluation on the shipped measurements: the figures are recomputed here and must not get worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import RECORDED
from ramp_moe import Hardware, MoEShape, ProfileError, ProfileStore, Registry, RoutingError, load_trace
from ramp_moe.comparison import compare_recorded, compare_trace
from ramp_moe.evaluation import (
    DEALS,
    Summary,
    cross_validated_choices,
    folds,
    nearest_batch_choices,
    regret,
    single_choices,
    static_choices,
    static_table,
    table_choice,
)
from ramp_moe.replay import Replay, load_model, load_replay
from ramp_moe.store import relative_path, user_data_dir


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
    static = static_choices(times, labels)
    assert static.tolist() == [0, 0, 1, 1, 1]
    assert regret(times, static).tolist() == [0, 1, 0, 1, 0.25]
    assert nearest_batch_choices(times, labels).tolist() == [0, 0, 0, 0, 0]
    assert table_choice({1: 5, 9: 6}, 5) == 5
    assert Summary.of(regret(times, static)) == Summary(0.45, 0.25, pytest.approx(1.0), 1.0)
    with pytest.raises(ProfileError, match="no batch with uniform routing"):
        static_table(times[1:2], labels[1:2])


def test_one_configuration_is_chosen_without_the_row() -> None:
    times = np.array([[1.0, 2]] * 5 + [[1.0, 1000]])
    assert single_choices(times).tolist() == [0] * 6


# mean regret: retrofitted (cross-validated), static. Rounded up; a better model lowers them.
EXPECTED = {
    "olmoe-1b-7b": (0.0265, 0.061),
    "qwen3-30b-a3b": (0.0275, 0.066),
    "deepseek-v3-tp8": (0.039, 0.075),
    "mixtral-8x7b-tp4": (0.0275, 0.067),
}


@pytest.mark.parametrize("model", RECORDED)
def test_regret_on_the_shipped_sweeps(registry: Registry, store: ProfileStore, h200: Hardware, model: str) -> None:
    replay = load_replay(registry, store, registry.shape(model, "fp8"), h200, ["alpha_moe"])
    found = compare_recorded(replay)
    retrofitted, static = EXPECTED[model]
    assert found.baselines["retrofitted"].mean < retrofitted
    assert static - 0.002 < found.baselines["static"].mean < static
    assert found.baselines["retrofitted"].mean < min(
        s.mean for name, s in found.baselines.items() if name != "retrofitted"
    )
    assert found.speedup_over_static.geomean > 1.025


@pytest.mark.parametrize("model", RECORDED)
def test_the_default_form_is_no_worse_than_the_papers(
    registry: Registry, store: ProfileStore, h200: Hardware, model: str
) -> None:
    replay = load_replay(registry, store, registry.shape(model, "fp8"), h200, ["alpha_moe"])
    mean = {form: compare_recorded(replay, form).baselines["retrofitted"].mean for form in ("paper", "active")}
    assert mean["active"] < mean["paper"]


def test_comparison_adds_up(replay: Replay) -> None:
    found = compare_recorded(replay).as_dict()
    times = replay.times_us
    assert found["mode"] == "replay"
    assert len(found["batches"]) == 78
    for i, batch in enumerate(found["batches"]):
        assert batch["best"]["us"] == times[i].min()
        assert batch["speedup"] == batch["static"]["us"] / batch["retrofitted"]["us"]
        assert batch["regret"] == batch["retrofitted"]["us"] / batch["best"]["us"] - 1
        assert batch["regret"] >= 0
    # The table shows the first way of dealing the folds, the figures pool all of them.
    deals = [cross_validated_choices(replay.histograms, replay.fit, seed=deal) for deal in range(DEALS)]
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
    assert found["stages_left_out"] == {"alpha_moe": ["quantise", "schedule", "zero"]}


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
    raw["rows"].append(raw["rows"][4] | {"median_us": [2 * t for t in raw["rows"][4]["median_us"]]})
    sweep_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert replay.notes == []
    assert replay.times_us.shape == (79, 152)
    assert replay.times_us[78].tolist() == (2 * replay.times_us[4]).tolist()


def test_a_column_of_another_kind_drops_candidates_with_a_note(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["columns"].append({"stage": "schedule", "key": "schedule/bm8", "params": {}})
    for row in raw["rows"]:
        row["median_us"].append(3.0)
    sweep_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert len(replay.candidates) == 10
    assert "142 of 152 configurations left out" in replay.notes[0]


def test_an_unasked_kernel_that_cannot_take_part_is_left_out_everywhere_with_a_note(
    registry: Registry, olmoe: MoEShape, h200: Hardware
) -> None:
    store = ProfileStore(shipped=registry.profile_dirs)
    broken = user_data_dir() / relative_path("vllm_triton", olmoe, h200)
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    note = f"vllm_triton left out: {broken} is corrupt or truncated"
    assert any(n.startswith(note) for n in load_replay(registry, store, olmoe, h200).notes)
    assert any(n.startswith(note) for n in load_model(registry, store, olmoe, h200)[1])
    with pytest.raises(ProfileError, match="is corrupt or truncated"):
        load_model(registry, store, olmoe, h200, ["vllm_triton"])


def test_recorded_kernels_only(registry: Registry, store: ProfileStore, olmoe: MoEShape, h200: Hardware) -> None:
    with pytest.raises(ProfileError, match="no sweep of vllm_triton for olmoe-1b-7b"):
        load_replay(registry, store, olmoe, h200, ["vllm_triton"])
    assert "vllm_triton" not in load_replay(registry, store, olmoe, h200).kernels


def test_configurations_with_gaps_are_left_out_and_noted(
    registry: Registry, sweep_file: Path, olmoe: MoEShape, h200: Hardware
) -> None:
    raw = json.loads(sweep_file.read_text())
    raw["rows"][7]["median_us"][3] = None
    sweep_file.write_text(json.dumps(raw))
    replay = load_replay(registry, ProfileStore([sweep_file]), olmoe, h200, ["alpha_moe"])
    assert replay.times_us.shape == (78, 151)
    assert np.isfinite(replay.times_us).all()
    assert replay.notes == ["alpha_moe: 1 configurations left out, not measured on every batch"]
