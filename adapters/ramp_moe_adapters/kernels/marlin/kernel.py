"""Marlin in vLLM 0.33: two persistent grouped GEMMs of bf16 activations with INT4 or MXFP4 weights.

Our schedule, activation and weighted sum surround them. The library runs unmodified, and vLLM's Python code not at all.
vllm must be installed only where the kernel is to run.

A launch has one to four CTAs per SM. They divide sum_e ceil(h_e / block_m) * N / thread_n tiles of K / thread_k steps
evenly among themselves, so that a tile may be shared along k.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    Batch,
    Hardware,
    KernelConfig,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Place,
    Stage,
    WeightLayout,
    Workspace,
    digest_of,
    is_installed,
    version_of,
)
from ramp_moe_kernels.limits import too_many_experts

from .config import TOKEN_BLOCKS, TYPES, MarlinTile, geometry, misfit, most_tokens, own_block, params, tiles

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedMarlin

LAUNCH = Path(__file__).with_name("launch.py")
RUNS = (Place(LAUNCH, "prepare"), Place(LAUNCH, "launch_steps"))
"""Our code that affects the times; the version digests it."""
VERSIONS = ((0, 33), (0, 34))
"""Supported versions of vllm: from the first on, below the second."""
INSTALL = "https://docs.vllm.ai/en/latest/getting_started/installation.html"


class Marlin(LaunchableKernel):
    """Takes bf16 hidden states, any activation and biases. Weights are INT4 or MXFP4, multiplied as bf16.

    As in vLLM, scales of INT4 groups are rounded to bf16. The weights are repacked: Marlin's layout is its own. The
    wheel has the kernels as PTX for Hopper, which the driver compiles when they first run.
    """

    name = "marlin"
    hidden_dtypes = ("bf16",)
    formats = tuple(TYPES)

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if hardware.arch != "sm_90":
            return f"described for Hopper (sm_90), {hardware.name} is {hardware.arch}"
        if reason := shape.format.misfit(shape.hidden_size, shape.intermediate_size):
            return reason
        if reason := misfit(shape) or too_many_experts(shape):
            return reason
        if not most_tokens(shape, shape.top_k):
            return "one token's rows exceed its 32-bit offsets"
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        return most_tokens(shape, shape.top_k)

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [
            self.describe(block, up, down, shape, hardware)
            for block in TOKEN_BLOCKS
            for up, down in itertools.product(tiles(shape, "up", block), tiles(shape, "down", block))
        ]

    def describe(
        self, block_m: int, up: MarlinTile, down: MarlinTile, shape: MoEShape, hardware: Hardware
    ) -> KernelConfig:
        """Describe a pair of tiles with one token block."""
        key = f"bm{block_m}"
        return KernelConfig(
            f"{key}-up({up.name})-down({down.name})",
            (
                Stage("schedule", f"{self.name}/schedule/{key}"),
                Stage("gemm", f"{self.name}/up/{key}-{up.name}", geometry(up, block_m, shape, "up", hardware)),
                Stage("activation", f"{self.name}/activate"),
                Stage("gemm", f"{self.name}/down/{key}-{down.name}", geometry(down, block_m, shape, "down", hardware)),
                Stage("combine", f"{self.name}/combine"),
            ),
            params(block_m, up, down),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout(f"marlin/{shape.dtype}", shape.num_experts * shape.expert_bytes)

    def version(self) -> str:
        """vLLM's version, with a digest of our code around its library."""
        return f"{version_of('vllm')}+{digest_of(*RUNS)}"

    def unavailable(self) -> str | None:
        low, high = (".".join(map(str, v)) for v in VERSIONS)
        remedy = f"pip install 'vllm>={low},<{high}' in an environment of its own, see {INSTALL}"
        if missing := [name for name in ("torch", "triton") if not is_installed(name)]:
            return f"{' and '.join(missing)} missing; {remedy}"
        if importlib.util.find_spec("vllm") is None:
            return f"the package vllm is missing; {remedy}"
        try:
            found = metadata.version("vllm")
        except metadata.PackageNotFoundError:  # its library alone; prepare checks the operator
            return None
        number = re.match(r"(\d+)\.(\d+)", found)
        if number is None or not VERSIONS[0] <= (int(number[1]), int(number[2])) < VERSIONS[1]:
            return f"vllm {found} is not a version that this adapter supports; {remedy}"
        return None

    def prepare(self, weights: MoEWeights) -> PreparedMarlin:
        """Repack the weights, which are copied once.

        Raises KernelError for weights, a device or an installation that it cannot use.
        """
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """vLLM's own token block, and tiles of the library's own choice."""
        block = own_block(shape, num_tokens)
        return self.describe(block, tiles(shape, "up", block)[0], tiles(shape, "down", block)[0], shape, hardware)

    def warm_sizes(self, shape: MoEShape, max_tokens: int) -> Sequence[int]:
        """The sizes of the Triton kernels around the GEMMs."""
        from ramp_moe_kernels.triton.sizes import warm_sizes

        return warm_sizes(shape, max_tokens)

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        """Launch Marlin's two GEMMs, and around them three to four launches of ours.

        Raises KernelError for fp16 hidden states.
        """
        from .launch import launch_steps

        return launch_steps(config, prepared, batch, out, workspace)
