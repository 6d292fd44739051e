"""Counts the kernels that Triton would compile for batches of every size, without a GPU and without compiling.
test_sizes.py runs it in a separate process, since the other tests interpret kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from moe_cases import H200
from ramp_moe import KernelConfig, MoEShape
from ramp_moe.spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace
from ramp_moe_adapters.kernels.alpha_moe import launch as alpha_moe
from ramp_moe_adapters.kernels.alpha_moe.kernel import AlphaMoE
from ramp_moe_adapters.kernels.deep_gemm import launch as deep_gemm
from ramp_moe_adapters.kernels.deep_gemm.kernel import DeepGEMM
from ramp_moe_kernels.cute import launch as cute
from ramp_moe_kernels.cute.kernel import CuteMoE
from ramp_moe_kernels.triton.kernel import TritonMoE
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

MOST = 9000
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
Key = tuple[str, str]
found: set[Key] = set()
binders: dict[JITFunction, Callable[..., Any]] = {}


def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Note the key by which Triton finds the compiled kernel. Replaces a launch."""
    if self not in binders:
        binders[self] = create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialisation, options = binders[self](*args, **kwargs)
    found.add((self.fn.__name__, repr((specialisation, options))))


def weights_of(shape: MoEShape) -> MoEWeights:
    """Weights on the meta device. Their addresses are multiples of 16, as those of an allocator are."""
    e, h, i, fp8 = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.dtype == "fp8"
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    given = [torch.empty(e, 2 * i, h, dtype=dtype, device="meta"), torch.empty(e, h, i, dtype=dtype, device="meta")]
    if fp8:
        given += [torch.empty(e, 2 * i // 128, h // 128, dtype=torch.float32, device="meta")]
        given += [torch.empty(e, h // 128, i // 128, dtype=torch.float32, device="meta")]
    return MoEWeights(*given)


def prepared_of(kernel: LaunchableKernel, weights: MoEWeights) -> Any:
    if isinstance(kernel, AlphaMoE):
        return alpha_moe.PreparedAlphaMoE(
            weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale, lambda *_: None
        )
    return deep_gemm.PreparedDeepGEMM(weights, None) if isinstance(kernel, DeepGEMM) else kernel.prepare(weights)


def keys(kernel: LaunchableKernel, config: KernelConfig, shape: MoEShape, sizes: Any) -> set[Key]:
    found.clear()
    prepared, workspace = prepared_of(kernel, weights_of(shape)), Workspace()
    x = torch.empty(MOST, shape.hidden_size, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(MOST, shape.top_k, dtype=torch.int32, device="meta")
    weights = torch.empty(MOST, shape.top_k, dtype=torch.float32, device="meta")
    for size in sizes:
        kernel.launch(config, prepared, Batch(x[:size], ids[:size], weights[:size]), x[:size], workspace)
    return set(found)


def cases() -> list[tuple[str, LaunchableKernel, KernelConfig, MoEShape]]:
    """Every kernel that launches our Triton kernels, with one configuration for each set of launches."""
    shapes = [MoEShape(60, 6, 2048, 768, "fp8"), MoEShape(64, 8, 1024, 512, "bf16")]
    listed = []
    for kernel in (TritonMoE(), CuteMoE(), AlphaMoE(), DeepGEMM()):
        for shape in shapes:
            if kernel.unsupported(shape, H200):
                continue
            by_launches = {
                (*(s.key.partition("/bm")[0].split("/up/")[0] for s in config.stages), config.name[-4:]): config
                for config in kernel.configs(shape, H200)
            }
            listed += [
                (f"{kernel.name} {shape.dtype} {config.name}", kernel, config, shape) for config in by_launches.values()
            ]
    return listed


def main() -> None:
    """Print the missing kernels of each case, at every size for the first case of a kernel and at some for others."""
    for module in (cute, alpha_moe, deep_gemm):
        module.check_hopper = lambda *_: None  # type: ignore[attr-defined]
    cute.check_aligned = alpha_moe.check_aligned = lambda *_: None  # type: ignore[attr-defined]
    cute.compiled = lambda *_: lambda *_: None  # type: ignore[attr-defined, assignment]
    deep_gemm.gemm = lambda *_: None  # type: ignore[attr-defined, assignment]
    JITFunction.run = note
    seen = set[str]()
    for name, kernel, config, shape in cases():
        step = 97 if kernel.name in seen else 1
        seen.add(kernel.name)
        warmed = kernel.warm_sizes(shape, MOST)
        near = {size + d for size in warmed for d in (-1, 0, 1) if 0 < size + d <= MOST}
        needed = keys(kernel, config, shape, sorted({*range(1, MOST + 1, step), *near}))
        missing = [
            sorted({kernel for kernel, _ in needed - keys(kernel, config, shape, some)}) for some in (warmed, (1,))
        ]
        print(json.dumps({"case": name, "sizes": warmed, "missing": missing[0], "cold": missing[1]}), flush=True)


if __name__ == "__main__":
    main()
