"""Humming (humming-kernels 0.1.20): two persistent indexed GEMMs for Hopper, for weights of 8 and 4 bits.

Our schedule, activation and weighted sum surround them. The package runs unmodified. It must be installed only where
the kernel is to run or to be compiled.

A launch has num_sms * ctas_per_sm persistent CTAs. They compute sum_e ceil(h_e / block_m) * N / block_n tiles, N
fastest. With stream-K they share the tiles of the last wave along k. Humming's own choice knows the number of rows
alone; it is this kernel's default.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    Batch,
    BuildableKernel,
    Built,
    Hardware,
    KernelConfig,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Place,
    Progress,
    Stage,
    WeightLayout,
    Workspace,
    digest_of,
    fp8_unsupported,
    version_of,
)
from ramp_moe_kernels.limits import too_many_experts

from . import package
from .build import build, prune
from .config import WarpTile, geometry, most_tokens, params, tiles
from .formats import KINDS, Which, misfit, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedHumming

LAUNCH = Path(__file__).with_name("launch.py")
RUNS = (Place(LAUNCH, "prepare"), Place(LAUNCH, "launch_steps"))
"""Our code that affects the times; the version digests it."""
PROJECTIONS: tuple[Which, ...] = ("up", "down")
POWERS = tuple(2**i for i in range(14))
"""Numbers of tokens for which Humming's own choice is among the configurations."""
FILL = 0.9
"""Share of a token block that the mean load fills at least, if Humming's own choice is missing."""


class Humming(LaunchableKernel, BuildableKernel):
    """Takes bf16 hidden states, any activation and biases. Weights are fp8, INT4 or MXFP4.

    fp8 has scales of blocks [128, 128], rows or matrices, and activations are rounded. INT4 and MXFP4 are multiplied
    with bf16, or with -a8 with activations rounded to fp8. As in vLLM, scales of rows and of INT4 groups are rounded
    to bf16. The weights are repacked: Humming's layout is its own.

    Tiles are compiled at their first use, in about two seconds each; `ramp-moe kernels build --kernel humming` does it
    ahead of time.
    """

    name = "humming"
    hidden_dtypes = ("bf16",)
    formats = tuple(KINDS)

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if hardware.arch != "sm_90":
            return f"described for Hopper (sm_90), {hardware.name} is {hardware.arch}"
        if shape.dtype == "fp8" and (reason := fp8_unsupported(shape, hardware)):
            return reason
        if reason := misfit(shape):
            return reason
        if reason := too_many_experts(shape):
            return reason
        if not most_tokens(shape, shape.top_k):
            return "one token's rows exceed its 32-bit offsets"
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        return most_tokens(shape, shape.top_k)

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        """Pairs of tiles with one token block; beside the GPU, also Humming's own pairs for powers of two tokens."""
        return _configs(self, shape, hardware, _chooses(hardware))

    def describe(self, up: WarpTile, down: WarpTile, shape: MoEShape, hardware: Hardware) -> KernelConfig:
        """Describe a pair of tiles."""
        kind = KINDS[shape.dtype]
        blocks = f"bm{up.block_m}" + (f"+bm{down.block_m}" if up.block_m != down.block_m else "")
        rounded = "bf16" if kind.a_bits == 16 else "group" if kind.a_group else "token"
        quantise = (Stage("quantise", f"{self.name}/quantise"),) if rounded == "token" else ()
        return KernelConfig(
            f"up({up.name})-down({down.name})",
            (
                *quantise,
                Stage("schedule", f"{self.name}/schedule/{blocks}{'-quantise' if kind.a_group else ''}"),
                Stage("gemm", f"{self.name}/up/{up.name}", geometry(up, shape, "up", hardware)),
                Stage("activation", f"{self.name}/activate/{rounded}"),
                Stage("gemm", f"{self.name}/down/{down.name}", geometry(down, shape, "down", hardware)),
                Stage("combine", f"{self.name}/combine"),
            ),
            params(up, down),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        each = sum(sizes(shape, which).expert_bytes for which in PROJECTIONS)
        return WeightLayout(f"humming/{shape.dtype}", shape.num_experts * max(each, shape.expert_bytes))

    def version(self) -> str:
        """Humming's version, with a digest of our code around it."""
        return f"{version_of('humming')}+{digest_of(*RUNS)}"

    def unavailable(self) -> str | None:
        return package.problem()

    def build(self, shape: MoEShape, hardware: Hardware, report: Progress, jobs: int | None = None) -> Built:
        """Compile in other processes what Humming's cache lacks: some 140 tiles, each in about two seconds.

        Raises KernelError if something is missing.
        """
        return build(shape, hardware, self.configs(shape, hardware), report, jobs)

    def prune(self) -> int:
        """Delete what other installations of Humming, now gone, left in its cache, and return the bytes freed."""
        return prune()

    def prepare(self, weights: MoEWeights) -> PreparedHumming:
        """Repack the weights, which are copied once.

        Raises KernelError for weights, a device or an installation that it cannot use.
        """
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """Humming's own choice by the number of rows. Without it, the smallest block that holds the mean load."""
        rows = num_tokens * shape.top_k
        if _chooses(hardware):
            tables = [package.own_table(shape, which) for which in PROJECTIONS]
            own = [next((tile for most, tile in table if rows <= most), None) for table in tables]
            if own[0] is not None and own[1] is not None:
                return self.describe(own[0], own[1], shape, hardware)
        load = rows / min(rows, shape.num_experts) * FILL
        pairs = _pairs(shape)
        up, down = next((pair for pair in pairs if pair[0].block_m >= load), pairs[-1])
        return self.describe(up, down, shape, hardware)

    def warm_sizes(self, shape: MoEShape, max_tokens: int) -> Sequence[int]:
        """The sizes of the Triton kernels around the GEMMs."""
        from ramp_moe_kernels.triton.quantise import MANY_GROUPS
        from ramp_moe_kernels.triton.sizes import warm_sizes

        group = KINDS[shape.dtype].a_group
        ids = (MANY_GROUPS * group // shape.hidden_size * shape.top_k,) if group else ()
        return warm_sizes(shape, max_tokens, ids=ids)

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        """Launch Humming's two GEMMs, and around them three to six launches of ours.

        Raises KernelError for fp16 hidden states, and if a tile cannot be compiled.
        """
        from .launch import launch_steps

        return launch_steps(config, prepared, batch, out, workspace)


@functools.lru_cache(maxsize=256)
def _pairs(shape: MoEShape) -> tuple[tuple[WarpTile, WarpTile], ...]:
    """Pairs of tiles with one token block, the smallest first."""
    every = itertools.product(tiles(shape, "up"), tiles(shape, "down"))
    return tuple(sorted((p for p in every if p[0].block_m == p[1].block_m), key=lambda p: p[0].block_m))


@functools.lru_cache(maxsize=256)
def _configs(kernel: Humming, shape: MoEShape, hardware: Hardware, chooses: bool) -> tuple[KernelConfig, ...]:
    pairs = dict.fromkeys(_pairs(shape))
    for tokens in POWERS if chooses else ():
        up, down = (package.own_choice(shape, which, tokens * shape.top_k) for which in PROJECTIONS)
        if up is not None and down is not None:
            pairs[up, down] = None
    return tuple(kernel.describe(up, down, shape, hardware) for up, down in pairs)


@functools.lru_cache(maxsize=64)
def _chooses(hardware: Hardware) -> bool:
    """Whether Humming can be asked for its own choice: it is installed, and this GPU is like the hardware."""
    if package.problem() is not None:
        return False
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return False
    return torch.cuda.get_device_properties().multi_processor_count == hardware.num_sms
