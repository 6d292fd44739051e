"""Of every kernel that is registered: what `unsupported` and `max_tokens` accept, the launch accepts. Tensors are on
meta, so that the largest batches take no memory; launches are followed up to the first of the GPU's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ramp_moe import Hardware, Kernel, KernelConfig, KernelError, MoEShape, Registry, get_registry
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.kernel import most_tokens, usable_configs, why_unsupported
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.alpha_moe import launch as alpha_moe_launch
from ramp_moe_adapters.kernels.deep_gemm import launch as deep_gemm_launch
from ramp_moe_adapters.kernels.flashinfer_cutlass import launch as flashinfer_cutlass_launch
from ramp_moe_adapters.kernels.humming import launch as humming_launch
from ramp_moe_adapters.kernels.humming.formats import KINDS
from ramp_moe_adapters.kernels.humming.weights import Side
from ramp_moe_adapters.kernels.marlin import launch as marlin_launch
from ramp_moe_adapters.kernels.vllm_triton import launch as vllm_triton_launch
from ramp_moe_kernels import limits
from ramp_moe_kernels.cute import launch as cute_launch
from ramp_moe_kernels.permute import permute
from ramp_moe_kernels.triton import forward
from ramp_moe_kernels.triton.kernel import TritonMoE
from ramp_moe_kernels.triton.schedule import max_tiles

META = torch.device("meta")
KERNELS = sorted(get_registry().kernels)
EXPERTS = (1, 8, 1023, 1024, 1025, 2048, 65_536)
SIZES = ((16, 16), (64, 64), (128, 128), (256, 128), (7168, 2048), (16384, 8192), (512, 192), (511, 512))


class Reached(Exception):
    """The checks are passed, and the GPU would be given its first work."""


class Launching:
    def __getitem__(self, grid: Any) -> Any:
        raise Reached


@pytest.fixture(autouse=True)
def up_to_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: Any, **kwargs: Any) -> Any:
        raise Reached

    for module in (forward, cute_launch, alpha_moe_launch, humming_launch, marlin_launch, permute):
        monkeypatch.setattr(module, "launch_schedule", reached)
    monkeypatch.setattr(forward.ops, "up", reached)
    monkeypatch.setattr(cute_launch, "load", lambda config: reached)
    monkeypatch.setattr(permute, "permute_kernel", Launching())
    for module in (humming_launch, marlin_launch):
        monkeypatch.setattr(module, "allocate", lambda size, device: torch.empty(size, device=device))
    monkeypatch.setattr(vllm_triton_launch, "routing", reached)
    monkeypatch.setattr(flashinfer_cutlass_launch, "routed_in_one_block", reached)


def prepared(kernel: Kernel, shape: MoEShape) -> Any:
    """What `prepare` makes of weights, where it takes neither a GPU nor the third party."""
    if kernel.name == "marlin":
        side = marlin_launch.MarlinWeights(torch.empty(0, device=META), torch.empty(0, device=META))
        return marlin_launch.PreparedMarlin(replace(shape, top_k=1), side, side, None, None, "swiglu", None)
    dtype = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}[shape.dtype]

    def of(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device=META)

    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    deep = -(-i // 128)
    scales = (of(e, 2 * deep, h // 128), of(e, h // 128, deep)) if shape.dtype == "fp8" else (None, None)
    weights = MoEWeights(of(e, 2 * i, h, dtype=dtype), of(e, h, i, dtype=dtype), *scales)
    if kernel.name == "alpha_moe":
        return alpha_moe_launch.PreparedAlphaMoE(weights.gate_up, scales[0], weights.down, scales[1], lambda *of: None)
    if kernel.name == "deep_gemm":
        return deep_gemm_launch.PreparedDeepGEMM(weights, None)
    if kernel.name == "cute":
        down = weights.down.permute(1, 2, 0)
        scale = of(2, 1, h // 128, e) if shape.dtype == "fp8" else of(2, 1, 1, e)
        return cute_launch.PreparedCute(weights.gate_up, scale, down, down, 0, shape.dtype)
    if kernel.name == "vllm_triton":
        return vllm_triton_launch.PreparedVllmTriton(weights, lambda: None, lambda: None, {}, {})
    if kernel.name == "flashinfer_cutlass":
        return flashinfer_cutlass_launch.PreparedFlashInfer(weights, lambda: None, lambda: None, {}, {})
    if kernel.name == "humming":
        side = Side("{}", weights.down, weights.down, None)
        kind = KINDS[shape.dtype]
        return humming_launch.PreparedHumming(
            replace(shape, top_k=1), kind, side, side, None, None, weights.activation, None
        )
    assert kernel.name == "triton"
    return weights


def launched(kernel: Any, config: KernelConfig, shape: MoEShape, tokens: int) -> None:
    dtype = torch.float16 if shape.dtype == "fp16" else torch.bfloat16
    x = torch.empty(tokens, shape.hidden_size, dtype=dtype, device=META)
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device=META)
    batch = Batch(x, ids, torch.empty(tokens, shape.top_k, device=META))
    kernel.launch(config, prepared(kernel, shape), batch, torch.empty_like(x), Workspace())


def shapes(kernel: Kernel) -> Iterator[MoEShape]:
    dtypes = ("int4-g32", "mxfp4") if kernel.name == "marlin" else ("fp8", "bf16", "fp16")
    for experts, (hidden, inter), dtype in itertools.product(EXPERTS, SIZES, dtypes):
        for top_k in {1, min(8, experts), min(22, experts)}:
            yield MoEShape(experts, top_k, hidden, inter, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_accepts_its_launch_accepts(name: str, registry: Registry, h200: Hardware) -> None:
    kernel = registry.kernel(name)
    seen = 0
    for shape in shapes(kernel):
        if why_unsupported(kernel, shape, h200) is not None:
            continue
        configs = usable_configs(kernel, shape, h200)
        for config in {configs[0], configs[len(configs) // 2], configs[-1]}:
            most = most_tokens(kernel, config, shape) or limits.MAX_IDS
            for tokens in (1, most):
                with pytest.raises(Reached):
                    launched(kernel, config, shape, tokens)
                seen += 1
            # What a layer is never to give: refused before anything runs, or no limit of the kernel's own.
            with pytest.raises((KernelError, Reached)):
                launched(kernel, config, shape, most + 1)
    assert seen > 50


@pytest.mark.parametrize("name", ["triton", "cute", "alpha_moe", "deep_gemm"])
def test_more_experts_than_the_schedule_sorts_are_refused_with_the_reason(
    name: str, registry: Registry, h200: Hardware
) -> None:
    kernel = registry.kernel(name)
    dtype = "fp8" if name == "alpha_moe" else "bf16"
    assert kernel.unsupported(MoEShape(1024, 8, 2048, 512, dtype), h200) is None
    reason = kernel.unsupported(MoEShape(2048, 8, 2048, 512, dtype), h200)
    assert reason == "2048 experts are more than the schedule's 1024"


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_that_a_kernel_does_not_take_are_named(name: str, registry: Registry, h200: Hardware) -> None:
    for dtype in ("bf16", "fp8"):
        for hidden, inter, size in ((511, 512, "511"), (512, 511, "511")):
            reason = why_unsupported(registry.kernel(name), MoEShape(64, 8, hidden, inter, dtype), h200)
            if name == "vllm_triton" and dtype == "bf16":
                continue  # masks its loads
            assert reason is not None
            assert size in reason or dtype in reason


@pytest.mark.parametrize("block", [1, 8, 64, 256])
@pytest.mark.parametrize("experts", [1, 7, 64])
def test_as_many_ids_as_tiles_allow(block: int, experts: int) -> None:
    for tiles in (0, 1, 6, 7, 8, 100):
        most = limits.max_ids(tiles, experts, block)
        assert max_tiles(most, experts, block) <= tiles
        assert max_tiles(most + block, experts, block) > tiles


@pytest.mark.parametrize(("hidden", "inter", "named"), [(511, 64, "hidden_size 511"), (64, 40, "intermediate_size 40")])
def test_a_layer_of_sizes_that_no_kernel_takes_says_so(hidden: int, inter: int, named: str, h200: Hardware) -> None:
    weights = MoEWeights(torch.zeros(2, 2 * inter, hidden).bfloat16(), torch.zeros(2, hidden, inter).bfloat16())
    with pytest.raises(KernelError, match=f"no kernel can compute .*triton: {named} is not a multiple of 16"):
        LayerRuntime(weights, 1, h200, [TritonMoE()])
