"""Alpha-MoE (Aleph-Alpha/Alpha-MoE): one fused fp8 block-scaled launch, up + SwiGLU + down, for Hopper.

A CTA takes `block_m` tokens of one expert and 256 rows of the up-projection (block_n * warp_n, gate and up rows
interleaved), and reduces its part of the down projection into the output by atomic adds: the output is zeroed first.
Grid: x = N / 256, y = the padded tokens' upper bound / block_m; CTAs past the device-side token count exit at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ramp_moe import GridGeometry, Hardware, Kernel, KernelConfig, MoEShape, Stage, WeightLayout

CTA_WEIGHT_ROWS = 256
BLOCK_K = 128
CTA_HIDDEN = 256
"""Output columns that a CTA writes at a time; a remainder would stay unwritten."""
WARP_TILES = ((64, 4), (32, 8))
"""(block_n, warp_n): rows of one warp's tile, and consumer warps."""


def _valid(block_m: int, stages: int) -> bool:
    """Five pipeline stages fit into shared memory only up to a token block of 100."""
    return stages < 5 or block_m <= 100


class AlphaMoE(Kernel):
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
        return None

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
        grid = GridGeometry(
            block_tokens=block_m,
            block_weights=CTA_WEIGHT_ROWS,
            block_k=BLOCK_K,
            weight_rows=shape.gate_up_rows,
            reduction=shape.hidden_size,
            expert_bytes=shape.expert_bytes,
        )
        return KernelConfig(
            name,
            (
                Stage("quantise", "quantise/group128"),
                Stage("schedule", f"schedule/bm{block_m}"),
                Stage("zero", "zero/bf16"),
                Stage("gemm", f"{self.name}/{name}", grid),
            ),
            (("block_m", block_m), ("block_n", block_n), ("warp_n", warp_n), ("stages", stages)),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-up-interleaved-8", shape.num_experts * shape.expert_bytes)
