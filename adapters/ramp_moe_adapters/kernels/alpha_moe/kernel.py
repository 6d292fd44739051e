"""Alpha-MoE (Aleph-Alpha/Alpha-MoE): one fused fp8 block-scaled launch, up + SwiGLU + down, for Hopper.

The package itself is used unmodified; it must be installed only where the kernel is to run.

A CTA takes `block_m` tokens of one expert and 256 rows of the up-projection (block_n * warp_n, gate and up rows
interleaved), and reduces its part of the down projection into the output by atomic adds: the output is zeroed first.
Grid: x = N / 256, y = the padded tokens' upper bound / block_m; CTAs past the device-side token count exit at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    Batch,
    GridGeometry,
    Hardware,
    KernelConfig,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Stage,
    WeightLayout,
    Workspace,
    is_installed,
    version_of,
)
from ramp_moe_kernels.limits import too_many_experts

from .config import CTA_HIDDEN, LAYOUT, most_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedAlphaMoE

CTA_WEIGHT_ROWS = 256
BLOCK_K = 128
WARP_TILES = ((64, 4), (32, 8))
"""(block_n, warp_n): rows of one warp's tile, and consumer warps."""
DEFAULTS = ((1.0, 8, 5), (8.0, 16, 2), (16.0, 24, 2), (32.0, 48, 3), (64.0, 80, 3), (128.0, 72, 5))
"""(mean tokens of an active expert up to which it holds, block_m, stages), all with block_n 32 and warp_n 8: on average
best for the evenly routed batches of the four H200 sweeps that ship. DEFAULT_LARGE beyond the last."""
DEFAULT_LARGE = (80, 4)


def _valid(block_m: int, stages: int) -> bool:
    """Five pipeline stages fit into shared memory only up to a token block of 100."""
    return stages < 5 or block_m <= 100


class AlphaMoE(LaunchableKernel):
    """Takes bf16 hidden states; fp8 weights without biases, activation swiglu. Its additions to the output have no
    fixed order, so that two runs differ in bf16's last bits. A NaN in the input need not show in the output."""

    name = "alpha_moe"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if hardware.arch != "sm_90":
            return f"written for Hopper (sm_90), {hardware.name} is {hardware.arch}"
        if shape.dtype != "fp8":
            return f"takes fp8 block-scaled weights only, not {shape.dtype}"
        if shape.hidden_size % CTA_HIDDEN:
            return f"hidden_size {shape.hidden_size} is not a multiple of {CTA_HIDDEN}"
        if shape.gate_up_rows % CTA_WEIGHT_ROWS:
            return f"intermediate_size {shape.intermediate_size} is not a multiple of {CTA_WEIGHT_ROWS // 2}"
        return too_many_experts(shape)

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        return most_tokens(int(dict(config.params)["block_m"]), shape)

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [
            self._config(shape, block_m, block_n, warp_n, stages)
            for block_m in range(8, 129, 8)
            for block_n, warp_n in WARP_TILES
            for stages in range(1, 6)
            if _valid(block_m, stages)
        ]

    def _config(self, shape: MoEShape, block_m: int, block_n: int, warp_n: int, stages: int) -> KernelConfig:
        name = f"bm{block_m}-bn{block_n}-wn{warp_n}-st{stages}"
        grid = GridGeometry.fused(shape, block_m=block_m, block_n=CTA_WEIGHT_ROWS, block_k=BLOCK_K)
        return KernelConfig(
            name,
            (
                Stage("schedule", f"{self.name}/prepare/bm{block_m}"),  # quantises and zeroes beside
                Stage("gemm", f"{self.name}/{name}", grid),
            ),
            (("block_m", block_m), ("block_n", block_n), ("warp_n", warp_n), ("stages", stages)),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout(LAYOUT, shape.num_experts * shape.expert_bytes)

    def version(self) -> str:
        return version_of("alpha_moe")

    def unavailable(self) -> str | None:
        missing = [name for name in ("torch", "triton", "alpha_moe") if not is_installed(name)]
        if "alpha_moe" in missing:
            return "the package alpha_moe is missing; build Aleph-Alpha/Alpha-MoE from source with the installed torch"
        return f"{' and '.join(missing)} missing; pip install {' '.join(missing)}" if missing else None

    def prepare(self, weights: MoEWeights) -> PreparedAlphaMoE:
        """Interleave gate and up, which copies gate_up once, unless they are given so. Raises KernelError for weights,
        a device or an installation that the operator cannot work with."""
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        ids = num_tokens * shape.top_k
        mean = ids / min(ids, shape.num_experts)
        block_m, stages = next(((m, st) for most, m, st in DEFAULTS if mean <= most), DEFAULT_LARGE)
        return self._config(shape, block_m, 32, 8, stages)

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        """Two launches up to 4096 routed ids, three above: the schedule, which quantises and zeroes beside it, then
        the operator. Raises KernelError for fp16 hidden states and for batches beyond the operator's limits."""
        from .launch import launch_steps

        return launch_steps(config, prepared, batch, out, workspace)
