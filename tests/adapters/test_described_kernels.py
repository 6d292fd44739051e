"""The described third-party kernels: configurations counted, grids against a brute-force count, reasons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ramp_moe import Hardware, Kernel, KernelError, Registry, expert_histogram, generate
from ramp_moe.plugin import LaunchableKernel
from ramp_moe.spec.kernel import usable_configs

KERNELS = ("alpha_moe", "vllm_triton")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, registry: Registry) -> Kernel:
    return registry.kernel(request.param)


def test_names_and_keys_are_distinct_and_configs_hashable(kernel: Kernel, registry: Registry, h200: Hardware) -> None:
    configs = usable_configs(kernel, registry.shape("qwen3-30b-a3b", "fp8"), h200)
    assert len(set(configs)) == len({c.name for c in configs}) == len(configs)
    keys = [s.key for c in configs for s in c.stages if s.kind == "gemm"]
    assert len(set(keys)) == len(keys)
    assert list(configs) == list(kernel.configs(registry.shape("qwen3-30b-a3b", "fp8"), h200))


def test_every_kernel_says_in_one_place_what_it_launches(registry: Registry) -> None:
    """`launch` and `steps` follow from `run`, so that they cannot differ."""
    found = [kernel for kernel in registry.kernels.values() if isinstance(kernel, LaunchableKernel)]
    assert len(found) >= 6
    for kernel in found:
        assert type(kernel).launch is LaunchableKernel.launch, kernel.name
        assert type(kernel).steps is LaunchableKernel.steps, kernel.name


def test_alpha_moe_grid(registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("qwen3-30b-a3b", "fp8")
    configs = usable_configs(registry.kernel("alpha_moe"), shape, h200)
    assert len(configs) == 152
    assert not [c for c in configs if dict(c.params)["stages"] == 5 and dict(c.params)["block_m"] > 100]
    histogram = expert_histogram(generate("zipf1.2", 100, 128, 8), 128)
    for c in configs[::17]:
        block_m = dict(c.params)["block_m"]
        (grid,) = c.gemms
        y = sum(math.ceil(h / block_m) for h in histogram.tolist())
        assert int(grid.logical(histogram)) == 2 * 768 // 256 * y
        assert grid.expert_bytes == shape.expert_bytes


def test_vllm_launches_what_its_aligned_buffer_needs(registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "bf16")
    configs = usable_configs(registry.kernel("vllm_triton"), shape, h200)
    for c in configs[::101]:
        p = dict(c.params)
        assert [s.kind for s in c.stages] == ["schedule", "gemm", "activation", "gemm", "combine"]
        for grid, rows in zip(c.gemms, (2 * 1024, 2048), strict=True):
            em = 512 * 8 + 64 * (p["BLOCK_SIZE_M"] - 1)
            ctas = math.ceil(em / p["BLOCK_SIZE_M"]) * math.ceil(rows / p["BLOCK_SIZE_N"])
            assert grid.launched(512 * 8, 64) == ctas
    assert {g.block_n for c in configs for g in c.gemms} == {32, 64, 128, 256}


def test_vllm_configurations_fit_into_shared_memory(registry: Registry) -> None:
    shape = registry.shape("olmoe-1b-7b", "bf16")
    counts = {
        d: len(usable_configs(registry.kernel("vllm_triton"), shape, registry.device(d))) for d in ("l40s", "h200")
    }
    assert counts["l40s"] < counts["h200"]
    fp8 = registry.kernel("vllm_triton").configs(registry.shape("olmoe-1b-7b", "fp8"), registry.device("h200"))
    assert {dict(c.params)["BLOCK_SIZE_K"] for c in fp8} == {128}
    assert fp8[0].stages[0].kind == "quantise"


@pytest.mark.parametrize(
    ("name", "model", "dtype", "device", "reason"),
    [
        ("alpha_moe", "olmoe-1b-7b", "fp8", "a100-sxm", "written for Hopper"),
        ("alpha_moe", "olmoe-1b-7b", "bf16", "h200", "fp8 block-scaled weights only, not bf16"),
        ("alpha_moe", "gpt-oss-120b", "fp8", "h200", "hidden_size 2880 is not a multiple of 256"),
        ("alpha_moe", "olmoe-1b-7b-tp16", "fp8", "h200", "intermediate_size 64 is not a multiple of 128"),
        ("vllm_triton", "olmoe-1b-7b", "fp8", "a100-sxm", "no fp8 units"),
        ("vllm_triton", "gpt-oss-120b", "fp8", "h200", "hidden_size 2880 is not a multiple of the fp8 scale block 128"),
    ],
)
def test_reasons(registry: Registry, name: str, model: str, dtype: str, device: str, reason: str) -> None:
    kernel, shape, hardware = registry.kernel(name), registry.shape(model, dtype), registry.device(device)
    assert reason in (kernel.unsupported(shape, hardware) or "")
    with pytest.raises(
        KernelError, match=rf"kernel {name} does not support {model} \({dtype}\) on {device}: .*{reason}"
    ):
        usable_configs(kernel, shape, hardware)


def test_layouts(registry: Registry) -> None:
    shape = registry.shape("olmoe-1b-7b", "bf16")
    layouts = {k: registry.kernel(k).weight_layout(shape) for k in KERNELS}
    assert layouts["alpha_moe"].key != layouts["vllm_triton"].key
    assert layouts["vllm_triton"].bytes == 64 * 3 * 2048 * 1024 * 2


def test_more_tokens_never_launch_fewer_ctas(kernel: Kernel, registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("deepseek-v3-tp8", "fp8")
    small, large = (expert_histogram(generate("zipf1.2", t, 256, 8, seed=1), 256) for t in (50, 500))
    for c in usable_configs(kernel, shape, h200)[::23]:
        for grid in c.gemms:
            assert grid.logical(np.maximum(small, large)) >= grid.logical(small)
            assert grid.launched(500 * 8, 256) >= grid.logical(large)
