"""The fused CuTe kernel as a kernel of the library: its limits, configurations and grids."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import (
    LAYOUTS,
    Batch,
    BuildableKernel,
    Built,
    Hardware,
    KernelConfig,
    KernelError,
    LaunchableKernel,
    MoEShape,
    MoEWeights,
    Place,
    Progress,
    RouterLogits,
    Stage,
    WeightLayout,
    Workspace,
    digest_of,
    is_installed,
)

from ..limits import too_many_experts
from .config import ELEMENT, UP_ROWS, Config
from .space import configurations, geometry, most_tokens, polymorphic, unaligned

if TYPE_CHECKING:
    from torch import Tensor

    from .launch import PreparedCute

HERE = Path(__file__).parent
RUNS = (Place(HERE / "launch.py", "prepare"), Place(HERE / "launch.py", "launch_steps"))
"""The code on which times depend, in addition to what objects are compiled from."""
FEW = 16.0
"""Mean tokens of an active expert up to which reading weights from memory takes longer than computing."""
MANY = 48.0
"""Mean tokens of an active expert above which reading weights from L2 does."""


class CuteMoE(LaunchableKernel, BuildableKernel):
    """The library's fused kernel for Hopper, compiled ahead of time by `ramp-moe kernels build --kernel cute`.

    Computes fp8 (e4m3 W8A8, [128, 128] weight scales) and bf16 weights without biases, with activation swiglu. Takes
    bf16 hidden states. In fp8 the intermediate is quantised from float32; vLLM's and SGLang's own paths round it to
    bf16 first.
    """

    name = "cute"
    hidden_dtypes = ("bf16",)

    def version(self) -> str:
        """The library's version and a digest of the code that runs. How objects are built and loaded does not count."""
        from .aot.cache import COMPILED

        return f"{super().version()}+{digest_of(*RUNS, COMPILED, apart=(HERE / 'aot',))}"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        if hardware.arch != "sm_90":
            return f"written for Hopper (sm_90), {hardware.name} is {hardware.arch}"
        if shape.dtype not in ELEMENT:
            return f"computes {' and '.join(ELEMENT)}, not {shape.dtype}"
        return too_many_experts(shape) or unaligned(shape)

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int:
        return most_tokens(_config(config), shape)

    def unavailable(self) -> str | None:
        missing = [name for name in ("torch", "triton", "tvm_ffi") if not is_installed(name)]
        if missing:
            return f"the package {missing[0]} is missing: pip install 'ramp-moe[triton,cute]'"
        from .aot import compilable

        return compilable()

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self.describe(c, shape) for c in configurations(shape)]

    def describe(self, config: Config, shape: MoEShape) -> KernelConfig:
        """The KernelConfig of a configuration."""
        beside = ("-quantise" if config.dtype == "fp8" else "") + ("" if config.combine == "rows" else "-zero")
        stages = [
            Stage("schedule", f"{self.name}/prepare/bm{config.block_m}{beside}"),
            Stage("gemm", f"{self.name}/{config.name}", geometry(config, shape)),
        ]
        if config.combine == "f32":
            stages.append(Stage("combine", f"{self.name}/cast"))
        if config.combine == "rows":
            stages.append(Stage("combine", f"{self.name}/combine/wide{config.wide}"))
        names = (field.name for field in fields(config) if field.name != "smaller")  # of a configuration by itself
        params = tuple((name, getattr(config, name)) for name in names)
        return KernelConfig(config.name, tuple(stages), params)

    def build(self, shape: MoEShape, hardware: Hardware, report: Progress, jobs: int | None = None) -> Built:
        from .aot import build

        return build([*configurations(shape), *polymorphic(shape)], report=report, jobs=jobs)

    def build_some(self, configs: Sequence[KernelConfig], report: Progress) -> dict[str, str]:
        from .aot import build

        return build([_config(c) for c in configs], report=report).dropped

    def prune(self) -> int:
        from .aot import prune

        return prune()

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-up-interleaved-8", shape.num_experts * shape.expert_bytes)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        """All layouts: the tensor map finds gate and up by the layout."""
        return (self.weight_layout(shape).key, *(key for key in LAYOUTS if key != self.weight_layout(shape).key))

    def prepare(self, weights: MoEWeights) -> PreparedCute:
        """Views of the weights that were given. Raises KernelError for weights or a device that it does not support."""
        from .aot import runtime
        from .launch import prepare  # torch: not needed to describe the kernel

        if weights.gate_up.is_cuda:
            runtime()  # a tenth of a second, which the first launch would take otherwise
        return prepare(weights)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """A configuration by the mean tokens of the experts that have any."""
        ids = num_tokens * shape.top_k
        mean = ids / max(1, min(ids, shape.num_experts))
        ctas = min(ids, shape.num_experts) * shape.gate_up_rows // UP_ROWS
        found = Config(min(128, max(8, 8 * round(mean * 1.25 / 8))), 32, 8, 4, dtype=shape.dtype)
        if ctas <= hardware.num_sms // 4 and mean <= FEW:
            found = Config(8, 32, 8, 4, split_k=4, dtype=shape.dtype)
        elif mean > MANY:
            found = Config(64, 32, 8, 3, wide=2 - shape.intermediate_size // 128 % 2, dtype=shape.dtype)
        elif mean > FEW:
            found = Config(32, 32, 8, 4, wide=2 - shape.intermediate_size // 128 % 2, dtype=shape.dtype)
        valid = configurations(shape)
        if found not in valid:
            found = min(valid, key=lambda c: (abs(c.block_m - found.block_m), c.wide, c.ctas, c.split_k, -c.stages))
        return self.describe(found, shape)

    def warm_sizes(self, shape: MoEShape, max_tokens: int) -> Sequence[int]:
        """The sizes of the Triton kernels before and after the fused one."""
        from ..triton.sizes import warm_sizes

        return warm_sizes(shape, max_tokens)

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        """Launch a layer: two launches up to 4096 routed ids, three above. A combine in float32 or in order adds one.

        Raises KernelError for hidden states that are not bf16, for batches beyond the schedule's or the grid's limits,
        and if the configuration is not compiled.
        """
        from .launch import launch_steps

        return launch_steps([_config(config)], prepared, batch, out, workspace)

    def routes(self, config: KernelConfig, shape: MoEShape, num_tokens: int) -> bool:
        from ..triton.routed_schedule import takes

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
        from .launch import launch_steps

        for _ in launch_steps([_config(config)], prepared, batch, out, workspace, router=router):
            pass

    def inline_key(self, config: KernelConfig, shape: MoEShape) -> Hashable | None:
        """The name of a polymorphic launch that can compute this configuration; None if there is none."""
        return next((c.name for c in polymorphic(shape) if _config(config) in map(c.of, c.blocks)), None)

    def launch_inline(
        self,
        configs: Sequence[KernelConfig],
        choice: Tensor,
        prepared: Any,
        batch: Batch,
        out: Tensor,
        workspace: Workspace,
    ) -> None:
        from .launch import launch_steps

        for _ in launch_steps([_config(c) for c in configs], prepared, batch, out, workspace, choice):
            pass


def _config(config: KernelConfig) -> Config:
    """The configuration that `describe` put into the parameters."""
    params: dict[str, Any] = dict(config.params)
    try:
        return Config(**params)
    except TypeError as e:
        raise KernelError(f"{config.name} is no configuration of cute: {e}") from None
