"""vLLM's Triton fused MoE (vllm 0.33): two grouped GEMM launches with the activation between them.

The installed package runs unmodified, through its public `fused_experts` and `override_config`; it must be installed
only where the kernel is to run. Both launches use one configuration. Grid of each: cdiv(EM, BLOCK_SIZE_M) * cdiv(N,
BLOCK_SIZE_N), where EM is the length of moe_align_block_size's buffer, or the routed ids times BLOCK_SIZE_M where that
is less; CTAs past the device-side token count exit early. With at most num_experts / 4 routed ids vLLM skips the
alignment and gives every id a tile of its own; the logical grid here still merges the ids of one expert, so it is a
lower bound there.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ramp_moe.evaluation.vllm_table import Launch
from ramp_moe.plugin import (
    DTYPE_BYTES,
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
"""From the first on, below the second: those whose source this adapter was written against."""
INSTALL = "https://docs.vllm.ai/en/latest/getting_started/installation.html"

# Of the grid that vLLM's own tuning script (benchmarks/kernels/benchmark_moe.py) searches on NVIDIA GPUs, what differs
# in its CTAs or in their occupancy. Searched as a whole, its 1,248 configurations take hours to compile.
BLOCK_M = (16, 32, 64, 128, 256)
BLOCK_N = (32, 64, 128, 256)
BLOCK_K = (64, 128)
GROUP_M = (1, 16)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4)
ACCUMULATORS = (8, 128)
"""Of a thread, float32: fewer leave the tensor cores idle, more are spilled."""

MAX_EXPERTS = 992
"""moe_align_block_size takes fewer than 1024 experts, rounded up to whole warps of 32."""


def _fits(shape: MoEShape, hardware: Hardware, launch: Launch) -> bool:
    """The pipeline's operand tiles fit into one SM's shared memory, less the 1 KiB that the system reserves, and the
    accumulators into a thread's registers. Under block scales a step is as deep as their block: a deeper one is cut
    into those, a shallower one reads scales twice."""
    tiles = launch.stages * (launch.block_m + launch.block_n) * launch.block_k * DTYPE_BYTES[shape.dtype]
    accumulators = launch.block_m * launch.block_n / (launch.warps * 32)
    return (
        tiles <= hardware.smem_per_sm_bytes - 1024
        and ACCUMULATORS[0] <= accumulators <= ACCUMULATORS[1]
        and (shape.dtype != "fp8" or launch.block_k == SCALE_BLOCK)
    )


class VllmTriton(LaunchableKernel):
    """bf16 and fp16 of the weights' dtype, and fp8 (e4m3 W8A8, [128, 128] weight scales); swiglu and gelu_tanh; biases.

    In fp8, vLLM rounds the scales of activations to powers of two on Hopper and Blackwell, unless
    VLLM_USE_DEEP_GEMM_E8M0=0.

    Ids that are to be skipped, which vLLM would read out of bounds or leave uninitialised sums for, cost as much as
    routed ones: see `vllm_triton_launch`. vLLM's configuration is a global of its module: launches of this process hold
    a lock, but a vLLM engine that runs in another thread of it could see theirs.
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
        """As many as keep vLLM's buffers below 2^31 elements: larger ones were never tried."""
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
        except metadata.PackageNotFoundError:  # run from its sources: the launch checks the functions themselves
            return None
        number = re.match(r"(\d+)\.(\d+)", found)
        if number is None or not VERSIONS[0] <= (int(number[1]), int(number[2])) < VERSIONS[1]:
            return f"vllm {found} is not one of the versions that this adapter was written for; {remedy}"
        return None

    def version(self) -> str:
        return version_of("vllm")

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        """Those of the tuned files for the shape (the user's and, where vllm is installed, the shipped one), what the
        heuristic can name, and the grid above. A recorded configuration of a tuned file that is not
        there when the recording is read is left out."""
        tuned = (e for table in vllm_static.tuned_tables(shape, hardware) for e in table.entries.values())
        every = itertools.product(BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, NUM_WARPS, NUM_STAGES)
        grid = (launch for launch in itertools.starmap(Launch, every) if _fits(shape, hardware, launch))
        launches = dict.fromkeys(itertools.chain(tuned, vllm_static.heuristic_launches(shape, hardware), grid))
        return [self.describe(launch, shape) for launch in launches]

    def describe(self, launch: Launch, shape: MoEShape) -> KernelConfig:
        """A launch as the library sees it."""
        up, down = (
            describe(
                shape,
                block_m=launch.block_m,
                block_n=launch.block_n,
                block_k=launch.block_k,
                align_block_size=True,
            )
            for describe in (GridGeometry.gate_up, GridGeometry.down)
        )
        quantise = (Stage("quantise", "quantise/group128"),) if shape.dtype == "fp8" else ()
        activation = "activation/silu-quantise" if shape.dtype == "fp8" else "activation/silu"
        return KernelConfig(
            launch.name,
            (
                *quantise,
                Stage("schedule", f"schedule/bm{launch.block_m}"),
                Stage("gemm", f"{self.name}/up/{launch.name}", up),
                Stage("activation", activation),
                Stage("gemm", f"{self.name}/down/{launch.name}", down),
                Stage("combine", "combine/sum"),
            ),
            launch.params,
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def prepare(self, weights: MoEWeights) -> PreparedVllmTriton:
        """The weights as they are, with vLLM's description of their scales and biases. Raises KernelError for an
        activation that vLLM has not, or a vLLM that cannot be imported or has other functions."""
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """vLLM's own static choice."""
        return self.describe(vllm_static.static_launch(shape, hardware, num_tokens), shape)

    def run(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> None:
        """vLLM allocates its result, which is copied to `out`; hidden_states are only read, and `out` may be the same.
        Raises KernelError for a batch that does not fit the weights."""
        from .launch import launch

        launch(config, prepared, batch, out, workspace)
