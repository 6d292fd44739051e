"""`ramp-moe check` over simulated kernels: profiles that hold, that shifted as a whole, and that do not hold."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ramp_moe import ProfileStore, Registry, load_sweep
from ramp_moe.cli import gpu
from ramp_moe.dispatch.profile_store import user_data_dir
from ramp_moe.evaluation.repeatability import spread
from ramp_moe.profiler import drift
from ramp_moe.profiler.drift import UNREPEATED, Drift, check_profiles
from ramp_moe.profiler.pool import MAX_LOST
from ramp_moe.profiler.settings import Settings
from simulated_bench import ENVIRONMENT, HARDWARE, SHAPE, Script, Silent, Simulated, SimulatedBench
from simulated_gpu import IDLE, Described, Machine, Unavailable, place

Factor = Callable[[str, int], float]
"""By configuration and tokens, how much longer than when recorded."""


class Elsewhere(SimulatedBench):
    """A machine on which times are others."""

    factor: Factor

    def time(self, kernel: str, config: str, launches: int, patience_us: float) -> list[float]:
        factor = self.factor(config, int(self.histogram.sum()) // SHAPE.top_k)
        return [us * factor for us in super().time(kernel, config, launches, patience_us)]


def elsewhere(script: Script, factor: Factor, shape: Any, hardware: str, kernels: list[str]) -> Elsewhere:
    bench = Elsewhere(script, [Simulated(k) for k in kernels])
    bench.factor = factor
    return bench


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With a profile of "sim" in two runs that differ by about 1%."""
    made = Machine(tmp_path / "calls", monkeypatch)
    made.record(runs=2, noise=0.01)
    return made


def becomes(machine: Machine, factor: Factor, **acts: str) -> None:
    named = {name.replace("_", "/", 1).replace("_", "-"): act for name, act in acts.items()}
    make = functools.partial(elsewhere, Script(machine.log, named), factor)
    machine.patch.setattr(gpu, "_make_bench", make)


def checked(machine: Machine, *args: object, code: int = 0) -> dict[str, Any]:
    result = machine.run("check", "--json", *args)
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["dtype"] == "bf16"
    return found


def refused(machine: Machine, message: str, *args: object) -> None:
    """Nothing was measured for it."""
    result = machine.run("check", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not machine.log.exists()


def test_the_same_machine(machine: Machine) -> None:
    found = checked(machine)
    assert found["verdict"] == "holds"
    assert (found["reasons"], found["remedy"], found["kernels"]) == ([], [], ["sim"])
    assert found["tolerance"] == pytest.approx(0.01, rel=0.9)
    for figure in ("offset", "spread", "loss"):
        assert abs(found[figure]) <= found["tolerance"]
    cells = found["cells"]
    assert found["batches"] == 6
    assert len(cells) == 18
    # one choice on each batch, from the shortest to the longest
    chosen = [c for c in cells if c["chosen"]]
    assert len(chosen) == 6
    assert [c["recorded_us"] for c in chosen] == sorted(c["recorded_us"] for c in chosen)
    assert {c["tokens"] for c in cells} >= {1, 8192}
    # what is only known to be far behind is no rival
    assert not any(c["config"].endswith("slow") for c in cells)


def test_as_the_profile_measured(machine: Machine) -> None:
    found = checked(machine)
    calls = [json.loads(line) for line in machine.log.read_text().splitlines()]
    methods = [c["method"] for c in calls]
    cells = len(found["cells"])
    assert methods[:7] == ["open", "warm", "warm", "warm", "time", "time", "time"]
    assert (methods.count("warm"), methods.count("time")) == (cells, Settings.rounds * cells)
    # rounds are interleaved
    first = [c["config"] for c in calls[4:13]]
    assert first == first[:3] * 3


def test_a_slower_clock(machine: Machine) -> None:
    becomes(machine, lambda config, tokens: 1.3)
    found = checked(machine)
    assert found["verdict"] == "shifted"
    assert found["offset"] == pytest.approx(0.3, abs=0.02)
    assert found["spread"] < found["tolerance"]
    assert found["remedy"] == []
    text = machine.run("check").stdout
    assert "shifted: all times by one factor, the choices still hold" in text


def test_a_kernel_that_got_slower_in_a_region(machine: Machine) -> None:
    becomes(machine, lambda config, tokens: 1.5 if config.startswith("bm64") and tokens >= 128 else 1.0)
    found = checked(machine, code=1)
    assert found["verdict"] == "does not hold"
    assert found["spread"] > found["tolerance"]
    path = place(user_data_dir())
    assert found["remedy"] == [
        f"mv {path} {path}.old",  # the run would be averaged with it
        "ramp-moe profile --model tiny --dtype bf16 --kernel sim",
    ]
    result = machine.run("check")
    assert result.exit_code == 1
    assert "does not hold" in result.stdout
    assert "times changed by different factors" in result.stdout
    assert result.stdout.splitlines()[-2:] == [f"  {command}" for command in found["remedy"]]


def test_choices_that_lose(machine: Machine) -> None:
    """Two configurations change places; the median time does not move."""
    becomes(machine, lambda config, tokens: {"a": 1.2, "b": 1.0}.get(config[-1], 1.0))
    found = checked(machine, code=1)
    assert found["loss"] > found["tolerance"]
    assert found["still_best"] < found["batches"]
    assert any(r.startswith("dispatch's choices lose") for r in found["reasons"])


def test_a_profile_that_ships_is_left_where_it_is(machine: Machine, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    user_data_dir().rename(shipped)
    machine.registry.profile_dirs.append(shipped)
    becomes(machine, lambda config, tokens: 1.5 if tokens >= 128 else 1.0)
    assert checked(machine, code=1)["remedy"] == ["ramp-moe profile --model tiny --dtype bf16 --kernel sim"]


def test_another_version_of_kernel_and_driver(machine: Machine) -> None:
    machine.registry.kernels["sim"] = Simulated(version="2")
    machine.state = replace(IDLE, driver="999.1")
    becomes(machine, lambda config, tokens: 1.5 if tokens >= 128 else 1.0)
    found = checked(machine, code=1)
    changed = {c["what"]: (c["recorded"], c["now"]) for c in found["changes"]}
    assert changed == {"kernel sim": ("1", "2"), "driver": ("580.1", "999.1")}
    # whose profile is not extended, but superseded
    assert found["remedy"] == ["ramp-moe profile --model tiny --dtype bf16 --kernel sim"]
    assert "driver: 580.1 when recorded, 999.1 now" in machine.run("check").stdout


def test_a_choice_that_fails(machine: Machine) -> None:
    chosen = next(c for c in checked(machine)["cells"] if c["chosen"])["config"]
    machine.acts({f"time/{chosen}": "raises"})
    found = checked(machine, code=1)
    assert found["reasons"][0] == f"dispatch would launch sim/{chosen}, which fails here: ValueError: wrong by far"
    failed = {c["config"]: c for c in found["cells"] if c["failed"]}
    assert failed.keys() == {chosen}
    assert failed[chosen]["measured_us"] is None
    text = machine.run("check").stdout
    assert f"sim/{chosen} fails: ValueError: wrong by far" in text


def test_a_rival_that_fails_decides_nothing(machine: Machine) -> None:
    configs = {c["config"] for c in checked(machine)["cells"]}
    chosen = {c["config"] for c in checked(machine)["cells"] if c["chosen"]}
    (rival, *_) = sorted(configs - chosen)
    machine.acts({f"warm/{rival}": "raises"})
    found = checked(machine)
    assert found["verdict"] == "holds"
    assert {c["config"] for c in found["cells"] if c["failed"]} == {rival}


def test_everything_fails(machine: Machine) -> None:
    machine.acts({f"warm/bm{block}-{kind}": "raises" for block in (16, 64) for kind in ("a", "b", "slow")})
    result = machine.run("check")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "none of 18 cells can be measured here (first: ValueError: wrong by far)" in result.stderr
    assert "ramp-moe check-kernel sim" in result.stderr


def test_a_gpu_that_breaks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramp_moe.profiler.pool.MAX_LOST", 2)
    machine.acts({f"warm/bm{block}-{kind}": "breaks the context" for block in (16, 64) for kind in "ab"})
    assert MAX_LOST > 2
    result = machine.run("check")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("nothing is kept of a check")


def test_no_profile(machine: Machine) -> None:
    place(user_data_dir()).unlink()
    refused(machine, "no sweep of sim for tiny")
    refused(machine, "no sweep of sim for tiny", "--kernel", "sim")


def test_kernels_that_cannot_run_here(machine: Machine) -> None:
    machine.registry.kernels["described"] = Described()
    refused(machine, "kernel described cannot be measured for tiny (bf16) on h200: it is only", "--kernel", "described")
    machine.registry.kernels["sim"] = Unavailable()
    refused(machine, "sim left out: its package is missing: pip install it")
    refused(machine, "kernel sim cannot be measured for tiny (bf16) on h200: its package is missing", "--kernel", "sim")


def test_no_gpu(machine: Machine) -> None:
    machine.state = replace(IDLE, name="NVIDIA GeForce")
    refused(machine, "no constants for GPU 'NVIDIA GeForce'")


def test_profiles_that_are_of_no_use(machine: Machine) -> None:
    path = place(user_data_dir())
    sweep = load_sweep(path)
    sweep.only(["schedule"]).save(path)
    refused(machine, "the recorded times of sim are of schedule, not of whole paths", "--kernel", "sim")
    sweep.save(path)
    path.write_text(path.read_text().replace('"split":"tune"', '"split":"test"'))
    refused(machine, "the profile of sim has no batches to fit on; run `ramp-moe profile`")
    path.write_text("{")
    refused(machine, f"note: passed over: {path} is corrupt or truncated")


def test_batches_that_cannot_be_drawn_again(machine: Machine) -> None:
    path = place(user_data_dir())
    raw = json.loads(path.read_text())
    for row in raw["batches"]:
        row["seed"] = None
    path.write_text(json.dumps(raw))
    refused(machine, "none of its batches can be drawn again; run `ramp-moe profile`")
    for row in raw["batches"]:
        row |= {"seed": 1, "routing": "unheard-of"}
    path.write_text(json.dumps(raw))
    refused(machine, "none of its batches can be drawn again; run `ramp-moe profile`")


def test_a_profile_of_one_run(machine: Machine) -> None:
    place(user_data_dir()).unlink()
    assert machine.run("profile", "--minutes", 0).exit_code == 0
    found = checked(machine)
    assert (found["verdict"], found["tolerance"]) == ("holds", pytest.approx(UNREPEATED))
    assert found["notes"] == ["the profile of sim is of one run: how well it repeats was assumed, not measured"]


def test_a_busy_gpu(machine: Machine) -> None:
    machine.state = replace(IDLE, processes=((4321, 2**30),))
    assert "process 4321" in checked(machine)["notes"][0]


def test_two_kernels(machine: Machine) -> None:
    """The fastest of each is measured on every batch, whichever dispatch would choose."""
    raw = place(user_data_dir()).read_text().replace("path/sim/", "path/other/").replace('"sim"', '"other"')
    place(user_data_dir(), "other").parent.mkdir()
    place(user_data_dir(), "other").write_text(raw)
    machine.registry.kernels["other"] = Simulated("other")
    found = checked(machine)
    assert found["kernels"] == ["sim", "other"]
    by_batch: dict[float, set[str]] = {}
    for c in found["cells"]:
        by_batch.setdefault((c["tokens"], c["routing"]), set()).add(c["kernel"])
    assert all(kernels == {"sim", "other"} for kernels in by_batch.values())
    assert checked(machine, "--kernel", "other")["kernels"] == ["other"]


def test_ctrl_c(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drift, "_measure", interrupt)
    result = machine.run("check")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted: nothing is kept of a check"


def test_from_python(machine: Machine) -> None:
    script = Script(machine.log)
    found = check_profiles(
        machine.registry,
        ProfileStore(),
        SHAPE,
        HARDWARE,
        ["sim"],
        ENVIRONMENT,
        functools.partial(SimulatedBench, script, [Simulated()]),
        Silent(),
    )
    assert isinstance(found, Drift)
    assert found.verdict == "holds"
    assert {c.what for c in found.changes} >= {"its UUID"}


def test_the_assumed_tolerance_is_that_of_the_shipped_profiles(registry: Registry, shipped: ProfileStore) -> None:
    worst = 0.0
    for folder in shipped.folders:
        for path in folder.glob("h200/*/E*.json"):
            found = spread(load_sweep(path), Settings.close)
            worst = max(worst, found[-1].p95 if found else 0.0)
    assert 0.5 * UNREPEATED < worst < UNREPEATED
