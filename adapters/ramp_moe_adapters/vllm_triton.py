"""vLLM's Triton fused MoE (vllm 0.33): two grouped GEMM launches with the activation between them.

Both launches use one configuration. Grid of each: cdiv(EM, BLOCK_SIZE_M) * cdiv(N, BLOCK_SIZE_N), where EM is the
length of moe_align_block_size's buffer; CTAs past the device-side token count exit early. With at most num_experts / 4
routed ids vLLM skips the alignment and gives every id a tile of its own; the logical grid here still merges the ids of
one expert, so it is a lower bound there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ramp_moe import GridGeometry, Hardware, Kernel, KernelConfig, MoEShape, Stage, WeightLayout
from ramp_moe.kernel import fp8_unsupported
from ramp_moe.shapes import DTYPE_BYTES, SCALE_BLOCK

# The grid that vLLM's own tuning script (benchmarks/kernels/benchmark_moe.py) searches on NVIDIA GPUs.
BLOCK_M = (16, 32, 64, 128, 256)
BLOCK_N = (32, 64, 128, 256)
BLOCK_K = (64, 128, 256)
GROUP_M = (1, 16, 32, 64)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4, 5)


def _fits(shape: MoEShape, hardware: Hardware, block_m: int, block_n: int, block_k: int, stages: int) -> bool:
    """The pipeline's operand tiles fit into one SM's shared memory, less the 1 KiB that the system reserves."""
    tiles = stages * (block_m + block_n) * block_k * DTYPE_BYTES[shape.dtype]
    return tiles <= hardware.smem_per_sm_bytes - 1024


class VllmTriton(Kernel):
    name = "vllm_triton"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return fp8_unsupported(shape, hardware)

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [
            self._config(shape, *values)
            for values in itertools.product(BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, NUM_WARPS, NUM_STAGES)
            # Under block scales a deeper step runs as one of SCALE_BLOCK: the same launch twice.
            if (shape.dtype != "fp8" or values[2] <= SCALE_BLOCK)
            and _fits(shape, hardware, values[0], values[1], values[2], values[5])
        ]

    def _config(
        self, shape: MoEShape, bm: int, bn: int, bk: int, group_m: int, warps: int, stages: int
    ) -> KernelConfig:
        name = f"bm{bm}-bn{bn}-bk{bk}-gm{group_m}-w{warps}-st{stages}"
        up, down = (
            GridGeometry(
                block_tokens=bm,
                block_weights=bn,
                block_k=bk,
                weight_rows=rows,
                reduction=reduction,
                expert_bytes=shape.matrix_bytes(rows, reduction),
                align_block_size=True,
            )
            for rows, reduction in (
                (shape.gate_up_rows, shape.hidden_size),
                (shape.hidden_size, shape.intermediate_size),
            )
        )
        quantise = (Stage("quantise", "quantise/group128"),) if shape.dtype == "fp8" else ()
        activation = "activation/silu-quantise" if shape.dtype == "fp8" else "activation/silu"
        return KernelConfig(
            name,
            (
                *quantise,
                Stage("schedule", f"schedule/bm{bm}"),
                Stage("gemm", f"{self.name}/up/{name}", up),
                Stage("activation", activation),
                Stage("gemm", f"{self.name}/down/{name}", down),
                Stage("combine", "combine/sum"),
            ),
            (
                ("BLOCK_SIZE_M", bm),
                ("BLOCK_SIZE_N", bn),
                ("BLOCK_SIZE_K", bk),
                ("GROUP_SIZE_M", group_m),
                ("num_warps", warps),
                ("num_stages", stages),
            ),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)
