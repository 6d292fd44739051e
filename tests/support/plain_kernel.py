"""A kernel of torch operations that keeps the contract on every device, and variants that each break one part of it.
A spawned process can import this module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ramp_moe import GridGeometry, Hardware, KernelConfig, MoEShape, Stage, WeightLayout, get_registry
from ramp_moe.spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace
from ramp_moe.testing.description import Conformance
from torch import Tensor
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = MoEShape(16, 2, 256, 128, "bf16")
LAUNCHED = MoEShape(8, 2, 128, 64, "fp16")


class Plain(LaunchableKernel):
    """Computes every expert on every token, with weight 0 if it was not chosen. Nothing is read back to the host."""

    name = "plain"

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return "takes bf16 and fp16 weights, not fp8" if shape.dtype == "fp8" else None

    def grid(self, shape: MoEShape, block: int) -> GridGeometry:
        return GridGeometry.fused(shape, block_m=block, block_n=64, block_k=32)

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self.config(shape, block) for block in (16, 64)]

    def config(self, shape: MoEShape, block: int) -> KernelConfig:
        gemm = Stage("gemm", f"{self.name}/experts/bm{block}", self.grid(shape, block))
        stages = Stage("zero", f"{self.name}/zero"), gemm, Stage("combine", f"{self.name}/cast")
        return KernelConfig(f"bm{block}", stages, (("block", block),))

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        return weights

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        return self.config(shape, 16 if num_tokens < 64 else 64)

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        w, x = prepared, batch.hidden_states.float()
        yield self.zero(total := workspace.get("total", x.shape, torch.float32, x.device))
        for e in self.experts(w, batch):
            share = (batch.topk_weights * (batch.topk_ids == e)).sum(1, keepdim=True)
            gate, up = (x @ w.gate_up[e].float().T).chunk(2, 1)
            total += share * ((silu(gate) * up) @ w.down[e].float().T)
        yield None
        yield self.finish(batch, total, out)

    def zero(self, total: Tensor) -> None:
        total.zero_()

    def experts(self, w: MoEWeights, batch: Batch) -> Sequence[int]:
        return range(len(w.down))

    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        out.copy_(total)


# --- each breaks one part --------------------------------------------------------------------------------------------


class Misnamed(Plain):
    name = "no such, name"


class Misspelt(Plain):
    formats = ("bf16", "mxpf4")


class Gruff(Plain):
    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return super().unsupported(shape, hardware) and "this dtype is not supported"


class Curt(Plain):
    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return super().unsupported(shape, hardware) and "fp8"


class Twins(Plain):
    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self.config(shape, 16), replace(self.config(shape, 64), name="bm16")]


class OneKeyTwoGrids(Plain):
    def config(self, shape: MoEShape, block: int) -> KernelConfig:
        gemm = Stage("gemm", "experts", self.grid(shape, block))
        plain = super().config(shape, block)
        return replace(plain, stages=(plain.stages[0], gemm, plain.stages[2]))


class Unhashable(Plain):
    def config(self, shape: MoEShape, block: int) -> KernelConfig:
        return replace(super().config(shape, block), params=(("blocks", [block]),))  # type: ignore[arg-type]


class Choosy(Plain):
    """Has no configuration for sizes that it does not refuse."""

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [] if shape.hidden_size % 16 else super().configs(shape, hardware)


class Weightless(Plain):
    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.gate_up_bytes)


class ReadsAnother(Plain):
    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        return ("up-first",)


class SwapsGateAndUp(Plain):
    """Says that it reads another layout of weights, but treats all layouts alike."""

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        return "gate-first", "up-first"


class HalfOfTheRows(Plain):
    """Counts the rows of gate, and forgets those of up."""

    def grid(self, shape: MoEShape, block: int) -> GridGeometry:
        return replace(super().grid(shape, block), n=shape.intermediate_size)


class UpOnly(Plain):
    def grid(self, shape: MoEShape, block: int) -> GridGeometry:
        return replace(super().grid(shape, block), expert_bytes=shape.gate_up_bytes)


@dataclass(frozen=True)
class TooShort(GridGeometry):
    def launched(self, max_ids: int, num_experts: int) -> int:
        return -(-max_ids // self.block_m) * self.ctas_per_m_tile


@dataclass(frozen=True)
class FirstExpertCounts(GridGeometry):
    def logical(self, histogram: Any) -> Any:
        return self.m_tiles(histogram) * self.ctas_per_m_tile + (histogram[..., 0] > 0)


@dataclass(frozen=True)
class Shrinking(GridGeometry):
    def logical(self, histogram: Any) -> Any:
        return np.where(histogram.sum(-1) > 0, 1 + 10**6 // np.maximum(histogram.sum(-1), 1), 0)


def gridded(kind: type[GridGeometry]) -> Plain:
    class Gridded(Plain):
        def grid(self, shape: MoEShape, block: int) -> GridGeometry:
            return kind.fused(shape, block_m=block, block_n=64, block_k=32)

    return Gridded()


class SmallBatchesOnly(Plain):
    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        return {n: self.config(shape, 16) for n in range(1, 513)}[num_tokens]


class LeavesColumns(Plain):
    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        out[:, 64:] = total[:, 64:]


class EmptyExpertsCount(Plain):
    def experts(self, w: MoEWeights, batch: Batch) -> Sequence[int]:
        self.empty = sum(~(batch.topk_ids == e).any() for e in range(len(w.down)))
        return super().experts(w, batch)

    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        out.copy_(total + self.empty)


class ForgetsPadding(Plain):
    """Takes the id -1 for the last expert, as indexing does."""

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        ids = torch.where(batch.topk_ids == -1, len(prepared.down) - 1, batch.topk_ids)
        return super().run(config, prepared, replace(batch, topk_ids=ids), out, workspace)


class Raises(Plain):
    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        if len(out) == 1:
            raise IndexError("no second token")
        super().finish(batch, total, out)


class OutOfBounds(Plain):
    """Writes one row more than there are tokens."""

    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        tokens, hidden = out.shape
        if out.untyped_storage().nbytes() > out.nbytes:
            out.as_strided((tokens + 1, hidden), out.stride(), out.storage_offset())[-1] = 0
        super().finish(batch, total, out)


class ConsumesInputs(Plain):
    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        super().finish(batch, total, out)
        batch.topk_weights.zero_()


class ConsumesWeights(Plain):
    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        yield from super().run(config, prepared, batch, out, workspace)
        prepared.down.mul_(2)


class Wavers(Plain):
    """Differs from run to run, within the allowed error."""

    calls = 0

    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        self.calls += 1
        out.copy_(total * (1 + 0.006 * (-1) ** self.calls))


class TrustsItsBuffers(Plain):
    def zero(self, total: Tensor) -> None:
        pass


class StepsBackwards(Plain):
    def steps(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[str]:
        keys = list(super().steps(config, prepared, batch, out, workspace))
        yield from reversed(keys)


class StopsTooOften(Plain):
    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        yield from super().run(config, prepared, batch, out, workspace)
        yield


class StopsTooRarely(Plain):
    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        yield from list(super().run(config, prepared, batch, out, workspace))[1:]


class ReturnsOut(Plain):
    def run(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> Any:
        for _ in super().run(config, prepared, batch, out, workspace):
            pass
        return out


class StopsEarly(Plain):
    def steps(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[str]:
        yield from (stage.key for stage in config.stages)


class Waits(Plain):
    """Asks the device which experts have tokens."""

    def experts(self, w: MoEWeights, batch: Batch) -> Sequence[int]:
        return range(min(len(w.down), int(batch.topk_ids.max()) + 1))


class Synchronises(Plain):
    """Synchronises with the host, and is right in everything else. Only a GPU can show that."""

    def finish(self, batch: Batch, total: Tensor, out: Tensor) -> None:
        super().finish(batch, total, out)
        torch.cuda.synchronize()


class FixedRouting(Plain):
    """Decides on the host which experts to run, in a way that torch does not see. A graph keeps the experts of its
    capture."""

    def experts(self, w: MoEWeights, batch: Batch) -> Sequence[int]:
        return [e for e in np.unique(batch.topk_ids.numpy()).tolist() if 0 <= e < len(w.down)]


class Crashes(Plain):
    def steps(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGSEGV)
        yield from ()


def conformance(kernel: LaunchableKernel) -> Conformance:
    return Conformance(kernel, SHAPE, get_registry().device("h200"), LAUNCHED)


def crashing() -> Conformance:
    return conformance(Crashes())


def synchronising() -> Conformance:
    return conformance(Synchronises())


def cannot_be_made() -> Conformance:
    raise MemoryError("the GPU is full")


# --- a graph without a GPU -------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Records torch's operations with their tensors, as a graph would replay them, without the work of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            pairs = zip(result, again, strict=True) if isinstance(result, list | tuple) else [(result, again)]
            for old, new in pairs:
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


def capture(launch: Callable[[], None]) -> Callable[[], None]:
    launch()
    recorded = Recorded()
    with recorded:
        launch()
    return recorded.replay
