"""The description of a kernel for ramp-moe: its name, the shapes it takes, its configurations and grids, its launch.

The kernel itself is in `kernel.py`. `ramp-moe profile` measured the sweep in `profiles/` on a GPU. Triton is imported
on launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ramp_moe.plugin import (
    Batch,
    GridGeometry,
    Hardware,
    Kernel,
    KernelConfig,
    KernelError,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Stage,
    WeightLayout,
    Workspace,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BLOCK = 128


class SimpleTriton(LaunchableKernel):
    name = "simple_triton"
    requires = ("torch", "triton")

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if shape.dtype != "fp8" or hardware.fp8_flops is None:
            return "takes fp8 block-scaled weights on a GPU with fp8 units"
        if shape.hidden_size % SCALE_BLOCK or shape.intermediate_size % SCALE_BLOCK:
            return f"hidden_size and intermediate_size must be multiples of {SCALE_BLOCK}"
        return None

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self._config(shape, bm, bn) for bm in (16, 32, 64) for bn in (64, 128)]

    def _config(self, shape: MoEShape, bm: int, bn: int) -> KernelConfig:
        # A CTA of the first launch computes bn rows of gate and the same of up: 2 * bn weight rows.
        up = GridGeometry.gate_up(shape, block_m=bm, block_n=2 * bn, block_k=SCALE_BLOCK)
        down = GridGeometry.down(shape, block_m=bm, block_n=bn, block_k=SCALE_BLOCK)
        name = f"bm{bm}-bn{bn}"
        stages = (
            Stage("schedule", f"{self.name}/schedule-zero/bm{bm}"),
            Stage("gemm", f"{self.name}/up/{name}", up),
            Stage("gemm", f"{self.name}/down/{name}", down),
            Stage("combine", f"{self.name}/cast"),
        )
        return KernelConfig(name, stages, (("block_m", bm), ("block_n", bn)))

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        if weights.gate_up_scale is None or weights.activation != "swiglu":
            raise KernelError("simple_triton takes fp8 weights and computes swiglu")
        if weights.gate_up_bias is not None or weights.down_bias is not None:
            raise KernelError("simple_triton adds no biases")
        return weights

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        mean = num_tokens * shape.top_k / shape.num_experts
        return self._config(shape, *((16, 64) if mean <= 8 else (32, 64) if mean <= 16 else (64, 128)))

    def run(
        self, config: KernelConfig, prepared: MoEWeights, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        from .kernel import stages

        return stages(*(value for _, value in config.params), prepared, batch, out, workspace)


@hookimpl
def ramp_moe_kernels() -> Iterable[Kernel]:
    yield SimpleTriton()


@hookimpl
def ramp_moe_profiles() -> Iterable[Path]:
    yield Path(__file__).parent / "profiles"
