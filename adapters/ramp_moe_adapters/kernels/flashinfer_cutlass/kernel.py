"""FlashInfer's CUTLASS MoE (flashinfer-python 0.7.2.post1): two persistent grouped GEMMs for Hopper, with routing,
activation and finalising around them.

The installed package runs unmodified, through its public `cutlass_fused_moe`; it must be installed only where the
kernel is to run. In bf16 a configuration is a pair of tactics, which `profile_ids` forces; which pairs there are is in
`flashinfer_cutlass_choice`. A plain tactic has the tokens along the tile's M, a swapped one along its N; CTAs walk over
sum_e ceil(h_e / tokens) * ceil(N / weights) tiles. Ampere's kernel for the first GEMM applies the activation itself: a
CTA multiplies with as many rows of gate as of up.

With fp8 block scales FlashInfer ignores `profile_ids`: the process runs one configuration, its copy of DeepGEMM, or
with TRTLLM_DG_ENABLED=0 in the environment a fixed tile. That copy's tile depends on the number of tokens, but below
128 of them it has room for all of them, and from there on it has 128: its tiles along the tokens are those of 128.
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
"""What is ours of what decides the times."""
AMPERE_STEP = 64
"""Sizes that Ampere's kernels with the activation inside take multiples of."""
BLOCK_K = {"bf16": 64, "fp8": 128}
MANY_TOKENS = 8192
"""For which the fp8 tile is described."""
SMEM_OF_CTA = 1024
"""Bytes that the system reserves."""
MAX_RESIDENT = 2
"""CTAs of Ampere's kernels on an SM, at most."""
KNOWN = ("0.7.2.post1",)
"""Versions whose order of tactics is known."""
DEFAULT_TOKENS = (16, 32, 64, 128)
"""In a tile of the defaults."""


class FlashInferCutlass(LaunchableKernel, BuildableKernel):
    """Takes bf16 hidden states; bf16 weights, biases too, or fp8 (e4m3 W8A8, [128, 128] weight scales); swiglu.

    Configurations that finalise in the second GEMM ("-fin") add to the output in bf16 and in no fixed order, so that
    two runs differ in the last bits. The module is compiled when it is first used, which takes hours: `ramp-moe kernels
    build --kernel flashinfer_cutlass` does it ahead.
    """

    name = "flashinfer_cutlass"
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
        """As many as keep FlashInfer's buffers below 2^31 elements: larger ones were never tried."""
        return max_tokens(shape, MAX_ELEMENTS // max(shape.hidden_size, shape.gate_up_rows))

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        """In bf16 the pairs of `pairs`, in fp8 the one configuration that this process runs."""
        if shape.dtype == "fp8":
            return [self._fp8_config(shape, hardware)]
        ampere = not shape.hidden_size % AMPERE_STEP and not shape.intermediate_size % AMPERE_STEP
        return [self.describe(up, down, shape, hardware) for up, down in pairs(ampere)]

    def describe(self, up: Tactic, down: Tactic, shape: MoEShape, hardware: Hardware) -> KernelConfig:
        """Any pair of bf16 tactics as the library sees it, of the first GEMM's and of the second's."""
        fused = up.stages > 0  # gate and up in one CTA
        grids = (
            _grid(GridGeometry.gate_up, shape, hardware, up, halves=2 if fused else 1),
            _grid(GridGeometry.down, shape, hardware, down),
        )
        stages = [
            Stage("schedule", f"{self.name}/route"),  # and copies the tokens' rows
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
        for projection, rows in ((GridGeometry.gate_up, shape.gate_up_rows), (GridGeometry.down, shape.hidden_size)):
            if deep_gemm:
                tile = fp8_tile(MANY_TOKENS, rows, shape.num_experts, hardware.num_sms)
                grids.append(_grid(projection, shape, hardware, tile))
            else:  # a CTA for each expert and tile of weights, which walks over the expert's tokens
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
        """FlashInfer's version and a digest of what is ours around it, but for how its module is built."""
        return f"{version_of('flashinfer')}+{digest_of(*RUNS, apart=(Path(build.__file__),))}"

    def unavailable(self) -> str | None:
        missing = [name for name in ("torch", "triton", "flashinfer", "tvm_ffi") if not is_installed(name)]
        if missing:
            return f"{' and '.join(missing)} missing; {build.INSTALL}"
        if (found := version_of("flashinfer")) not in KNOWN:
            return f"the tactics of flashinfer {found} are not known, those of {', '.join(KNOWN)} are; {build.INSTALL}"
        return build.problem()

    def build(self, shape: MoEShape, hardware: Hardware, report: Progress, jobs: int | None = None) -> Built:
        """FlashInfer's module for sm_90, about 250 units, of which all configurations are: hours of CPU time. `report`
        is told of units. An interrupted build goes on where it was. Raises KernelError where something is missing, or
        with the compiler's words."""
        return build.build(tuple(c.name for c in self.configs(shape, hardware)), report, jobs)

    def prune(self) -> int:
        """Delete the module as other versions of FlashInfer have compiled it into the cache of the same user."""
        return build.prune()

    def prepare(self, weights: MoEWeights) -> PreparedFlashInfer:
        """Load FlashInfer's module, which is compiled now if it is not yet, and put the rows of up first, which copies
        gate_up once, unless they are given so. Raises KernelError for weights, a device or an installation that it
        cannot work with, and where the module's tactics are not those that are known here."""
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """A token tile that an active expert's mean load fits into, without a cluster, finalised in the GEMM."""
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
        """FlashInfer's launches, and before them one of ours for batches that it would route wrongly if a token named
        an expert twice. Raises KernelError for hidden states or an output that are not bf16, aligned, of one shape."""
        from .launch import launch

        launch(config, prepared, batch, out, workspace)


def _grid(
    projection: Callable[..., GridGeometry],
    shape: MoEShape,
    hardware: Hardware,
    tile: Tactic | Fp8Tile,
    halves: int = 1,
) -> GridGeometry:
    """The grid of a projection, `GridGeometry.gate_up` or `.down`. halves 2: a CTA takes `tile.weights` rows of gate
    and as many of up."""
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
