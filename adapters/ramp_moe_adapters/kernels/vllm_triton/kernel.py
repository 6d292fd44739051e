"""vLLM's Triton fused MoE (vllm 0.33): two grouped GEMM launches with the activation between them.

The package runs unmodified, through its public `fused_experts` and `override_config`. It must be installed only where
the kernel is to run.

Both launches use one configuration. Each has a grid of cdiv(EM, BLOCK_SIZE_M) * cdiv(N, BLOCK_SIZE_N). EM is the length
of moe_align_block_size's buffer, or the routed ids times BLOCK_SIZE_M if that is less. CTAs past the device-side token
count exit early. With at most num_experts / 4 routed ids, vLLM skips the alignment and gives every id its own tile. The
logical grid here still merges the ids of one expert, so it is then a lower bound.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ramp_moe.evaluation.vllm_table import Launch
from ramp_moe.plugin import (
    SCALE_BLOCK,
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
    fp8_unsupported,
    version_of,
)
from ramp_moe_kernels.limits import MAX_ELEMENTS, max_tokens

from . import static_table as vllm_static

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedVllmTriton

VERSIONS = ((0, 33), (0, 34))
"""Supported versions: from the first on, below the second. The adapter follows their source."""
INSTALL = "https://docs.vllm.ai/en/latest/getting_started/installation.html"

# A part of the grid that vLLM's tuning script (benchmarks/kernels/benchmark_moe.py) searches on NVIDIA GPUs: what
# differs in its CTAs or in their occupancy. The whole grid has 1,248 configurations, which take hours to compile.
BLOCK_M = (16, 32, 64, 128, 256)
BLOCK_N = (32, 64, 128, 256)
BLOCK_K = (64, 128)
GROUP_M = (1, 16)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4)
ACCUMULATORS = (8, 128)
"""Fewest and most float32 accumulators of a thread: fewer leave the tensor cores idle, more are spilled."""

MAX_EXPERTS = 992
"""moe_align_block_size takes fewer than 1024 experts, rounded up to whole warps of 32."""


def _fits(shape: MoEShape, hardware: Hardware, launch: Launch) -> bool:
    """Whether a launch fits the hardware and the dtype.

    The pipeline's operand tiles must fit into one SM's shared memory, less the 1 KiB that the system reserves. The
    accumulators must fit into a thread's registers. With block scales, a step must be as deep as a block: vLLM cuts a
    deeper step into blocks, and a shallower one reads scales twice.
    """
    tiles = launch.stages * (launch.block_m + launch.block_n) * launch.block_k * shape.format.bits // 8
    accumulators = launch.block_m * launch.block_n / (launch.warps * 32)
    return (
        tiles <= hardware.smem_per_sm_bytes - 1024
        and ACCUMULATORS[0] <= accumulators <= ACCUMULATORS[1]
        and (shape.dtype != "fp8" or launch.block_k == SCALE_BLOCK)
    )


@functools.lru_cache(maxsize=1024)
def _grids(shape: MoEShape, block_m: int, block_n: int, block_k: int) -> tuple[GridGeometry, GridGeometry]:
    """The grids of both projections, which launches of equal tiles share."""
    up, down = (
        describe(shape, block_m=block_m, block_n=block_n, block_k=block_k, align_block_size=True)
        for describe in (GridGeometry.gate_up, GridGeometry.down)
    )
    return up, down


class VllmTriton(LaunchableKernel):
    """Takes bf16 and fp16 weights, with hidden states of the same dtype, and fp8 weights.

    fp8 is e4m3 W8A8 with [128, 128] weight scales. The activation is swiglu or gelu_tanh; biases are supported. In fp8,
    vLLM rounds the scales of activations to powers of two on Hopper and Blackwell, unless VLLM_USE_DEEP_GEMM_E8M0=0.

    Skipped ids cost as much as routed ones: by itself vLLM would read out of bounds for them, or leave their sums
    uninitialised (see `launch.py`). vLLM's configuration is a global of its module. Launches of this process hold a
    lock, but a vLLM engine in another thread of the process could see their configuration.
    """

    name = "vllm_triton"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if reason := fp8_unsupported(shape, hardware):
            return reason
        if shape.dtype == "fp8" and hardware.arch == "gfx942":
            return f"vLLM computes fp8 as e4m3fnuz on {hardware.name}, not as e4m3fn"
        if shape.num_experts > MAX_EXPERTS:
            return f"{shape.num_experts} experts are more than the {MAX_EXPERTS} that moe_align_block_size takes"
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        """The most tokens that keep vLLM's buffers below 2^31 elements. Larger ones are untested."""
        return max_tokens(shape, MAX_ELEMENTS // max(shape.hidden_size, shape.gate_up_rows))

    def unavailable(self) -> str | None:
        low, high = (".".join(map(str, v)) for v in VERSIONS)
        remedy = f"pip install 'vllm>={low},<{high}' in an environment of its own, see {INSTALL}"
        if vllm_static.package() is None:
            return f"the package vllm is missing; {remedy}"
        missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
        if missing:
            return f"vllm is there, but {' and '.join(missing)} missing; {remedy}"
        try:
            found = metadata.version("vllm")
        except metadata.PackageNotFoundError:  # run from its sources; the launch checks the functions it calls
            return None
        number = re.match(r"(\d+)\.(\d+)", found)
        if number is None or not VERSIONS[0] <= (int(number[1]), int(number[2])) < VERSIONS[1]:
            return f"vllm {found} is not a version that this adapter supports; {remedy}"
        return None

    def version(self) -> str:
        return version_of("vllm")

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        """The configurations of tuned files for the shape, those that vLLM's heuristic can choose, and the grid above.

        Tuned files are the user's and, if vllm is installed, the shipped one. If a profile holds a configuration of a
        tuned file that is now missing, that configuration is left out.
        """
        tuned = (e for table in vllm_static.tuned_tables(shape, hardware) for e in table.entries.values())
        every = itertools.product(BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, NUM_WARPS, NUM_STAGES)
        grid = (launch for launch in itertools.starmap(Launch, every) if _fits(shape, hardware, launch))
        launches = dict.fromkeys(itertools.chain(tuned, vllm_static.heuristic_launches(shape, hardware), grid))
        return [self.describe(launch, shape) for launch in launches]

    def describe(self, launch: Launch, shape: MoEShape) -> KernelConfig:
        """Describe a launch."""
        name = launch.name
        up, down = _grids(shape, launch.block_m, launch.block_n, launch.block_k)
        quantise = (Stage("quantise", "quantise/group128"),) if shape.dtype == "fp8" else ()
        activation = "activation/silu-quantise" if shape.dtype == "fp8" else "activation/silu"
        return KernelConfig(
            name,
            (
                *quantise,
                Stage("schedule", f"schedule/bm{launch.block_m}"),
                Stage("gemm", f"{self.name}/up/{name}", up),
                Stage("activation", activation),
                Stage("gemm", f"{self.name}/down/{name}", down),
                Stage("combine", "combine/sum"),
            ),
            launch.params,
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def prepare(self, weights: MoEWeights) -> PreparedVllmTriton:
        """Take the weights as they are, and add vLLM's description of their scales and biases.

        Raises KernelError for an activation that vLLM lacks, and if vLLM cannot be imported or has other functions.
        """
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """vLLM's own choice by batch size."""
        return self.describe(vllm_static.static_launch(shape, hardware, num_tokens), shape)

    def run(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> None:
        """Run vLLM's launches, and copy the result that vLLM allocates to `out`, which may be the hidden states.

        Raises KernelError for a batch that does not fit the weights.
        """
        from .launch import launch

        launch(config, prepared, batch, out, workspace)
