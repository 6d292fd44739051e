"""The Triton path as a kernel of the library: configurations, geometry, and the launches of one forward pass.

scheduled   prepare (schedule, and beside it: quantise activations, zero the output), up, [activate], down, combine
direct      up, down: no schedule; for tiny batches
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    FORMATS,
    LAYOUTS,
    Batch,
    Hardware,
    KernelConfig,
    KernelError,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Place,
    RouterLogits,
    Stage,
    WeightLayout,
    Workspace,
    digest_of,
    fp8_unsupported,
)

from ..limits import MAX_ELEMENTS, max_tokens, too_many_experts
from .config import (
    GemmConfig,
    Path,
    geometry,
    invalid_path,
    multiplies_fp8,
    quantises_itself,
    scale_group,
    steps_of,
)

if TYPE_CHECKING:
    from torch import Tensor

RUNS = Place(File(__file__).with_name("forward.py"), "forward_steps")
"""The code on which times depend."""
PARAMS = tuple(field.name for field in fields(GemmConfig))
ALIGNMENT = 16
"""Elements of a row that are loaded at once. Sizes of a shape must be multiples of it."""
DIRECT_TOKENS = 2
MAX_DEFAULT_LOG2_TOKENS = 16


class TritonMoE(LaunchableKernel):
    """Every format, on any GPU that Triton compiles for.

    fp8 weights are multiplied with activations in fp8, each scale of which is for a group of a token's columns, whether
    the weights' scales are for blocks, rows or matrices. 4-bit weights are dequantised in registers, and activations
    stay in 16 bits.

    Scale blocks of weights are any that MoEWeights takes. In fp8 the intermediate is quantised from float32, if the up
    projection's CTAs have whole scale groups. vLLM's and SGLang's own paths round it to bf16 first: compare with a
    tolerance of fp8, or with a reference that does not round.
    """

    name = "triton"
    requires = ("torch", "triton")
    formats = tuple(f.name for f in FORMATS.values() if f.element != "e4m3" or f.rounds)

    def version(self) -> str:
        """The library's version and a digest of the code that runs."""
        return f"{super().version()}+{digest_of(RUNS)}"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if reason := fp8_unsupported(shape, hardware, whole_blocks=False):
            return reason
        if reason := too_many_experts(shape):
            return reason
        if reason := shape.format.misfit(shape.hidden_size, shape.intermediate_size):
            return reason
        for what in ("hidden_size", "intermediate_size"):
            if getattr(shape, what) % ALIGNMENT:
                return f"{what} {getattr(shape, what)} is not a multiple of {ALIGNMENT}"
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        """The most tokens that the schedule sorts, with less than 2^31 elements in each buffer of a row per id."""
        path = _path(config)
        gate_up = path.up.split_k * shape.gate_up_rows if path.up.split_k > 1 else shape.intermediate_size
        widest = max(gate_up, path.down.split_k * shape.hidden_size)
        return max_tokens(shape, MAX_ELEMENTS // widest)

    def paths(self, shape: MoEShape, hardware: Hardware) -> list[Path]:
        """Every configuration, as what it launches."""
        steps = steps_of(shape)
        downs = (64, 128) if steps[0] >= 64 else (32,)
        depths = (3, 4) if hardware.smem_per_sm_bytes > 128 * 1024 else (1, 2)
        found = []
        for block, rows_up, rows_down, step, stages, group_m, split_k, swap in itertools.product(
            (16, 32, 64, 128), (32, 64, 128), downs, steps, depths, (1, 8), (1, 4), (False, True)
        ):
            warps = 8 if block == 128 else 4
            up = GemmConfig(block, rows_up, step, warps, stages, group_m, split_k, swap)
            down = GemmConfig(block, rows_down, step, warps if rows_down == 128 else 4, stages, group_m, 1, swap)
            if split_k == 1:
                found.append(Path(up, down))
            if block == 16 and group_m == 1:
                found.append(Path(up, down, direct=True))
                found.append(Path(up, replace(down, split_k=4), atomic=True))
        valid = [path for path in found if invalid_path(path, shape, hardware) is None]
        # The defaults, which run without a profile, can be profiled, too. They change at powers of two at most.
        defaults = (self._default_path(shape, hardware, 2**i) for i in range(MAX_DEFAULT_LOG2_TOKENS + 1))
        return list(dict.fromkeys([*valid, *defaults]))

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self.describe(path, shape) for path in self.paths(shape, hardware)]

    def describe(self, path: Path, shape: MoEShape) -> KernelConfig:
        """The KernelConfig of a path."""
        up, down = path.up, path.down
        tiles = "direct/" if path.direct else ""
        stages = []
        if not path.direct:
            beside = ("-quantise" if multiplies_fp8(shape) else "") + ("-zero" if path.atomic else "")
            stages.append(Stage("schedule", f"{self.name}/prepare/bm{up.block_m}{beside}"))
        stages.append(Stage("gemm", f"{self.name}/{tiles}up/{up.name}", geometry("up", up, shape, path.direct)))
        if up.split_k > 1:
            stages.append(Stage("activation", f"{self.name}/activate/sk{up.split_k}"))
        ending = "atomic" if path.atomic else "store"
        grid = geometry("down", down, shape, path.direct)
        stages.append(Stage("gemm", f"{self.name}/{tiles}down/{down.name}-{ending}", grid))
        stages.append(Stage("combine", f"{self.name}/cast" if path.atomic else f"{self.name}/combine"))
        params = [(f"{gemm}_{k}", getattr(c, k)) for gemm, c in (("up", up), ("down", down)) for k in PARAMS]
        return KernelConfig(path.name, tuple(stages), (*params, ("direct", path.direct), ("atomic", path.atomic)))

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        """All layouts: the up projection finds its rows by the layout."""
        return LAYOUTS

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        """The weights as they are, except that a matrix's scale becomes one for each of its rows."""
        if weights.stored.weights != "fp8-tensor":
            return weights
        from ramp_moe.runtime.formats import per_row  # torch

        return per_row(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """The direct path for a few tokens, else a token block of about twice the experts' mean load."""
        return _default_config(self, shape, hardware, num_tokens)

    def _default_path(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> Path:
        """What mostly wins on an H200 (profiles/benchmarks), then ever smaller tiles, for less shared memory."""
        ids, fp8 = num_tokens * shape.top_k, multiplies_fp8(shape)
        widest = scale_group(shape) if fp8 else 128
        if num_tokens <= DIRECT_TOKENS:
            # The widest tile that still fills the SMs. If the narrowest makes less than two waves, splits share its
            # reduction.
            inter = shape.intermediate_size
            wide = (r for r in (128, 64) if r <= widest and ids * -(-inter // r) >= hardware.num_sms)
            rows = next(wide, 32)
            split_k = 4 if ids * -(-inter // rows) < 2 * hardware.num_sms and rows == 32 else 1
            stages = 4 if fp8 and rows == 32 else 3
            up = GemmConfig(16, rows, widest, stages=stages, split_k=split_k, swap=rows > 32)
            path = Path(up, GemmConfig(16, min(64, widest), widest, swap=widest >= 64), direct=True)
            if invalid_path(path, shape, hardware) is None:
                return path
        load = 2 * ids / min(ids, shape.num_experts)
        wanted = next((b for b in (16, 32, 64) if b >= load), 64 if fp8 else 128)
        for block, rows, stages in itertools.product((wanted, 64, 32, 16), (128, 64, 32), (3, 2)):
            if block > wanted or rows > widest or (rows == 128 and not fp8 and block < 128):
                continue
            step = widest if fp8 or block <= 32 else 64
            group_m, swap = (8, False) if block >= 64 else (1, rows >= 64)
            gemm = GemmConfig(block, rows, step, 8 if block * rows >= 64 * 128 else 4, stages, group_m, 1, swap)
            path = Path(gemm, gemm)
            if invalid_path(path, shape, hardware) is None:
                return path
        raise KernelError(f"no configuration of {self.name} fits {hardware.name}")

    def warm_sizes(self, shape: MoEShape, max_tokens: int) -> Sequence[int]:
        from .sizes import warm_sizes  # torch and Triton: not needed to describe the kernel

        return warm_sizes(shape, max_tokens, scale_group(shape))

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        from .forward import forward_steps

        return forward_steps([_path(config)], prepared, batch, out, workspace)

    def routes(self, config: KernelConfig, shape: MoEShape, num_tokens: int) -> bool:
        from .routed_schedule import takes

        return takes(num_tokens, shape.num_experts, shape.top_k)

    def launch_routed(
        self,
        config: KernelConfig,
        prepared: Any,
        router: RouterLogits,
        batch: Batch,
        out: Tensor,
        workspace: Workspace,
    ) -> None:
        from .forward import forward_steps

        for _ in forward_steps([_path(config)], prepared, batch, out, workspace, router=router):
            pass

    def inline_key(self, config: KernelConfig, shape: MoEShape) -> Hashable | None:
        """The warps, and all on which the sequence of launches and their buffers depend. The rest may differ.

        None for the direct path, whose few tokens leave nothing to choose.
        """
        path = _path(config)
        if path.direct:
            return None
        quantised = multiplies_fp8(shape) and quantises_itself(path.up)
        return path.up.warps, path.down.warps, path.up.split_k, path.down.split_k, path.atomic, quantised

    def launch_inline(
        self,
        configs: Sequence[KernelConfig],
        choice: Tensor,
        prepared: Any,
        batch: Batch,
        out: Tensor,
        workspace: Workspace,
    ) -> None:
        from .forward import forward_steps

        for _ in forward_steps([_path(config) for config in configs], prepared, batch, out, workspace, choice):
            pass


@functools.lru_cache(maxsize=1024)
def _default_config(kernel: TritonMoE, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
    return kernel.describe(kernel._default_path(shape, hardware, num_tokens), shape)


def _path(config: KernelConfig) -> Path:
    return _path_of(config.params)


@functools.lru_cache(maxsize=4096)
def _path_of(params: tuple[tuple[str, Any], ...]) -> Path:
    """The path that `describe` put into the parameters."""
    p: dict[str, Any] = dict(params)
    up, down = (
        GemmConfig(**{k.removeprefix(f"{gemm}_"): v for k, v in p.items() if k.startswith(f"{gemm}_")})
        for gemm in ("up", "down")
    )
    return Path(up, down, p["direct"], p["atomic"])
