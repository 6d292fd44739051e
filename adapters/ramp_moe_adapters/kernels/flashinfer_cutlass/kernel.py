"""FlashInfer's CUTLASS MoE (flashinfer-python 0.7.2.post1): two persistent grouped GEMMs for Hopper.

Routing, activation and finalising surround them. The package runs unmodified, through its public `cutlass_fused_moe`.
It must be installed only where the kernel is to run.

In bf16 a configuration is a pair of tactics, which `profile_ids` forces; `config.py` lists the pairs. A plain tactic
has the tokens along the tile's M, a swapped one along its N. CTAs compute sum_e ceil(h_e / tokens) * ceil(N / weights)
tiles. Ampere's kernel for the first GEMM applies the activation itself: a CTA takes equal numbers of gate and up rows.

With fp8 block scales FlashInfer ignores `profile_ids`, so a process has one configuration: FlashInfer's copy of
DeepGEMM. With TRTLLM_DG_ENABLED=0 in the environment, it is a fixed tile instead. The copy's tile depends on the number
of tokens: below 128 it holds all of them, and from there on 128. Its M-tiles are thus always those of a block of 128.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    Batch,
    BuildableKernel,
    Built,
    GridGeometry,
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
    is_installed,
    version_of,
)
from ramp_moe_kernels.limits import MAX_ELEMENTS, max_tokens

from . import build
from .config import ALIGNMENT, LAYOUT, WITHOUT_DEEP_GEMM, Fp8Tile, Tactic, fp8_tile, pairs, tactics

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedFlashInfer

LAUNCH = Path(__file__).with_name("launch.py")
RUNS = (Place(LAUNCH, "prepare"), Place(LAUNCH, "launch"))
"""Our code that affects the times; the version digests it."""
AMPERE_STEP = 64
"""Divisor of the sizes that Ampere's kernels take."""
BLOCK_K = {"bf16": 64, "fp8": 128}
MANY_TOKENS = 8192
"""Number of tokens for which the fp8 tile is described."""
SMEM_OF_CTA = 1024
"""Bytes of shared memory that the system reserves per CTA."""
MAX_RESIDENT = 2
"""The most CTAs of Ampere's kernels on one SM."""
KNOWN = ("0.7.2.post1",)
"""Versions whose order of tactics is known."""
DEFAULT_TOKENS = (16, 32, 64, 128)
"""Tokens per tile of the default configurations."""


class FlashInferCutlass(LaunchableKernel, BuildableKernel):
    """Takes bf16 hidden states and the activation swiglu. Weights are bf16, also with biases, or fp8 without.

    fp8 is e4m3 W8A8 with [128, 128] weight scales. Configurations that finalise in the second GEMM ("-fin") add to the
    output in bf16 and in no fixed order, so two runs differ in the last bits. The module is compiled at its first use,
    which takes hours; `ramp-moe kernels build --kernel flashinfer_cutlass` compiles it ahead of time.
    """

    name = "flashinfer_cutlass"
    hidden_dtypes = ("bf16",)
    counts_repeats = False

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if hardware.arch != "sm_90":
            return f"described for Hopper (sm_90), {hardware.name} is {hardware.arch}"
        if shape.dtype not in BLOCK_K:
            return f"takes bf16 or fp8 block-scaled weights, not {shape.dtype}"
        if reason := fp8_unsupported(shape, hardware):
            return reason
        for what in ("hidden_size", "intermediate_size"):
            if getattr(shape, what) % ALIGNMENT:
                return f"{what} {getattr(shape, what)} is not a multiple of {ALIGNMENT}"
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        """The most tokens that keep FlashInfer's buffers below 2^31 elements. Larger ones are untested."""
        return max_tokens(shape, MAX_ELEMENTS // max(shape.hidden_size, shape.gate_up_rows))

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        """The pairs of `pairs` in bf16, or in fp8 the one configuration that this process runs."""
        if shape.dtype == "fp8":
            return [self._fp8_config(shape, hardware)]
        ampere = not shape.hidden_size % AMPERE_STEP and not shape.intermediate_size % AMPERE_STEP
        return [self.describe(up, down, shape, hardware) for up, down in pairs(ampere)]

    def describe(self, up: Tactic, down: Tactic, shape: MoEShape, hardware: Hardware) -> KernelConfig:
        """Describe a pair of bf16 tactics, one of each GEMM."""
        fused = up.stages > 0  # gate and up in one CTA
        grids = (
            _grid(GridGeometry.gate_up, shape, hardware, up, halves=2 if fused else 1),
            _grid(GridGeometry.down, shape, hardware, down),
        )
        stages = [
            Stage("schedule", f"{self.name}/route"),  # also copies the tokens' rows
            Stage("gemm", f"{self.name}/up/{up.name}", grids[0]),
        ]
        if not fused:
            stages.append(Stage("activation", f"{self.name}/activate"))
        if down.finalised:
            stages.append(Stage("zero", f"{self.name}/zero"))
        stages.append(Stage("gemm", f"{self.name}/down/{down.name}", grids[1]))
        if not down.finalised:
            stages.append(Stage("combine", f"{self.name}/finalise"))
        params = (("gemm1", up.index), ("gemm2", down.index))
        return KernelConfig(f"up({up.name})-down({down.name})", tuple(stages), params)

    def _fp8_config(self, shape: MoEShape, hardware: Hardware) -> KernelConfig:
        deep_gemm = os.environ.get("TRTLLM_DG_ENABLED", "1") != "0"
        name = "deepgemm" if deep_gemm else f"t{WITHOUT_DEEP_GEMM.tokens}w{WITHOUT_DEEP_GEMM.weights}"
        grids = []
        for projection, n in ((GridGeometry.gate_up, shape.gate_up_rows), (GridGeometry.down, shape.hidden_size)):
            if deep_gemm:
                tile = fp8_tile(MANY_TOKENS, n, shape.num_experts, hardware.num_sms)
                grids.append(_grid(projection, shape, hardware, tile))
            else:  # a CTA per expert and tile of weight rows computes all of the expert's tokens
                grid = _grid(projection, shape, hardware, WITHOUT_DEEP_GEMM)
                grids.append(replace(grid, persistent_ctas=shape.num_experts * grid.tiles_n))
        return KernelConfig(
            name,
            (
                Stage("schedule", f"{self.name}/route"),
                Stage("quantise", f"{self.name}/quantise/hidden"),
                Stage("gemm", f"{self.name}/up/{name}", grids[0]),
                Stage("activation", f"{self.name}/activate"),
                Stage("quantise", f"{self.name}/quantise/intermediate"),
                Stage("gemm", f"{self.name}/down/{name}", grids[1]),
                Stage("combine", f"{self.name}/finalise"),
            ),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout(LAYOUT, shape.num_experts * shape.expert_bytes)

    def version(self) -> str:
        """FlashInfer's version, with a digest of our code around it except the build of its module."""
        return f"{version_of('flashinfer')}+{digest_of(*RUNS, apart=(Path(build.__file__),))}"

    def unavailable(self) -> str | None:
        missing = [name for name in ("torch", "triton", "flashinfer", "tvm_ffi") if not is_installed(name)]
        if missing:
            return f"{' and '.join(missing)} missing; {build.INSTALL}"
        if (found := version_of("flashinfer")) not in KNOWN:
            return f"the tactics of flashinfer {found} are not known, those of {', '.join(KNOWN)} are; {build.INSTALL}"
        return build.problem()

    def build(self, shape: MoEShape, hardware: Hardware, report: Progress, jobs: int | None = None) -> Built:
        """Build FlashInfer's module for sm_90, which holds all configurations: hours of CPU time.

        The module has about 250 units, which `report` counts. An interrupted build continues where it stopped. Raises
        KernelError if something is missing, or with the compiler's message.
        """
        return build.build(tuple(c.name for c in self.configs(shape, hardware)), report, jobs)

    def prune(self) -> int:
        """Delete the modules that other versions of FlashInfer left in the user's cache, and return the bytes freed."""
        return build.prune()

    def prepare(self, weights: MoEWeights) -> PreparedFlashInfer:
        """Load FlashInfer's module, and put the rows of up first. This copies gate_up once, unless up is first already.

        The module is compiled now if it is not yet. Raises KernelError for weights, a device or an installation that it
        cannot use, and if the module's tactics are not those that `config.py` lists.
        """
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """The smallest tile that holds the mean load of an active expert, without a cluster, finalised in the GEMM."""
        if shape.dtype == "fp8":
            return self._fp8_config(shape, hardware)
        ids = num_tokens * shape.top_k
        load = ids / min(ids, shape.num_experts)
        block = next((b for b in DEFAULT_TOKENS if load <= b), DEFAULT_TOKENS[-1])

        def of(gemm: int) -> Tactic:
            sides = block, 128, (1, 1), gemm == 2, 0
            return next(t for t in tactics(gemm) if (t.tokens, t.weights, t.cluster, t.finalised, t.stages) == sides)

        return self.describe(of(1), of(2), shape, hardware)

    def run(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> None:
        """Run FlashInfer's launches. One of ours precedes them if FlashInfer would miscount a token's repeated experts.

        Raises KernelError unless hidden states and output are bf16, aligned and of one shape.
        """
        from .launch import launch

        launch(config, prepared, batch, out, workspace)


def _grid(
    projection: Callable[..., GridGeometry],
    shape: MoEShape,
    hardware: Hardware,
    tile: Tactic | Fp8Tile,
    halves: int = 1,
) -> GridGeometry:
    """The grid of a projection, `GridGeometry.gate_up` or `.down`.

    halves: 2 if a CTA takes `tile.weights` rows of gate and as many of up, else 1.
    """
    resident = 1
    if isinstance(tile, Tactic) and tile.stages:
        stage = (tile.tokens + halves * tile.weights) * BLOCK_K["bf16"] * 2
        resident = min(MAX_RESIDENT, hardware.smem_per_sm_bytes // (tile.stages * stage + SMEM_OF_CTA))
    return projection(
        shape,
        block_m=tile.tokens,
        block_n=halves * tile.weights,
        block_k=BLOCK_K[shape.dtype],
        persistent_ctas=hardware.num_sms * resident,
        ctas_per_sm=resident,
    )
