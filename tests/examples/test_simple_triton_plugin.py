"""A stranger's path: install the example plugin, see its kernel, compare it with what ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parents[2] / "examples" / "simple_triton_plugin"


@pytest.fixture(scope="module")
def ramp_moe(tmp_path_factory: pytest.TempPathFactory):
    """ramp_moe(args) runs the command with the plugin installed, and returns what its --json prints."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(site), str(PLUGIN)], check=True)

    def run(*args: str) -> Any:
        env = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "ramp_moe.cli", *args, "--json"]
        return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    return run


def test_it_is_listed(ramp_moe) -> None:
    plugins = {p["name"]: p for p in ramp_moe("plugins")}
    assert plugins["simple_triton"]["problems"] == []
    assert plugins["simple_triton"]["hooks"] == ["ramp_moe_kernels", "ramp_moe_profiles"]
    kernels = {k["name"]: k for k in ramp_moe("kernels", "--model", "olmoe-1b-7b")}
    assert kernels["simple_triton"]["num_configs"] == 6
    assert kernels["simple_triton"]["unsupported"] is None
    assert kernels["simple_triton"]["recorded"]
    bf16 = {k["name"]: k for k in ramp_moe("kernels", "--dtype", "bf16")}
    assert "fp8" in bf16["simple_triton"]["unsupported"]


def test_it_takes_part_in_compare(ramp_moe) -> None:
    both = ramp_moe("compare", "--model", "olmoe-1b-7b", "--device", "h200")
    assert set(both["kernels"]) == {"alpha_moe", "simple_triton"}
    assert len(both["batches"]) == 78
    assert {s["kernel"] for s in both["sources"]} == set(both["kernels"])
    alone = ramp_moe("compare", "--model", "olmoe-1b-7b", "--kernel", "simple_triton")
    assert alone["kernels"] == ["simple_triton"]
    assert {b["best"]["kernel"] for b in alone["batches"]} == {"simple_triton"}
    # the better of two kernels is never slower than one of them
    for joint, single in zip(both["batches"], alone["batches"], strict=True):
        assert joint["best"]["us"] <= single["best"]["us"]


def test_its_two_launches_are_summed(ramp_moe) -> None:
    found = ramp_moe("explain", "--model", "olmoe-1b-7b", "--kernel", "simple_triton", "--tokens", "64")
    assert len(found["candidates"]) == 6
    assert all(len(c["gemms"]) == 2 for c in found["candidates"])
