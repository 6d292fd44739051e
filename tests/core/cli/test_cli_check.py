"""`ramp-moe check-kernel`: what it prints and how it exits."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import plain_kernel
import pytest
from click.testing import CliRunner, Result
from ramp_moe import Registry
from ramp_moe.cli import check, main
from ramp_moe.testing.description import CHECKS
from ramp_moe.testing.outcome import Outcome


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["check-kernel", *args])


def outcomes_of(result: Result) -> dict[str, str]:
    return {c["check"]: c["result"] for c in json.loads(result.stdout)["checks"]}


@pytest.mark.slow
def test_a_described_kernel_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "ramp_moe.cli", "check-kernel", "alpha_moe", "--json"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    assert (found["kernel"], found["model"], found["dtype"], found["device"]) == (
        "alpha_moe",
        "olmoe-1b-7b",
        "fp8",
        "h200",
    )
    results = {c["check"]: c["result"] for c in found["checks"]}
    assert list(results) == list(CHECKS)
    assert [name for name, result in results.items() if result == "passed"] == list(CHECKS)[:6]
    reasons = {c["detail"] for c in found["checks"] if c["result"] == "skipped"}
    assert all("alpha_moe is missing" in r or "needs a GPU" in r or "need a GPU" in r for r in reasons)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with the kernel `plain`, which the checks take, too, until a test says otherwise."""
    registry = Registry(load_entry_points=False)
    registry.kernels["plain"] = plain_kernel.Plain()
    monkeypatch.setattr(check, "get_registry", lambda: registry)
    monkeypatch.setattr("ramp_moe.testing.description.get_registry", lambda: registry)
    return registry


@pytest.mark.slow
def test_a_crash_is_a_failure(plain: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "Making", lambda *_: functools.partial(plain_kernel.crashing))
    monkeypatch.setattr("ramp_moe.testing.description.CHECKS", {c: CHECKS[c] for c in ("reasons", "steps", "layout")})
    result = run("plain", "--json")
    assert result.exit_code == 1
    assert outcomes_of(result) == {"reasons": "passed", "steps": "failed", "layout": "passed"}
    assert json.loads(result.stdout)["dtype"] == "bf16"


def test_the_table(plain: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Outcome("name", "passed"),
        Outcome("outputs", "passed", "14 launches"),
        Outcome("graph", "skipped", "CUDA graphs need a GPU"),
    ]
    monkeypatch.setattr(check, "run_apart", lambda make, timeout: iter(found))
    result = run("plain", "--dtype", "fp16")
    assert result.exit_code == 0, result.output
    assert "plain: olmoe-1b-7b (fp16) on h200" in result.stdout
    for text in (CHECKS["name"], "14 launches", "CUDA graphs need a GPU", "2 passed, 0 failed, 1 skipped"):
        assert text in result.stdout
    found.append(Outcome("bounds", "failed", "configuration [bm16] writes beyond its output"))
    result = run("plain")
    assert result.exit_code == 1
    assert "plain: olmoe-1b-7b (bf16) on h200" in result.stdout
    assert "configuration [bm16] writes beyond" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plane",), "unknown kernel 'plane'; did you mean 'plain'?"),
        (("plain", "--model", "olmo"), "unknown model 'olmo'"),
        (("plain", "--device", "h2000"), "unknown device 'h2000'"),
        (("plain", "--dtype", "fp8"), "does not support olmoe-1b-7b on h200 (fp8: takes bf16 and fp16 weights"),
        (("plain", "--dtype", "int4"), "'int4' is not one of"),
        (("plain", "--configs", "-1"), "-1 is not in the range"),
        ((), "Missing argument"),
    ],
)
@pytest.mark.usefixtures("plain")
def test_usage(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
