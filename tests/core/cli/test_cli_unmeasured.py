"""Commands for a GPU or a dtype of which nothing was measured: what grids and constants say, and what is missing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from ramp_moe import Hardware, Registry
from ramp_moe.cli import choose, main
from ramp_moe.registry.gpus import GPUS
from ramp_moe.spec.kernel import usable_configs
from simulated_bench import Simulated
from simulated_gpu import Described, Unavailable


def run(*args: str) -> Result:
    result = CliRunner().invoke(main, [*args, "--model", "olmoe-1b-7b"], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


ARCHITECTURES = pytest.mark.parametrize("hardware", {gpu.arch: gpu for gpu in GPUS}.values(), ids=lambda gpu: gpu.name)


def check_grids(found: dict[str, Any], registry: Registry, hardware: Hardware) -> None:
    """Every candidate is a configuration of its kernel there, with its waves; other kernels have their reason."""
    shape, noted = registry.shape("olmoe-1b-7b", found["dtype"]), " ".join(found["notes"])
    names = {c["kernel"] for c in found["candidates"]}
    assert all(name in noted for name in registry.kernels.keys() - names)
    configs = {name: {c.name: c for c in usable_configs(registry.kernel(name), shape, hardware)} for name in names}
    for candidate in found["candidates"]:
        grids = configs[candidate["kernel"]][candidate["config"]].gemms
        waves = [int(g.waves(np.array(found["histogram"]), hardware.num_sms)) for g in grids]
        assert [g["waves"] for g in candidate["gemms"]] == waves


@ARCHITECTURES
def test_every_architecture_is_explained_from_its_grids(registry: Registry, hardware: Hardware) -> None:
    result = run("explain", "--device", hardware.name, "--dtype", "fp16", "--tokens", "32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["figures"], found["guessed"]) == ("grids", False)
    assert f"no profile for {hardware.name}" in found["notes"][0]
    assert ("ramp-moe profile --model olmoe-1b-7b --dtype fp16" in found["notes"][0]) == (hardware.vendor == "NVIDIA")
    assert {"triton"} <= {c["kernel"] for c in found["candidates"]}
    assert all(c["predicted_us"] is None for c in found["candidates"])
    check_grids(found, registry, hardware)


@ARCHITECTURES
def test_every_architecture_is_guessed_from_the_one_that_was_measured(registry: Registry, hardware: Hardware) -> None:
    result = run("explain", "--device", hardware.name, "--dtype", "bf16", "--tokens", "32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["figures"], found["guessed"]) == ("predicted", True)
    assert f"no profile on {hardware.name}: what is chosen is guessed from h200, scaled by" in found["notes"][0]
    assert ("ramp-moe profile --model olmoe-1b-7b --dtype bf16" in found["notes"][0]) == (hardware.vendor == "NVIDIA")
    assert {"triton"} <= {c["kernel"] for c in found["candidates"]}
    active = sum(count > 0 for count in found["histogram"])
    read_us = active * registry.shape("olmoe-1b-7b", "bf16").expert_bytes / hardware.read_bytes_per_s * 1e6
    for candidate in found["candidates"]:
        assert candidate["predicted_us"] > 0.999 * read_us
        assert candidate["extrapolated"]
    check_grids(found, registry, hardware)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("explain",), 0, "GUESSED by the cost model"),
        (("explain", "--kernel", "cute"), 2, "written for Hopper (sm_90), mi325x is gfx942 (cute)"),
        (("regions",), 0, "predictions from hardware constants"),
        (("kernels",), 0, "written for Hopper (sm_90), mi325x is gfx942"),
        (("compare",), 0, "GUESSED by the cost model"),
        (("fit",), 2, "`ramp-moe explain`, `compare` and `regions` need no sweep"),
        (("profiles",), 2, "`ramp-moe explain`, `compare` and `regions` need no sweep"),
    ],
)
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_what_each_command_answers(args: tuple[str, ...], code: int, message: str, dtype: str) -> None:
    result = run(*args, "--device", "mi325x", "--dtype", dtype)
    assert result.exit_code == code, result.output
    assert message in " ".join((result.stdout + result.stderr).split())
    assert code == 0 or result.stderr.count("\n") <= 2


def test_no_kernel_that_runs_there() -> None:
    result = run("explain", "--device", "a100-40gb", "--dtype", "fp8")
    assert result.exit_code == 2
    assert "no kernel computes olmoe-1b-7b (E64-k8-h2048-i1024-fp8) on a100-40gb: " in result.stderr
    assert "a100-40gb has no fp8 units (vllm_triton, triton)" in result.stderr
    assert result.stderr.count("\n") <= 2


def test_one_kernel_of_several_has_no_profile() -> None:
    result = run("explain", "--kernel", "triton", "--kernel", "vllm_triton")
    assert result.exit_code == 2
    assert "no sweep of vllm_triton for olmoe-1b-7b" in result.stderr


def test_a_dtype_that_nobody_measured() -> None:
    result = run("explain", "--dtype", "fp16", "--histogram", json.dumps([0] * 64))
    assert result.exit_code == 0, result.output
    assert "no profile for h200" in result.stdout
    assert "token block advised" not in result.stdout, "for no token"


def test_plugins_kernels_have_their_say(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Unavailable):
        def default_config(self, *_: object) -> None:
            raise ValueError("not today")

    registry = Registry(load_entry_points=False)
    registry.kernels |= {"sim": Simulated(), "described": Described(), "broken": Broken("broken")}
    monkeypatch.setattr(choose, "get_registry", lambda: registry)
    found = json.loads(run("explain", "--dtype", "bf16", "--json").stdout)
    assert [c["kernel"] for c in found["candidates"]] == ["sim"]
    assert found["notes"][1:] == [
        "left out: described: it is only described and makes no choice",
        "left out: broken: broken: ValueError: not today",
    ]
