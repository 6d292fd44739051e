"""Launches at a few batch sizes compile all that any size needs: nothing is compiled while a server serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import H200, batch, weights
from ramp_moe import Candidate, MoEShape
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.warm import warm
from ramp_moe_kernels.triton.kernel import TritonMoE
from ramp_moe_kernels.triton.sizes import warm_sizes

SUPPORT = Path(__file__).parents[1] / "support"
KERNELS = ("triton", "cute", "alpha_moe", "deep_gemm")


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, str(SUPPORT / "specialisations.py")]
    done = subprocess.run(run, env=env, cwd=SUPPORT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_sizes_compile_all_that_9000_sizes_need(cases: list[dict[str, Any]]) -> None:
    assert {case["case"].split()[0] for case in cases} == set(KERNELS)
    assert not [(case["case"], case["missing"]) for case in cases if case["missing"]]
    assert max(len(case["sizes"]) for case in cases) <= 8


@pytest.mark.slow
def test_one_size_alone_leaves_kernels_to_be_compiled_while_serving(cases: list[dict[str, Any]]) -> None:
    cold = {kernel for case in cases for kernel in case["cold"]}
    assert {"histogram_kernel", "schedule_kernel", "combine_kernel", "permute_kernel", "invert_kernel"} <= cold


def test_sizes_are_those_of_batches() -> None:
    shape = MoEShape(64, 8, 2048, 1024, "fp8")
    for most in (1, 2, 65, 66, 9000):
        sizes = warm_sizes(shape, most)
        assert sizes == tuple(sorted(set(sizes)))
        assert sizes[0] == 1
        assert sizes[-1] <= most
    assert set(warm_sizes(shape, 65)) < set(warm_sizes(shape, 9000))
    assert warm_sizes(MoEShape(1000, 600, 2048, 1024, "bf16"), 9) == (1, 2, 4, 7)


def test_sizes_beyond_32_bits_are_among_them() -> None:
    """What is zeroed beside the schedule then has a count of 64 bits."""
    shape = MoEShape(8, 2, 8192, 1024, "bf16")
    assert 2**31 // 8192 in TritonMoE().warm_sizes(shape, 2**19)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_nothing_is_compiled_once_warm(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import JITFunction

    kernel = TritonMoE()
    layer = LayerRuntime(weights(8, 256, 128, dtype, "cuda"), 2, H200, [kernel])
    candidate = Candidate(kernel.name, kernel.default_config(layer.shape, H200, 64))
    assert warm(layer, [candidate], 5000, torch.bfloat16) == {}

    def compiles(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} is compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    for tokens in (1, 3, 64, 256, 257, 700, 1500, 2049, 4999):
        given = batch(tokens, 2, 8, 256, "uniform", "cuda", torch.bfloat16)
        layer.launch(candidate, given, torch.empty_like(given.hidden_states))
