"""Shapes of which nothing is recorded: the kernels are asked first, and the answer is two lines with their reasons."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from ramp_moe import KernelConfig, MoEShape, ProfileStore, WeightLayout, get_registry
from ramp_moe.cli import main
from ramp_moe.dispatch.load_model import load_model, nothing_recorded
from ramp_moe.errors import KernelError, ProfileError
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.registry.registry import Registry
from ramp_moe.spec.hardware import Hardware
from ramp_moe.spec.kernel import Kernel

STRADDLING = "qwen3-235b-a22b-tp8"
LONGEST = 480
"""Characters of a line."""


def failed(*args: str) -> list[str]:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr.splitlines()


@pytest.mark.parametrize("command", ["fit", "profiles"])
def test_a_shape_that_one_kernel_computes(command: str) -> None:
    what, remedy = failed(command, "--model", STRADDLING)
    assert what.startswith(f"Error: no sweep of triton for {STRADDLING} (E128-k8-h4096-i192-fp8) on h200; ")
    assert "intermediate_size 192 is not a multiple of 128 (alpha_moe, cute)" in what
    assert "scale block 128 (deep_gemm, flashinfer_cutlass, humming, vllm_triton)" in what
    assert remedy.startswith(f"measure it with `ramp-moe profile --model {STRADDLING} --dtype fp8`")
    assert max(map(len, (what, remedy))) < LONGEST


def test_explain_answers_by_that_kernel() -> None:
    found = CliRunner().invoke(main, ["explain", "--model", STRADDLING, "--json"])
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert {c["kernel"] for c in answer["candidates"]} == {"triton"}
    assert all(c["extrapolated"] for c in answer["candidates"])
    assert any("guessed from other shapes" in note for note in answer["notes"])


@pytest.mark.parametrize("command", ["explain", "fit", "compare", "profiles"])
def test_a_shape_that_no_kernel_computes(command: str) -> None:
    what, remedy = failed(command, "--model", "E8-k2-h2880-i2880-fp8")
    assert what.startswith("Error: no kernel computes E8-k2-h2880-i2880-fp8")
    assert "hidden_size 2880 is not a multiple of the fp8 scale block 128 (deep_gemm, " in what
    assert remedy.startswith("name another --model, --dtype or --device")
    assert max(map(len, (what, remedy))) < LONGEST


@pytest.mark.parametrize("command", ["explain", "fit", "compare", "profiles"])
def test_a_kernel_that_was_asked_for(command: str) -> None:
    what, _ = failed(command, "--model", STRADDLING, "--kernel", "deep_gemm")
    assert what.startswith(f"Error: kernel deep_gemm does not compute {STRADDLING}")
    assert what.endswith("intermediate_size 192 is not a multiple of the fp8 scale block 128 (deep_gemm)")


@pytest.mark.parametrize("device", list(get_registry().hardware))
def test_every_model_is_answered_briefly(device: str) -> None:
    """Of each model, on each device: a model to choose by, or two short lines."""
    registry = get_registry()
    store, hardware = ProfileStore(shipped=registry.profile_dirs), registry.device(device)
    for model in registry.models.values():
        for shape in (model.shape, model.shape.shard(8)) if model.shape.intermediate_size % 8 == 0 else (model.shape,):
            error = nothing_recorded(registry, store, list(registry.kernels), shape, hardware)
            lines = str(error).splitlines()
            assert len(lines) == 2
            assert max(map(len, lines)) < 2 * LONGEST
            assert isinstance(error, KernelError | ProfileError)


class Broken(Kernel):
    name = "broken"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        raise RuntimeError("of its own")

    def configs(self, shape: MoEShape, hardware: Hardware) -> list[KernelConfig]:
        return []

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", 0)


def test_a_kernel_that_fails_to_say(h200: Hardware) -> None:
    registry = Registry(load_entry_points=False)
    registry.kernels = {"broken": Broken()}
    for load in (load_replay, load_model):
        with pytest.raises(KernelError, match=r"^kernel broken does not compute .*RuntimeError: of its own"):
            load(registry, ProfileStore(), MoEShape(8, 2, 256, 128), h200)
