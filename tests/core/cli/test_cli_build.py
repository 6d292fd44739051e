"""`ramp-moe kernels build` over kernels that compile nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ramp_moe import BuildableKernel, Built, Hardware, KernelError, MoEShape, Registry
from ramp_moe.cli import build, main
from simulated_gpu import Described

BUILT = Built(
    Path("/cache/x"), ("a", "b"), ("c",), {"d": "spills: [8] bytes"}, ("e was corrupt",), 3_000_000, 7.0, 12.5
)


class Buildable(Described, BuildableKernel):
    """Answers with `answer`, or raises it."""

    name = "buildable"
    reason: str | None = None

    def __init__(self) -> None:
        self.answer: Built | BaseException = BUILT
        self.asked: list[tuple[str, str, str, int | None]] = []

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return self.reason

    def build(self, shape: MoEShape, hardware: Hardware, report: Any, jobs: int | None = None) -> Built:
        self.asked.append((shape.label, shape.dtype, hardware.name, jobs))
        report(0, 4, "")
        report(4, 4, "d")
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def prune(self) -> int:
        return 2_000_000


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Buildable:
    registry = Registry(load_entry_points=False)
    found = Buildable()
    registry.kernels |= {"described": Described(), "buildable": found}
    monkeypatch.setattr(build, "get_registry", lambda: registry)
    return found


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["kernels", "build", "--model", "olmoe-1b-7b", *map(str, args)])


def test_what_it_prints(kernel: Buildable) -> None:
    result = run("--kernel", "buildable", "--dtype", "bf16", "--jobs", 3)
    assert result.exit_code == 0, result.output
    assert kernel.asked == [("olmoe-1b-7b", "bf16", "h200", 3)]
    assert [c.strip() for c in result.stdout.splitlines()[-4].split("│")[1:-1]] == [
        *("buildable", "2", "1", "1", "3.0", "12.5", "7.0", "/cache/x")
    ]
    assert result.stdout.splitlines()[-2:] == ["buildable/d dropped: spills: [8] bytes", "note: e was corrupt"]


def test_json(kernel: Buildable) -> None:
    result = run("--json", "--prune")
    assert json.loads(result.stdout) == [
        {
            "model": "olmoe-1b-7b",
            "dtype": "fp8",
            "kernel": "buildable",
            "folder": "/cache/x",
            "compiled": ["a", "b"],
            "reused": ["c"],
            "dropped": {"d": "spills: [8] bytes"},
            "notes": ["e was corrupt"],
            "bytes": 3_000_000,
            "seconds": 7.0,
            "cpu_seconds": 12.5,
            "pruned_bytes": 2_000_000,
        }
    ]
    assert kernel.asked == [("olmoe-1b-7b", "fp8", "h200", None)]


def test_pruning_is_told(kernel: Buildable) -> None:
    assert "buildable: 2.0 MB of other versions deleted" in run("--prune").stdout
    assert "deleted" not in run().stdout


def test_nothing_left_is_a_failure(kernel: Buildable) -> None:
    kernel.answer = Built(Path("/cache/x"), (), (), {"a": "spills"}, (), 0, 1.0, 1.0)
    result = run()
    assert result.exit_code == 1
    assert "buildable/a dropped: spills" in result.stdout


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KernelError("no compiler; install one"), "Error: no compiler; install one"),
        (ValueError("oh\nno"), "Error: kernel buildable fails to build: ValueError: oh no"),
    ],
)
def test_what_fails(kernel: Buildable, error: Exception, message: str) -> None:
    kernel.answer = error
    result = run()
    assert (result.exit_code, result.stderr.strip()) == (2, message)


def test_interrupted(kernel: Buildable) -> None:
    kernel.answer = KeyboardInterrupt()
    result = run()
    assert result.exit_code == 130
    assert "the same command goes on from it" in result.stderr


def test_what_cannot_be_built(kernel: Buildable) -> None:
    asked = run("--kernel", "described")
    assert asked.exit_code == 2
    assert (
        "kernel described cannot be built for olmoe-1b-7b (fp8) on h200: it is not compiled ahead of time"
        in asked.stderr
    )
    kernel.reason = "too many experts"
    assert "nothing to build for olmoe-1b-7b (fp8) on h200: buildable: too many experts" in run().stderr
    assert "kernel buildable cannot be built" in run("--kernel", "buildable").stderr
    assert "unknown kernel 'bildable'" in run("--kernel", "bildable").stderr


def test_options_of_the_listing_do_not_get_lost(kernel: Buildable) -> None:
    result = CliRunner().invoke(main, ["kernels", "--json", "--model", "x", "build", "--model", "olmoe-1b-7b"])
    assert result.exit_code == 2
    assert "--json, --model must come after `main kernels build`" in result.stderr


def test_one_that_cannot_be_built_leaves_the_others(kernel: Buildable, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Buildable):
        name = "missing"

    missing = Missing()
    missing.answer = KernelError("a package is missing; install it")
    registry = build.get_registry()
    monkeypatch.setattr(registry, "kernels", {"missing": missing, **registry.kernels})
    result = run("--json")
    assert (result.exit_code, [row["kernel"] for row in json.loads(result.stdout)]) == (0, ["buildable"])
    assert "missing left out: a package is missing; install it" in result.stderr
    assert run("--kernel", "missing").exit_code == 2
    kernel.answer = KernelError("so is another")
    result = run()
    assert result.exit_code == 2
    assert "missing left out: a package is missing" in result.output
    assert "buildable left out: so is another" in result.output.replace("\n", " ")
