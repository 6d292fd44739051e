"""Every command for a shape or a GPU that nobody profiled: it answers by a guess and says so, or says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from ramp_moe import generate
from ramp_moe.cli import main
from tiers import slow_except

MODEL = ("--model", "qwen1.5-moe-a2.7b", "--dtype", "bf16")
EXPERTS, TOP_K = 60, 4

GUESSED, CONSTANTS, NEEDS_TIMES, NEEDS_GPU, COMPILES = "guessed", "constants", "needs times", "needs a GPU", "compiles"
ANSWERS = {
    "check": NEEDS_GPU,
    "check-kernel": COMPILES,
    "compare": GUESSED,
    "env": CONSTANTS,
    "explain": GUESSED,
    "fit": NEEDS_TIMES,
    "kernels": CONSTANTS,
    "kernels build": COMPILES,
    "models": CONSTANTS,
    "plugins": CONSTANTS,
    "profile": NEEDS_GPU,
    "profiles": NEEDS_TIMES,
    "regions": CONSTANTS,
}
"""How each command answers without a profile. What compiles does not ask for one."""


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def answer(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def commands(group: click.Group, prefix: str = "") -> set[str]:
    found = set()
    for name, command in group.commands.items():
        found.add(prefix + name)
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix}{name} ")
    return found


def test_every_command_is_listed() -> None:
    assert commands(main) == set(ANSWERS), "say in ANSWERS what the new command does without a profile"


@pytest.mark.parametrize("command", slow_except(["explain"], [c for c, how in ANSWERS.items() if how != COMPILES]))
def test_a_shape_without_a_profile(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    how = ANSWERS[command]
    takes_model = any(p.name == "model" for p in main.commands[command].params) and command != "env"
    args = [command, *(MODEL if takes_model else ())]
    result = run(*args)
    said = " ".join((result.stdout + result.stderr).split())
    match how:
        case "guessed":
            assert result.exit_code == 0, result.output
            assert answer(*args)["guessed"] is True
            assert "GUESSED by the cost model" in said
            assert "guessed from other shapes; measure it with `ramp-moe profile --model qwen1.5-moe-a2.7b" in said
        case "constants":
            assert result.exit_code == 0, result.output
        case "needs times":
            assert result.exit_code == 2
            assert "no sweep of" in said
            assert "`ramp-moe explain`, `compare` and `regions` need no sweep" in said
        case "needs a GPU":
            assert result.exit_code == 2
            assert "GPU" in said


@pytest.mark.parametrize("device", slow_except(["mi300x"], ["h100-sxm", "h20", "a100-sxm", "b200", "mi300x"]))
def test_other_gpus(device: str) -> None:
    """Say what the times rest on, and why kernels are left out."""
    found = answer("compare", *MODEL, "--device", device)
    assert found["guessed"] is True
    assert all(source["summary"].endswith(f"scaled to {device}") for source in found["sources"])
    assert "guessed from other shapes on h200, scaled by data sheets (memory 4.8 to " in found["notes"][0]
    left_out = {"vllm_triton": "no profile for qwen1.5-moe-a2.7b (bf16)"}
    if device not in ("h100-sxm", "h20"):
        left_out |= {"cute": "written for Hopper", "deep_gemm": "described for Hopper"}
    for kernel, reason in left_out.items():
        assert kernel not in found["kernels"]
        assert any(n.startswith(f"{kernel} left out: {reason}") for n in found["notes"])
    assert "triton" in found["kernels"]
    for command in ("kernels", "regions"):
        assert run(command, *MODEL, "--device", device).exit_code == 0


def trace(tmp_path: Path, num_experts: int) -> Path:
    path = tmp_path / "trace.json"
    ids = generate("zipf1.2", 256, num_experts, TOP_K, seed=5)
    path.write_text(json.dumps({"num_experts": num_experts, "top_k": TOP_K, "topk_ids": np.asarray(ids).tolist()}))
    return path


@pytest.mark.slow
def test_a_trace(tmp_path: Path) -> None:
    found = answer("compare", *MODEL, "--trace", trace(tmp_path, EXPERTS))
    assert (found["mode"], found["guessed"]) == ("predicted", True)
    assert {b["routing"] for b in found["batches"]} >= {"trace decode"}
    assert found["speedup_over_static"]["min"] >= 1 - 1e-9
    page = tmp_path / "report.html"
    assert run("compare", *MODEL, "--trace", trace(tmp_path, EXPERTS), "--html", page).exit_code == 0
    assert "GUESSED by the cost model" in page.read_text()
    other = run("compare", *MODEL, "--trace", trace(tmp_path, 64))
    assert other.exit_code == 2
    assert "64" in other.stderr


@pytest.mark.parametrize(
    "option", [("--stage", "gemm"), ("--static-table", "E=60,N=1408,device_name=NVIDIA_H200.json")]
)
def test_what_only_measured_times_tell(option: tuple[str, str], tmp_path: Path) -> None:
    name, value = option
    if name == "--static-table":
        entry = dict.fromkeys(("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"), 64) | {"GROUP_SIZE_M": 1}
        place = tmp_path / value
        place.write_text(json.dumps({"64": entry | {"num_warps": 4, "num_stages": 3}}))
        value = str(place)
    result = run("compare", *MODEL, name, value)
    assert result.exit_code == 2
    what, remedy = result.stderr.splitlines()
    assert what.startswith(f"Error: {name} judges measured times, of which there are none: no sweep of ")
    assert remedy.startswith("measure it with `ramp-moe profile --model qwen1.5-moe-a2.7b --dtype bf16`")
    assert max(len(what), len(remedy)) < 600


def test_a_kernel_that_no_guess_knows() -> None:
    """It was left out without a word, if another named kernel could be guessed."""
    result = run("compare", *MODEL, "--kernel", "cute", "--kernel", "vllm_triton")
    assert result.exit_code == 2
    assert "no sweep of vllm_triton for qwen1.5-moe-a2.7b" in result.stderr
    assert result.stderr.count("\n") <= 2


def test_a_guess_names_the_form_that_it_has() -> None:
    assert answer("explain", *MODEL, "--kernel", "cute", "--form", "paper")["form"] == "active"
