"""The study of unseen routings: what it measures, over simulated kernels, and what its tables say of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ramp_moe.dispatch
from pages import UNMEASURED
from ramp_moe import Dispatcher, KernelError, ProfileError, Registry, expert_histogram, generate
from ramp_moe.profiler.plan import TEST_KINDS
from ramp_moe.spec.routing import TUNE_KINDS
from simulated_bench import SHAPE
from simulated_gpu import Machine
from studies.heldout import draws, measure, tables


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With a profile of "sim" and files of the study in tmp_path: batches of 1 and 16 tokens."""
    made = Machine(tmp_path / "calls", monkeypatch)
    made.record(noise=0.01)
    made.acts({}, noise=0.01)
    for module in (measure, ramp_moe.dispatch.dispatcher):
        monkeypatch.setattr(module, "get_registry", lambda: made.registry)
    for name, value in {"HERE": tmp_path, "TOKENS": (1, 16), "NEAREST": 1}.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(tables, "load", functools.partial(tables.load, models=("tiny",)))
    return made


def trace_of(tmp_path: Path, tokens: int = 40) -> Path:
    path = tmp_path / "trace.json"
    ids = generate("zipf2.0", tokens, SHAPE.num_experts, SHAPE.top_k, 7)
    path.write_text(json.dumps({"num_experts": SHAPE.num_experts, "topk_ids": ids.tolist()}))
    return path


def record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "tiny-bf16.json").read_text())
    return found


def groups(tmp_path: Path) -> list[tuple[int, str]]:
    return [(g["tokens"], g["kind"]) for g in record(tmp_path)["groups"]]


def test_the_new_kinds_are_new() -> None:
    known = {*TUNE_KINDS, *TEST_KINDS}
    assert {"uniform", "zipf1.2"} == known.intersection(draws.KINDS)
    assert draws.TRACE not in known
    assert draws.JUDGED >= 5


def test_sticky_tokens_keep_experts() -> None:
    ids = draws.sticky(400, 64, 8, 0.9, 1)
    assert (draws.sticky(400, 64, 8, 0.9, 1) == ids).all()
    assert (draws.sticky(400, 64, 8, 0.9, 2) != ids).any()
    assert all(len(set(token)) == 8 for token in ids.tolist())
    assert ((ids >= 0) & (ids < 64)).all()
    same = [len(set(a) & set(b)) / 8 for a, b in zip(ids.tolist(), ids[1:].tolist(), strict=False)]
    assert np.mean(same) == pytest.approx(0.9 + 0.1 * 0.1, abs=0.02)
    few, many = (expert_histogram(i, 64) for i in (ids[:16], generate("uniform", 16, 64, 8, 1)))
    assert np.count_nonzero(few) < np.count_nonzero(many)


def test_a_trace_is_tuned_on_one_half_and_judged_on_the_other() -> None:
    ids = np.arange(80).reshape(40, 2)
    trace = measure.Trace(ids, 8)
    found = draws.draws("trace", 4, SHAPE, trace)
    assert [d.split for d in found] == ["tune"] * 5 + ["judge"] * 5
    assert all(d.topk_ids.shape == (4, 2) for d in found)
    assert all((d.topk_ids < 40).all() == (d.split == "tune") for d in found)
    assert found[0].topk_ids[:, 0].tolist() == [0, 2, 4, 6]
    assert found[1].topk_ids[:, 0].tolist() == [2, 12, 22, 32]
    assert draws.kinds(4, SHAPE, trace) == (*draws.KINDS, "trace")
    assert draws.kinds(4, SHAPE, measure.Trace(ids, 9)) == draws.kinds(4, SHAPE, None) == draws.KINDS
    assert draws.kinds(1, SHAPE, trace) == ("uniform",)
    with pytest.raises(draws.RoutingError, match="64 tokens cannot be cut from half a trace of 20"):
        draws.draws("trace", 64, SHAPE, trace)


def test_what_is_measured(machine: Machine, tmp_path: Path) -> None:
    measure.main(["tiny"], "bf16", [], trace_of(tmp_path), 60)
    found = record(tmp_path)
    assert groups(tmp_path) == [(1, "uniform"), *((16, kind) for kind in ("uniform", "zipf1.2", "sticky0.9", "trace"))]
    assert (found["model"], found["dtype"], found["device"]) == ("tiny", "bf16", "h200")
    assert found["kernels"] == {"sim": "1"}
    assert (found["runs"][0]["gpu"], found["runs"][0]["device_name"]) == ("GPU-01234567", "NVIDIA H200")
    dispatcher = Dispatcher.for_model("tiny", "h200", ["sim"], "bf16")
    for group in found["groups"]:
        configs = next(s["configs"] for s in found["sizes"] if s["tokens"] == group["tokens"])
        assert len(group["draws"]) == 10
        for draw in group["draws"]:
            assert sum(draw["histogram"]) == group["tokens"] * SHAPE.top_k
            assert dispatcher.choose(np.array(draw["histogram"])).candidate.name in configs
            assert np.array(draw["us"]).shape == (2, len(configs))
    # at least 20 launches of each half, five at a time
    calls = [json.loads(line) for line in machine.log.read_text().splitlines()]
    *_, last = (i for i, c in enumerate(calls) if c["method"] == "open")
    assert len(calls) - last - 1 == 2 * 4 * len(configs)
    cases = tables.Study.of(tmp_path).cases
    assert [(g.tokens, g.kind) for g in cases["tiny bf16", ("sim",)]] == groups(tmp_path)
    assert "| tiny bf16 | 2" in tables.sources(tables.Study.of(tmp_path))
    measure.main(["tiny"], "bf16", [], tmp_path / "trace.json", 60)  # all is there
    assert len(machine.log.read_text().splitlines()) == len(calls)


def test_it_goes_on(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last group that was kept, which stays as it was; a trace that comes later asks for its size anew."""
    measured, count = measure.Study.measured, [0]

    def breaks(*args: Any) -> Any:
        count[0] += 1
        if count[0] > 25:
            raise KeyboardInterrupt
        return measured(*args)

    with monkeypatch.context() as patch:
        patch.setattr(measure.Study, "measured", breaks)
        with pytest.raises(KeyboardInterrupt):
            measure.main(["tiny"], "bf16", [], None, 60)
    first = record(tmp_path)
    assert groups(tmp_path) == [(1, "uniform"), (16, "uniform")]
    measure.main(["tiny"], "bf16", [], None, 60)
    second = record(tmp_path)
    assert second["groups"][:2] == first["groups"]
    assert second["sizes"] == first["sizes"]
    assert groups(tmp_path) == [(1, "uniform"), (16, "uniform"), (16, "zipf1.2"), (16, "sticky0.9")]
    assert [g["run"] for g in second["groups"]] == [0, 0, 1, 1]
    measure.main(["tiny"], "bf16", [], trace_of(tmp_path), 60)
    third = record(tmp_path)
    assert third["groups"][0] == second["groups"][0]
    assert [g["run"] for g in third["groups"]] == [0, 2, 2, 2, 2]
    measure.main(["tiny"], "bf16", [], None, 60)
    assert record(tmp_path) == third


def test_time_is_up(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure.main(["tiny"], "bf16", [], None, 0)
    assert not (tmp_path / "tiny-bf16.json").exists()
    assert "tiny-bf16: out of time, 4 groups left: the same command goes on" in capsys.readouterr().err


def test_what_cannot_be_compiled(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure.main(["tiny"], "bf16", [], None, 60)
    (size,) = (s for s in record(tmp_path)["sizes"] if s["tokens"] == 16)
    (tmp_path / "tiny-bf16.json").unlink()
    machine.acts({f"warm/{size['configs'][0].split('/')[1]}": "raises"})
    with pytest.raises(KernelError, match="which dispatch chooses, cannot be compiled"):
        measure.main(["tiny"], "bf16", [], None, 60)
    assert "left out: ValueError: wrong by far" in capsys.readouterr().err


def test_another_profile(machine: Machine, tmp_path: Path) -> None:
    measure.main(["tiny"], "bf16", [], None, 60)
    path = tmp_path / "tiny-bf16.json"
    path.write_text(path.read_text().replace('"sim":"1"', '"sim":"2"'))
    with pytest.raises(ProfileError, match=r"tiny-bf16\.json was measured with other kernels; move it away"):
        measure.main(["tiny"], "bf16", [], None, 60)


MODEL, TOKENS = "mixtral-8x7b-tp4", 64


def made_up(registry: Registry) -> dict[str, Any]:
    """Two kinds of one histogram, and two configurations: dispatch's choice, and the better one on "uniform"."""
    shape = registry.shape(MODEL, "fp8")
    histogram = expert_histogram(generate("uniform", TOKENS, shape.num_experts, shape.top_k, 5), shape.num_experts)
    dispatcher = Dispatcher.for_model(MODEL, "h200", ["triton"])
    chosen = dispatcher.choose(histogram).candidate.name
    other = next(c.name for c in dispatcher.model.candidates if c.name != chosen)

    def draw(split: str, *us: list[float]) -> dict[str, Any]:
        return {"split": split, "seed": 1, "histogram": histogram.tolist(), "us": us}

    us = {
        "uniform": ([100.0, 90.0], [102.0, 90.0], [100.0, 110.0]),
        "zipf1.2": ([100.0, 200.0], [50.0, 100.0], [50.0, 100.0]),
    }
    return {
        "model": MODEL, "dtype": "fp8", "device": "h200", "kernels": {"triton": "1"},
        "runs": [{"measured": "2026-11-22T00:00:00+00:00", "device_name": "NVIDIA H200", "gpu": "GPU-0"}],
        "sizes": [{"tokens": TOKENS, "kinds": list(us), "configs": [chosen, other]}],
        "groups": [
            {"tokens": TOKENS, "kind": kind, "run": 0, "draws": [draw("tune", tune, tune), draw("judge", *halves)]}
            for kind, (tune, *halves) in us.items()
        ],
    }  # fmt: skip


def test_the_figures(registry: Registry, tmp_path: Path) -> None:
    """On "uniform" the choice takes 102 and 100 us in the two halves, the other one 90 and 110: 101 and 100 in all.
    Over all kinds the choice is the best on the tune draws, over its own kind the other one."""
    (tmp_path / f"{MODEL}-fp8.json").write_text(json.dumps(made_up(registry)))
    study = tables.Study.of(tmp_path)
    uniform, zipf = study.cases[f"{MODEL} fp8", ("triton",)]
    assert uniform.slower == zipf.slower == zipf.slower_than_own == 0
    assert uniform.slower_than_own == pytest.approx(0.01)
    assert uniform.regret.tolist() == pytest.approx([0.01])
    assert sorted(uniform.split_half.ravel().tolist()) == pytest.approx([100 / 110 - 1, 0])
    assert zipf.regret.tolist() == [0]
    mean = f"{(100 / 110 - 1) / 4:.2%}"
    assert f"| {MODEL} fp8 | triton | 2 | 0.50% | 0.95% | 1.00% | {mean} |" in tables.regrets(study)
    assert f"| {MODEL} fp8 | triton | 2 | +0.00% | +0.00% | 0 | +0.50% | +1.00% | 0 |" in tables.static(study)
    assert f"| triton | {(100 / 110 - 1) / 2:.2%} | 0.00% | - | - |" in tables.by_kind(study)
    assert tables.worst(study).splitlines()[2] == f"| {MODEL} fp8 | triton | 64 | uniform | +0.00% | +1.00% |"
    assert "| largest regret of a batch | 1.00% | at most 10.00% | yes |" in tables.claims(study)
    assert "all kernels together" not in tables.claims(study)
    assert f"| {MODEL} fp8 | 2026-11-22T00:00 NVIDIA H200 GPU-0 | triton 1 | 2 | 2 | 0 |" in tables.sources(study)


def test_a_claim_that_does_not_hold(registry: Registry, tmp_path: Path) -> None:
    found = made_up(registry)
    found["groups"][0]["draws"][1]["us"] = [[130.0, 100.0]] * 2
    (tmp_path / f"{MODEL}-fp8.json").write_text(json.dumps(found))
    study = tables.Study.of(tmp_path)
    assert "| largest regret of a batch | 30.00% | at most 10.00% | no |" in tables.claims(study)
    assert "tuned on its own kind | 30.00% | at most 2.00% | no |" in tables.claims(study)
    assert "tuned on all kinds | 0.00% | at most 2.00% | yes |" in tables.claims(study)
    assert f"| {MODEL} fp8 | triton | 2 | +0.00% | +0.00% | 0 | +15.00% | +30.00% | 1 |" in tables.static(study)


def test_a_choice_that_was_not_measured(registry: Registry, tmp_path: Path) -> None:
    found = made_up(registry)
    found["sizes"][0]["configs"][0] = "triton/gone"
    (tmp_path / f"{MODEL}-fp8.json").write_text(json.dumps(found))
    with pytest.raises(ProfileError, match="64 tokens, uniform: no choice was timed; measure again"):
        tables.Study.of(tmp_path)
    found["device"] = "h100-sxm"
    (tmp_path / f"{MODEL}-fp8.json").write_text(json.dumps(found))
    with pytest.raises(ProfileError, match=r"was measured on h100-sxm, the tables are of h200; move it"):
        tables.Study.of(tmp_path)


def test_nothing_is_measured(tmp_path: Path) -> None:
    assert {make() for make in tables.tables(tmp_path).values()} == {UNMEASURED}
