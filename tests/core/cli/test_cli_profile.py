"""`ramp-moe profile` over simulated kernels and a GPU that exists in its state alone."""

from __future__ import annotations

import copy
import json
import re
import types
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from ramp_moe import HardwareError, Registry, load_sweep
from ramp_moe.cli import gpu, main
from ramp_moe.cli import profile as command
from ramp_moe.dispatch.profile_store import user_data_dir
from ramp_moe.profiler.gpu import GpuState
from ramp_moe.profiler.journal import journal_path
from ramp_moe.spec.kernel import version_of
from simulated_bench import HARDWARE, SHAPE
from simulated_gpu import IDLE, Described, Machine, Unavailable, place


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "calls", monkeypatch)


def run(machine: Machine, *args: object) -> Result:
    return machine.run("profile", "--minutes", 0, *args)


def test_what_it_prints(machine: Machine) -> None:
    machine.registry.kernels |= {"described": Described(), "other": Unavailable("other")}
    machine.acts({"check/bm64-b": "raises"})
    result = run(machine)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[:2] == [
        "described left out: it is only described; there is nothing to launch",
        "other left out: its package is missing: pip install it",
    ]
    assert result.stderr.splitlines()[-3:] == [
        "check: 6 configurations",
        "probe: 8 batches",
        "measure: 138 batches at most",
    ]
    assert "tiny (bf16) on h200: 8 of 138 batches" in result.stdout
    assert str(place(user_data_dir())) in result.stdout.replace("\n", "")
    assert "sim/bm64-b: fails its check: ValueError: wrong by far" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: ramp-moe compare --model tiny --dtype bf16 --device h200"
    (recorded,) = load_sweep(place(user_data_dir())).record.runs
    assert (recorded.device_name, recorded.driver, recorded.gpu) == ("NVIDIA H200", "580.1", "GPU-01234567")
    assert {"python", "torch", "cuda", "ramp-moe"} <= recorded.software.keys()
    assert recorded.notes == []
    assert load_sweep(place(user_data_dir())).stages == ("path",), "a short run has time for no more"


@pytest.mark.parametrize("version", [OSError("gone"), "", None, 3], ids=repr)
def test_a_kernel_without_a_version_is_left_out_and_stops_no_other(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, version: object
) -> None:
    """A profile must say which code was measured."""

    def say(self: object) -> object:
        if isinstance(version, Exception):
            raise version
        return version

    kernel = machine.registry.kernels["sim"]
    nameless = type("Nameless", (type(kernel),), {"version": say})
    machine.registry.kernels["nameless"] = other = copy.copy(kernel)
    other.__class__ = nameless
    monkeypatch.setattr(other, "name", "nameless")
    result = run(machine)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("nameless left out: ")]
    assert "broken: version() " in line
    asked = run(machine, "--kernel", "nameless")
    assert asked.exit_code == 2
    assert "kernel nameless cannot be measured" in asked.stderr
    assert "Traceback" not in asked.output


def test_json(machine: Machine, tmp_path: Path) -> None:
    machine.registry.kernels["described"] = Described()
    machine.acts({"check/bm64-b": "raises"})
    result = run(machine, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found.pop("seconds") > 0
    assert found == {
        "model": "tiny",
        "dtype": "bf16",
        "device": "h200",
        "gpu": "GPU-01234567",
        "batches": 8,
        "planned": 138,
        "profiles": [
            {
                "kernel": "sim",
                "path": str(place(tmp_path / "out")),
                "run": 1,
                "batches": 8,
                "configs": 4,
                "failed": {"fails its check: ValueError: wrong by far": ["bm64-b"]},
                "pruned": ["bm16-slow"],
                "superseded": None,
            }
        ],
        "notes": ["described left out: it is only described; there is nothing to launch"],
    }
    shown = run(machine, "--output", tmp_path / "out")
    assert f"--device h200 --profile {tmp_path / 'out'}" in shown.stdout
    assert len(load_sweep(place(tmp_path / "out")).record.runs) == 2


def test_a_busy_gpu(machine: Machine) -> None:
    machine.state = replace(IDLE, processes=((4321, 2**30),))
    result = run(machine, "--json")
    assert "warning: NVIDIA H200 is in use by others (process 4321" in result.stderr
    (note,) = load_sweep(place(user_data_dir())).record.runs[0].notes
    assert "process 4321" in note
    assert json.loads(result.stdout)["notes"] == [note]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(main, ["profile", "--model", "olmoe-1b-7b"])
    assert result.exit_code == 2
    assert "cannot run nvidia-smi" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("state", "args", "message"),
    [
        (replace(IDLE, used_bytes=99 * 2**30), (), "tiny bf16 needs"),
        (replace(IDLE, name="NVIDIA GeForce"), (), "no constants for GPU 'NVIDIA GeForce'"),
        (IDLE, ("--kernel", "simm"), "unknown kernel 'simm'; did you mean 'sim'?"),
        (
            IDLE,
            ("--kernel", "other"),
            "kernel other cannot be measured for tiny (bf16) on h200: its package is missing",
        ),
        (
            IDLE,
            ("--kernel", "described"),
            "kernel described cannot be measured for tiny (bf16) on h200: it is only described",
        ),
        (IDLE, ("--prune", "0.5"), "is not in the range x>=1"),
        (IDLE, ("--prune", "nan"), "'nan' is not a number"),
        (IDLE, ("--minutes", "nan"), "'nan' is not a number"),
    ],
)
def test_errors(machine: Machine, state: GpuState, args: tuple[str, ...], message: str) -> None:
    machine.state = state
    machine.registry.kernels |= {"described": Described(), "other": Unavailable("other")}
    result = run(machine, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not machine.log.exists()


def test_no_kernel_at_all(machine: Machine) -> None:
    machine.registry.kernels.clear()
    machine.registry.kernels["described"] = Described()
    result = run(machine)
    assert result.exit_code == 2
    assert (
        "no kernel can be measured for tiny (bf16) on h200: described left out: it is only described" in result.stderr
    )


def test_ctrl_c(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, done: int, doing: str, spent: float) -> None:
        if doing.startswith("batch 3"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Display, "at", interrupt)
        result = run(machine)
    assert result.exit_code == 130
    journal = journal_path(user_data_dir(), SHAPE, HARDWARE)
    last = result.stderr.splitlines()[-1]
    assert last == f"interrupted: what was measured is kept in {journal}; the same command goes on from it"
    again = run(machine)
    assert again.exit_code == 0
    assert f"going on with {journal}: 2 of 138 batches measured in 0.0 minutes" in again.stderr
    assert not journal.exists()


def test_ctrl_c_before_anything_is_measured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "profile", interrupt)
    result = run(machine)
    assert (result.exit_code, result.stderr) == (130, "interrupted: nothing was measured\n")


def test_the_bar_on_a_terminal(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    result = run(machine, "--json", "--minutes", "60")
    assert "60.0 minutes left" in result.stderr
    assert "batch 138 of 138 (" in result.stderr
    json.loads(result.stdout)
    assert set(load_sweep(place(user_data_dir())).stages) > {"path"}, "a long run has time for stages, too"


def test_the_worker_looks_at_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MIG slice has the name of the whole GPU; and CUDA may count GPUs in another order."""
    seen = types.SimpleNamespace(name="NVIDIA B200", major=10, minor=0, multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    with pytest.raises(HardwareError, match=r"GPU is b200 \(NVIDIA B200\), not h200.*CUDA_VISIBLE_DEVICES"):
        gpu._make_bench(SHAPE, "h200", ["sim"])
    seen.name, seen.multi_processor_count = "NVIDIA H200", 16
    with pytest.raises(HardwareError, match="reports 16 SMs where h200 has 132"):
        gpu._make_bench(SHAPE, "h200", ["sim"])


def test_a_device_that_the_name_does_not_tell(machine: Machine) -> None:
    machine.state = replace(IDLE, name="NVIDIA H200 64GB")
    assert run(machine, "--device", "h200", "--kernel", "sim").exit_code == 0
    machine.state = replace(IDLE, name="NVIDIA Hopper")
    result = run(machine)
    assert (result.exit_code, "no constants for GPU 'NVIDIA Hopper'" in result.stderr) == (2, True)
    result = run(machine, "--device", "h200")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "next: ramp-moe compare --model tiny --dtype bf16 --device h200"
    assert load_sweep(place(user_data_dir())).record.runs[-1].device_name == "NVIDIA Hopper"
    machine.state = IDLE
    result = run(machine, "--device", "b200")
    assert result.exit_code == 2
    assert "this machine's GPU is h200 (NVIDIA H200), not b200; name --device h200" in result.stderr
    assert run(machine, "--device", "h2000").exit_code == 2


def test_versions_of_kernels(registry: Registry) -> None:
    version = metadata.version("ramp-moe")
    assert registry.kernel("vllm_triton").version() == version_of("vllm")
    assert re.fullmatch(rf"{re.escape(version)}\+[0-9a-f]{{8}}", registry.kernel("triton").version())
    assert version_of("numpy") == metadata.version("numpy")
    assert version_of("no_such_package") == "?"
