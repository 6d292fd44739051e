"""DeepGEMM (deepseek-ai/DeepGEMM): two persistent grouped GEMMs for Hopper, fp8 block-scaled or bf16, between our
permute, activation and unpermute.

The package itself is used unmodified; it must be installed only where the kernel is to run. Rows are sorted by expert
and each expert's padded to whole tiles ("psum" layout: the device reads where each expert's rows end), so that a GEMM
does sum_e ceil(h_e / block_m) * ceil(N / block_n) tiles, over num_sms persistent CTAs. The masked layout has the same
tiles and needs rows for every expert's worst case; the plain contiguous one also walks over the tiles beyond the last
row: neither is offered.

What a configuration pins, and how, is in `config.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    LAYOUTS,
    Batch,
    GridGeometry,
    Hardware,
    KernelConfig,
    KernelError,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Place,
    Stage,
    WeightLayout,
    Workspace,
    digest_of,
    fp8_unsupported,
    is_installed,
    version_of,
)
from ramp_moe_kernels.limits import too_many_experts

from .config import Pinned, most_tokens, pinned

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedDeepGEMM

LAUNCH = Path(__file__).with_name("launch.py")
RUNS = (Place(LAUNCH, "prepare"), Place(LAUNCH, "launch_steps"))
"""What is ours of what decides the times."""
BLOCKS = (64, 128)
SM_SHARES = (1.0, 0.9, 0.8)
"""Of the SMs: fewer of them are another choice of tile, and leave the last wave less empty."""
BF16_STEP = 64
TESTED = ("0.1.4.post1",)
"""Versions of sgl-deep-gemm that ran on an H200. Another may choose other tiles."""
INSTALL = "pip install 'ramp-moe[deep-gemm]'"
SMALL_LOAD = 64.0
"""Mean tokens of an active expert up to which the small token block is the default."""


class DeepGEMM(LaunchableKernel):
    """Takes bf16 hidden states; fp8 block-scaled or bf16 weights, biases, any activation. Deterministic."""

    name = "deep_gemm"
    # Layers took 1.5 to 1.8 times as long there (profiles/benchmarks/graph_dispatch); why is not understood.
    switchable = False

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if hardware.arch != "sm_90":
            return f"described for Hopper (sm_90), {hardware.name} is {hardware.arch}"
        if shape.dtype not in ("fp8", "bf16"):
            return f"takes fp8 block-scaled or bf16 weights, not {shape.dtype}"
        if reason := fp8_unsupported(shape, hardware):
            return reason
        for what in ("hidden_size", "intermediate_size"):
            if getattr(shape, what) % BF16_STEP:
                return f"{what} {getattr(shape, what)} is not a multiple of {BF16_STEP}"
        if reason := too_many_experts(shape):
            return reason
        if not most_tokens(max(BLOCKS), shape):
            return f"one token's rows, padded to tiles of {max(BLOCKS)}, exceed its 32-bit offsets"
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        return most_tokens(int(dict(config.params)["block_m"]), shape)

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [
            self._config(shape, block, sms, up, down)
            for block, sms in itertools.product(BLOCKS, _sm_counts(hardware))
            for up, down in itertools.product(*self._tiles(shape, block, sms))
        ]

    def _tiles(self, shape: MoEShape, block: int, sms: int) -> tuple[list[Pinned], list[Pinned]]:
        hidden, inter, can = shape.hidden_size, shape.intermediate_size, _takes_multiples()
        up = pinned(shape.dtype, block, shape.gate_up_rows, hidden, shape.num_experts, sms, can)
        return up, pinned(shape.dtype, block, hidden, inter, shape.num_experts, sms, can)

    def _config(self, shape: MoEShape, block: int, sms: int, up: Pinned, down: Pinned) -> KernelConfig:
        name = f"bm{block}-sm{sms}-up({up.tile.name})-down({down.tile.name})"
        gemms = [
            describe(
                shape,
                block_m=block,
                block_n=gemm.tile.block_n,
                block_k=128 if shape.dtype == "fp8" else 64,
                persistent_ctas=sms,
            )
            for describe, gemm in ((GridGeometry.gate_up, up), (GridGeometry.down, down))
        ]
        params: list[tuple[str, int]] = [("block_m", block), ("num_sms", sms)]
        for which, gemm in (("up", up), ("down", down)):
            params += [(f"{which}_expected_m", gemm.expected_m), (f"{which}_multiple", gemm.multiple)]
        return KernelConfig(
            name,
            (
                Stage("schedule", f"permute/bm{block}-{shape.dtype}"),
                Stage("gemm", f"{self.name}/up/bm{block}-sm{sms}-{up.tile.name}", gemms[0]),
                Stage("activation", f"permute/activate/{shape.dtype}"),
                Stage("gemm", f"{self.name}/down/bm{block}-sm{sms}-{down.tile.name}", gemms[1]),
                Stage("combine", "permute/unpermute"),
            ),
            tuple(params),
        )

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        """All orders of rows, since the activation is ours; but of fp8 weights not the interleaved one, where rows of
        two scale blocks share 128 rows, for which DeepGEMM has one scale."""
        return tuple(key for key in LAYOUTS if shape.dtype != "fp8" or key != "gate-up-interleaved-8")

    def version(self) -> str:
        """DeepGEMM's version and a digest of what is ours around it."""
        return f"{version_of('deep_gemm')}+{digest_of(*RUNS)}"

    def unavailable(self) -> str | None:
        missing = [name for name in ("torch", "triton", "deep_gemm", "tvm_ffi") if not is_installed(name)]
        if missing:
            return f"{' and '.join(missing)} missing; {INSTALL} (its README: https://github.com/sgl-project/DeepGEMM)"
        if reason := _untested(version_of("deep_gemm")):
            return reason
        if not _has_compiler():
            return "deep_gemm compiles its kernels with nvcc, and finds none: install a CUDA toolkit and set CUDA_HOME"
        cache = os.path.expanduser(os.environ.get("DG_JIT_CACHE_DIR", "~/.deep_gemm"))
        return None if _writable(cache) else f"deep_gemm cannot write its cache {cache}; set DG_JIT_CACHE_DIR"

    def prepare(self, weights: MoEWeights) -> PreparedDeepGEMM:
        """The weights as they are. Raises KernelError for weights, a device or an installation that it cannot use."""
        from .launch import prepare  # torch: not needed to describe the kernel

        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """What DeepGEMM takes itself for evenly routed tokens on all SMs, with a token block that they fill."""
        ids = num_tokens * shape.top_k
        load = ids / min(ids, shape.num_experts)
        block = BLOCKS[0] if load <= SMALL_LOAD else BLOCKS[1]
        sms = _sm_counts(hardware)[0]
        up, down = self._tiles(shape, block, sms)
        if not up or not down:
            raise KernelError(f"{self.name} has no tile for {shape.label} on {hardware.name}")
        return self._config(shape, block, sms, up[0], down[0])

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        """Up to 2048 routed ids three launches beside DeepGEMM's two, six above. Raises KernelError for fp16."""
        from .launch import launch_steps

        return launch_steps(config, prepared, batch, out, workspace)


def _sm_counts(hardware: Hardware) -> list[int]:
    """Even, since CTAs come in clusters of two."""
    return list(dict.fromkeys(int(hardware.num_sms * share) // 2 * 2 for share in SM_SHARES))


@functools.cache
def _takes_multiples() -> bool:
    """Whether the installed version can be told a multiple of the weight block; where none is installed, not: its
    source says so without an import, which needs a GPU."""
    spec = importlib.util.find_spec("deep_gemm")
    if spec is None or spec.origin is None:
        return False
    with open(spec.origin, encoding="utf-8") as source:
        return "set_block_size_multiple_of" in source.read()


def _untested(version: str) -> str | None:
    if version in TESTED:
        return None
    return f"deep_gemm {version} is not tested (sgl-deep-gemm {', '.join(TESTED)}); {INSTALL}"


def _has_compiler() -> bool:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    if any(homes):
        return any(os.access(os.path.join(home, "bin", "nvcc"), os.X_OK) for home in homes if home)
    return shutil.which("nvcc") is not None or os.access("/usr/local/cuda/bin/nvcc", os.X_OK)


def _writable(folder: str) -> bool:
    """Whether files can be made in a folder, or the folder itself can."""
    while not os.path.exists(folder):
        folder, parent = os.path.dirname(folder), folder
        if folder == parent:
            return False
    return os.path.isdir(folder) and os.access(folder, os.W_OK)
