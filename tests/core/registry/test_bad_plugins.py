"""A plugin's kernel that answers with what it should not: its own commands say so, the others are as without it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ramp_moe import GridGeometry, KernelConfig, MoEShape, Registry, Stage, WeightLayout
from ramp_moe.cli import main
from ramp_moe.spec.launchable import LaunchableKernel
from ramp_moe.testing.description import Making

MODEL = ("--model", "olmoe-1b-7b")


class Wrong:
    """Neither a string nor any other thing that is asked for, and fails to say what it is."""

    def __str__(self) -> str:
        raise ValueError("no name")

    __repr__ = __str__


class Odd(LaunchableKernel):
    """A sound description, of which a test replaces one answer."""

    name = "odd"

    def configs(self, shape: MoEShape, hardware: Any) -> Any:
        grid = GridGeometry.fused(shape, block_m=16, block_n=256, block_k=128)
        return [KernelConfig("a", (Stage("gemm", "odd/a", grid),))]

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def unavailable(self) -> Any:
        return None

    def default_config(self, shape: MoEShape, hardware: Any, num_tokens: int) -> Any:
        return self.configs(shape, hardware)[0]

    def prepare(self, weights: Any) -> Any:
        return weights

    def run(self, *args: Any) -> None:
        pass


ASKED = ("unsupported", "unavailable", "configs", "weight_layout", "readable_layouts", "version", "default_config")
ANSWERS: dict[str, Any] = {
    "True": lambda *args: True,
    "False": lambda *args: False,
    "3": lambda *args: 3,
    "None": lambda *args: None,
    "wrong": lambda *args: Wrong(),
    "list of wrong": lambda *args: [Wrong()],
    "escape": lambda *args: "\x1b[2Jtwo\nlines",
    "raises": lambda *args: 1 / 0,
    "raises wrong": lambda *args: (_ for _ in ()).throw(ValueError(Wrong())),
}
COMMANDS = {
    "kernels": ("kernels", *MODEL),
    "build it": ("kernels", "build", *MODEL, "--kernel", "odd"),
    "compare": ("compare", *MODEL),
    "explain it": ("explain", *MODEL, "--kernel", "odd"),
}
LISTED = ("kernels", "build it")
"""What asks more than whether the kernel takes the shape, and in which configurations."""


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def odd(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> type[Odd]:
    """The class of a plugin's kernel that the commands know."""
    kernel = type("Odd", (Odd,), {})
    monkeypatch.setattr(registry, "kernels", {"alpha_moe": registry.kernels["alpha_moe"], "odd": kernel()})
    monkeypatch.setattr(registry, "third_party", {"odd"})
    for module in ("listing", "choose", "compare", "build", "check"):
        monkeypatch.setattr(f"ramp_moe.cli.{module}.get_registry", lambda: registry)
    monkeypatch.setattr("ramp_moe.testing.description.get_registry", lambda: registry)
    return kernel


@pytest.mark.parametrize("asked", ASKED)
def test_every_answer_to_every_question(odd: type[Odd], asked: str) -> None:
    for answer, command in itertools.product(ANSWERS, COMMANDS):
        if command not in LISTED and asked not in ("unsupported", "configs"):
            continue
        setattr(odd, asked, staticmethod(ANSWERS[answer]))
        found = run(*COMMANDS[command])
        what = (asked, answer, command, found.exception, found.output[-300:])
        assert isinstance(found.exception, SystemExit | None), what
        # A kernel that takes the shape, but has no profile, is explained by its own choice.
        refused = command.endswith(" it") and (asked, answer, command) != ("unsupported", "None", "explain it")
        assert found.exit_code == (2 if refused else 0), what
        assert "\x1b" not in found.output, what


@pytest.mark.parametrize("answer", ["True", "False", "3", "wrong", "raises"])
def test_what_is_no_reason_is_a_refusal_that_says_so(odd: type[Odd], answer: str) -> None:
    odd.unsupported = staticmethod(ANSWERS[answer])  # type: ignore[method-assign]
    (row,) = (k for k in json.loads(run("kernels", *MODEL, "--json").stdout) if k["name"] == "odd")
    assert row["num_configs"] == 0
    assert "unsupported() returned " in row["unsupported"] or "ZeroDivisionError" in row["unsupported"]
    notes = json.loads(run("compare", *MODEL, "--json").stdout)["notes"]
    assert any(
        n.startswith("odd left out: ") and n.endswith(row["unsupported"].removeprefix("broken: KernelError: "))
        for n in notes
    )


def test_a_kernel_without_a_profile_is_named(odd: type[Odd]) -> None:
    wanted = (
        "odd left out: no profile for olmoe-1b-7b (fp8) on h200; measure one with "
        "`ramp-moe profile --model olmoe-1b-7b --dtype fp8 --kernel odd`"
    )
    for command in ("compare", "explain"):
        assert wanted in json.loads(run(command, *MODEL, "--json").stdout)["notes"]
        assert wanted in " ".join(run(command, *MODEL).stdout.split())


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"block_m": 1.5}, "block_m must be an integer, not 1.5"),
        ({"block_n": 10**30}, "block_n must lie between 1 and 1048576"),
        ({"expert_bytes": 1e6}, "expert_bytes must be an integer"),
        ({"block_m": True}, "block_m must be an integer, not True"),
    ],
)
def test_check_kernel_fails_for_grids_that_cannot_be(odd: type[Odd], change: dict[str, Any], failed: str) -> None:
    def configs(shape: MoEShape, hardware: Any) -> Any:
        fields = {"block_m": 16, "block_n": 256, "block_k": 128, "expert_bytes": shape.expert_bytes} | change
        grid = GridGeometry(n=shape.gate_up_rows, k=shape.hidden_size, **fields)
        return [KernelConfig("a", (Stage("gemm", "odd/a", grid),))]

    odd.configs = staticmethod(configs)  # type: ignore[method-assign]
    outcome = Making("odd", MoEShape(8, 2, 256, 128, "bf16"), "h200")().run("configs")
    assert outcome.result == "failed"
    assert failed in outcome.detail
