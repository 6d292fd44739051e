"""`ramp-moe compare --live` over simulated kernels and a GPU that exists in its state alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from ramp_moe import load_sweep
from ramp_moe.cli import compare as command
from ramp_moe.cli import gpu
from ramp_moe.dispatch.profile_store import user_data_dir
from ramp_moe.profiler import live
from ramp_moe.profiler.gpu import GpuState
from ramp_moe.profiler.live import FIRST_SEED
from ramp_moe.profiler.plan import held_out
from simulated_bench import SHAPE, Simulated
from simulated_gpu import IDLE, Described, Machine, Unavailable, place

HELD_OUT = held_out(SHAPE, FIRST_SEED)[:10]
"""Of the 48, for the tests' sake."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With a profile of "sim"."""
    made = Machine(tmp_path / "calls", monkeypatch)
    monkeypatch.setattr(live, "held_out", lambda shape, first_seed: HELD_OUT)
    made.record()
    return made


def run(machine: Machine, *args: object) -> Result:
    return machine.run("compare", "--live", *args)


def refused(machine: Machine, message: str, *args: object) -> None:
    """Nothing was measured for it."""
    result = run(machine, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not machine.log.exists()


def record_other(kernel: Simulated, machine: Machine) -> Path:
    """A profile of "other", the times of "sim", and this kernel registered under that name."""
    raw = place(user_data_dir()).read_text().replace("path/sim/", "path/other/").replace('"sim"', '"other"')
    path = place(user_data_dir(), "other")
    path.parent.mkdir()
    path.write_text(raw)
    machine.registry.kernels["other"] = kernel
    return path


def test_what_it_prints(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first run compiled, the second need not."""
    monkeypatch.setattr(gpu, "default_warmers", lambda: 2)
    machine.registry.kernels["described"] = Described()  # not recorded: not worth a word
    machine.acts({}, noise=0.02)
    result = run(machine, "--minutes", 2)
    assert result.exit_code == 0, result.output
    launches = 5 + 2 * len({b.num_tokens for b in HELD_OUT})
    phases = [
        f"compile: {launches} launches",
        "check: 5 configurations",
        f"measure: {len(HELD_OUT)} batches at most",
    ]
    assert result.stderr.splitlines() == ["run 1 of 2", *phases, "run 2 of 2", *phases[1:]]
    assert "MEASURED on this machine's GPU just now; the cost model was fitted to: sim 1 on" in result.stdout
    assert f"over {len(HELD_OUT)} batches" in result.stdout
    assert "noise of measuring: choosing on one run" in result.stdout
    assert len(load_sweep(place(user_data_dir())).record.runs) == 1


def test_json_html_and_trace(machine: Machine, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    trace.write_text(json.dumps({"num_experts": 8, "topk_ids": [[i % 8, (i + 3) % 8] for i in range(70)]}))
    result = run(machine, "--json", "--html", page, "--trace", trace)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["mode"], found["kernels"], found["stages"]) == ("live", ["sim"], ["path"])
    assert found["dtype"] == "bf16"
    of_trace = {(b["routing"], b["tokens"]) for b in found["batches"]} - {(b.routing, b.num_tokens) for b in HELD_OUT}
    assert of_trace == {*(("trace decode", n) for n in (1, 4, 16, 64)), ("trace prefill", 64)}
    assert all(b["best"] is not None and b["regret"] is not None for b in found["batches"])
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "MEASURED on this machine&#x27;s GPU just now" in text


def test_usage(machine: Machine) -> None:
    for args, message in (
        (("--minutes", 3), "--minutes limits a live measurement: give --live, too"),
        (("--live", "--stage", "gemm"), "--live measures whole paths: leave out --stage"),
        (("--live", "--minutes", -1), "is not in the range x>=0"),
    ):
        result = machine.run("compare", *args)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not machine.log.exists()


def test_the_device_is_this_machines(machine: Machine) -> None:
    refused(machine, "this machine's GPU is h200 (NVIDIA H200), not b200; name --device h200", "--device", "b200")
    refused(machine, "unknown device 'h2000'; did you mean 'h200'", "--device", "h2000")
    assert run(machine, "--device", "auto", "--minutes", 0).exit_code == 0
    machine.log.unlink()
    machine.state = replace(IDLE, name="NVIDIA B200")
    refused(machine, "this machine's GPU is b200 (NVIDIA B200), not h200; name --device b200")
    refused(machine, "no sweep of sim for tiny", "--device", "b200")


def test_kernels_that_cannot_run_here(machine: Machine) -> None:
    record_other(Unavailable("other"), machine)
    result = run(machine, "--minutes", 0, "--json")
    assert result.stderr.splitlines()[0] == "other left out: its package is missing: pip install it"
    assert json.loads(result.stdout)["kernels"] == ["sim"]
    machine.log.unlink()
    refused(
        machine, "kernel other cannot be measured for tiny (bf16) on h200: its package is missing", "--kernel", "other"
    )
    del machine.registry.kernels["sim"]
    refused(machine, "no kernel can be measured for tiny (bf16) on h200: other left out: its package is missing")


def test_kernels_that_are_asked_for(machine: Machine) -> None:
    record_other(Simulated("other", slower=0.5), machine)
    both = json.loads(run(machine, "--minutes", 0, "--json").stdout)
    assert sorted(both["kernels"]) == ["other", "sim"]
    one = json.loads(run(machine, "--minutes", 0, "--json", "--kernel", "other").stdout)
    assert one["kernels"] == ["other"]
    machine.log.unlink()
    machine.registry.kernels |= {"described": Described(), "new": Simulated("new")}
    refused(machine, "kernel described cannot be measured for tiny (bf16) on h200: it is only", "--kernel", "described")
    refused(machine, "no sweep of new for tiny", "--kernel", "new")


def test_profiles_that_are_of_no_use(machine: Machine) -> None:
    path = record_other(Simulated("other"), machine)
    load_sweep(path).only(["schedule"]).save(path)
    reason = f"other left out: {path} has no times of whole paths; run `ramp-moe profile`"
    result = run(machine, "--minutes", 0)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == reason
    machine.log.unlink()
    refused(machine, "the recorded times of other are of schedule, not of whole paths", "--kernel", "other")
    path.write_text("{")
    result = run(machine, "--minutes", 0)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"note: passed over: {path} is corrupt or truncated")
    machine.log.unlink()
    place(user_data_dir()).unlink()
    refused(machine, f"note: passed over: {path} is corrupt or truncated")
    path.unlink()
    refused(machine, "no sweep of sim or other for tiny")


@pytest.mark.parametrize(
    ("state", "args", "message"),
    [
        (replace(IDLE, used_bytes=99 * 2**30), (), "tiny bf16 needs"),
        (replace(IDLE, name="NVIDIA GeForce"), (), "no constants for GPU 'NVIDIA GeForce'"),
        (IDLE, ("--html", "/"), "it is a folder"),
        (IDLE, ("--form", "ative"), "did you mean 'active'"),
        (IDLE, ("--trace", "/nowhere.json"), "cannot read trace /nowhere.json"),
    ],
)
def test_errors_before_anything_is_measured(
    machine: Machine, state: GpuState, args: tuple[str, ...], message: str
) -> None:
    machine.state = state
    refused(machine, message, *args)


def test_a_busy_gpu(machine: Machine) -> None:
    machine.state = replace(IDLE, processes=((4321, 2**30),))
    result = run(machine, "--minutes", 0, "--json")
    assert "warning: NVIDIA H200 is in use by others (process 4321" in result.stderr
    assert "process 4321" in json.loads(result.stdout)["notes"][0]


def test_the_bar_counts_the_minutes_of_a_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert "2.5 minutes left" in run(machine).stderr
    assert "30.0 minutes left" in run(machine, "--minutes", 60).stderr


def test_ctrl_c(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, done: int, doing: str, spent: float) -> None:
        if doing.startswith("batch 3"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Display, "at", interrupt)
        result = run(machine)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted: nothing is kept of a live comparison"
    monkeypatch.setattr(command, "compare_live", pytest.fail)
    assert machine.run("compare").exit_code == 0
