"""The contract of a kernel that runs: the weights, batch and buffers it is given, and the methods it must have."""

from __future__ import annotations

import functools
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import KernelError, RampMoEError, RoutingError, ShapeError, describe
from .dense import check_dense
from .hardware import Hardware
from .kernel import Kernel, KernelConfig, is_installed, reason_of, why_unsupported
from .router_logits import RouterLogits
from .shapes import MoEShape
from .weights import ACTIVATIONS, ROW_CHUNK, MoEWeights, check_layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "ROW_CHUNK",
    "Batch",
    "LaunchableKernel",
    "MoEWeights",
    "RouterLogits",
    "Workspace",
    "allocate",
    "check_layout",
    "kernel_ids",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One step's input, contiguous on one device.

    hidden_states: `[T, H]` bf16 or fp16.
    topk_ids: int32 `[T, k]`. Ids out of range are skipped; expert parallelism and padding use -1 or E.
    topk_weights: float32 `[T, k]`.

    Raises ShapeError or RoutingError for tensors that do not fit together.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    num_tokens: int = field(init=False, repr=False, compare=False)
    top_k: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        import torch

        try:
            # Every call of a layer makes one: each look at a tensor takes a tenth of a microsecond or more.
            x, ids, weights = self.hidden_states, self.topk_ids, self.topk_weights
            if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
                raise ShapeError(f"hidden_states must be contiguous bf16 or fp16 [T, H], not {x.dtype} {list(x.shape)}")
            tokens, routed = x.shape[0], ids.shape
            if len(routed) != 2 or routed[0] != tokens or ids.dtype is not torch.int32 or not ids.is_contiguous():
                raise RoutingError(f"topk_ids must be contiguous int32 [{tokens}, k], not {ids.dtype} {list(routed)}")
            if weights.shape != routed or weights.dtype is not torch.float32 or not weights.is_contiguous():
                raise RoutingError(
                    f"topk_weights must be contiguous float32 {list(routed)}, not {weights.dtype} {list(weights.shape)}"
                )
            device = x.device
            for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
                if tensor.device != device:
                    raise RoutingError(f"{name} is on {tensor.device}, hidden_states on {device}; move it there")
            object.__setattr__(self, "num_tokens", tokens)
            object.__setattr__(self, "top_k", routed[1])
        except (AttributeError, RuntimeError, TypeError, RampMoEError):
            check_dense(ShapeError, hidden_states=self.hidden_states)
            check_dense(RoutingError, topk_ids=self.topk_ids, topk_weights=self.topk_weights)
            raise


def kernel_ids(topk_ids: Tensor, num_experts: int, num_valid: Tensor | None) -> Tensor:
    """Convert topk_ids, int32 or int64 `[T, k]`, to a Batch's int32.

    num_valid: int32 `[1]`; ids of tokens from this one on become -1. None if all tokens are valid.
    """
    import torch

    ids = topk_ids
    if ids.dtype == torch.int64:  # an id beyond 32 bits would wrap around to an expert; clamped, it stays out of range
        ids = ids.clamp(-2, num_experts + 1).to(torch.int32)
    if num_valid is not None:
        ids = ids.where(_row_numbers(len(ids), ids.device) < num_valid, -1)
    return ids


def _row_numbers(count: int, device: torch.device) -> Tensor:
    """0 to count - 1, int32 `[count, 1]`."""
    import torch

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # memory that is made now is the graph's
        return torch.arange(count, dtype=torch.int32, device=device)[:, None]
    return _kept_row_numbers(1 << count.bit_length(), device)[:count]


@functools.cache
def _kept_row_numbers(count: int, device: torch.device) -> Tensor:
    import torch

    rows = allocate(4 * count, device).view(torch.int32)
    torch.arange(count, dtype=torch.int32, device=device, out=rows)
    if device.type == "cuda":  # other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return rows[:, None]


@dataclass
class Workspace:
    """Named device buffers that grow as needed and are reused, one set per stream.

    A buffer is valid until the next `get` of its name on the same stream; launches on the stream keep that order. An
    outgrown buffer is kept, since a captured graph may still use it. Sizes are powers of two, so all buffers of a name
    take at most twice the largest.

    Two threads that launch on one stream would write to the same buffers. A layer therefore holds `lock` until all of
    a batch is launched. A copy of a workspace starts without buffers.
    """

    _buffers: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _latest: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """The views last returned. The layers of a model ask for the same ones, and making a view takes microseconds."""
    _outgrown: list[Tensor] = field(default_factory=list)
    _plans: dict[tuple[str, int], tuple[object, Any]] = field(default_factory=dict)
    """By name and stream, what `plan` was last asked for, and what it made."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of this shape and dtype, on the current stream of `device`."""
        stream = _stream(device)
        latest = self._latest.get((name, stream))
        if latest is not None and latest.dtype == dtype and latest.shape == tuple(shape) and latest.device == device:
            return latest
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get((name, stream))
        if buffer is None or buffer.numel() < size or buffer.device != device:
            if buffer is not None:
                self._outgrown.append(buffer)
            buffer = allocate(1 << max(size - 1, 255).bit_length(), device)
            self._buffers[name, stream] = buffer
        found = self._latest[name, stream] = buffer[:size].view(dtype).view(tuple(shape))
        return found

    def plan(self, name: str, key: object, device: torch.device, make: Callable[[], T]) -> T:
        """What `make` returns, kept for as long as the key stays the same: the layers of a model launch alike.

        name: of who asks; each has one plan for each stream. key: all that the plan depends on, a tuple to be compared.
        A plan may hold buffers of this workspace, which live as long as it does.
        """
        at = name, _stream(device)
        known = self._plans.get(at)
        if known is not None and known[0] == key:
            found: T = known[1]
            return found
        found = make()
        self._plans[at] = key, found
        return found

    @property
    def bytes(self) -> int:
        return sum(b.numel() for b in (*self._buffers.values(), *self._outgrown))


def _stream(device: torch.device) -> int:
    """The current stream's address; current_stream(), which makes an object, takes several times as long."""
    import torch

    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


def allocate(size: int, device: torch.device) -> Tensor:
    """Allocate uint8 `[size]` outside the memory pools that this thread may be told to use.

    torch.compile's graphs reuse the memory in their pools, so whatever outlives a call must lie elsewhere. During a
    capture the memory is the graph's own.
    """
    import torch

    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)

    def elsewhere() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(size, dtype=torch.uint8, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(elsewhere).result()


class LaunchableKernel(Kernel):
    """A kernel that can run, not only be described. It implements `prepare`, `default_config` and `run`."""

    requires: tuple[str, ...] = ()
    """Packages that `run` imports, as in `requires = ("triton",)`: names that import and pip share."""
    hidden_dtypes: tuple[str, ...] = ("bf16", "fp16")
    """Dtypes of hidden states that `run` takes. A layer computes batches of other dtypes by other kernels."""
    graph_safe = True
    """True if `launch` may be captured in a CUDA graph once it has run on the same stream with the same sizes."""
    switchable = True
    """True if its launches lose no time as graph nodes that a device-side selector switches on and off."""

    def unavailable(self) -> str | None:
        """Why this kernel cannot run here, with the remedy, although its description is fine; None if it can.

        By default, names the packages of `requires` that are missing. A kernel may add reasons, such as a package that
        is too old. Imports nothing heavy.
        """
        if isinstance(self.requires, str):
            return f"requires = {self.requires!r} names no packages; write requires = ({self.requires!r},)"
        missing = [name for name in self.requires if not is_installed(name)]
        return f"{' and '.join(missing)} missing: pip install {' '.join(missing)}" if missing else None

    @abstractmethod
    def prepare(self, weights: MoEWeights) -> Any:
        """Bring the weights into the kernel's own form, once. Weights in a layout that it reads are not copied.

        A layer gives the weights in one of `readable_layouts`, or gate-first if none of those is in LAYOUTS. Raises
        KernelError if the kernel cannot take them.
        """

    @abstractmethod
    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """The choice by batch size alone, for use without a profile."""

    def warm_sizes(self, shape: MoEShape, max_tokens: int) -> Sequence[int]:
        """Numbers of tokens, up to max_tokens: a configuration that was launched with each of them has compiled all
        that batches of 1 to max_tokens tokens run. By default the largest alone, for a kernel of which the size of a
        batch decides nothing that is compiled."""
        return (max_tokens,)

    @abstractmethod
    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None] | None:
        """Compute a batch of at least one token into `out`, `[T, H]` of the hidden states' dtype.

        All launches go to the current stream; nothing synchronises with the host. Write it as a generator that yields
        once each stage of `config.stages` is launched, in their order: `launch` and `steps` follow from it. A function
        that returns None is timed as a whole. If it returns anything else, `launch` and `steps` raise TypeError.
        """

    def launch(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> None:
        """Run all stages of `run`."""
        for _ in self._running(config, prepared, batch, out, workspace) or ():
            pass

    def steps(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[str]:
        """Run stage by stage, yielding the key of each stage after its launch. A profiler times the stages this way.

        If `run` is no generator, launches everything and yields nothing. Raises KernelError if a generator does not
        yield exactly once per stage.
        """
        running = self._running(config, prepared, batch, out, workspace)
        if running is None:
            return
        yielded = 0
        for _ in running:
            yielded += 1
            if yielded <= len(config.stages):
                yield config.stages[yielded - 1].key
        if yielded != len(config.stages):
            raise KernelError(
                f"{self.name}.run yields {yielded} times, {config.name} has {len(config.stages)} stages; yield after "
                "each of them"
            )

    def _running(self, *given: Any) -> Iterator[None] | None:
        running: object = self.run(*given)
        if running is not None and not isinstance(running, Iterator):
            raise TypeError(
                f"{self.name}.run returned {type(running).__name__}; it writes to out, and returns nothing or is a "
                "generator"
            )
        return running

    def routes(self, config: KernelConfig, shape: MoEShape, num_tokens: int) -> bool:
        """Whether `launch_routed` takes a batch of `num_tokens` tokens. By default no batch."""
        return False

    def launch_routed(
        self,
        config: KernelConfig,
        prepared: Any,
        router: RouterLogits,
        batch: Batch,
        out: Tensor,
        workspace: Workspace,
    ) -> None:
        """Choose the experts, and compute the batch with them, in no more launches than `launch` takes.

        batch: its topk_ids and topk_weights are written: the chosen experts, -1 for padding, and their weights.

        Raises KernelError if the kernel has no such launch.
        """
        raise KernelError(f"{self.name} does not choose experts itself")

    def inline_key(self, config: KernelConfig, shape: MoEShape) -> Hashable | None:
        """A key that configurations must share for `launch_inline` to take them together.

        None if `launch_inline` never takes the configuration, which is the default.
        """
        return None

    def launch_inline(
        self,
        configs: Sequence[KernelConfig],
        choice: Tensor,
        prepared: Any,
        batch: Batch,
        out: Tensor,
        workspace: Workspace,
    ) -> None:
        """Launch configs[choice], with the choice read when the launches run.

        configs: two to four of one `inline_key`.
        choice: int32 `[1]` on the device. In a CUDA graph it may differ at every replay.

        Raises KernelError if the kernel has no such launch.
        """
        raise KernelError(f"{self.name} cannot be several configurations in one launch")


def obstacle(kernel: LaunchableKernel, shape: MoEShape, hardware: Hardware) -> str | None:
    """Why the kernel cannot compute the shape here, by `unsupported` and `unavailable`; None if it can.

    A kernel that fails to answer has an obstacle, too: it must not stop those that run.
    """
    try:
        answer = why_unsupported(kernel, shape, hardware) or kernel.unavailable()
    except Exception as e:
        return f"broken: {describe(e)}" if isinstance(e, RampMoEError) else f"broken: {type(e).__name__}: {describe(e)}"
    return reason_of(answer, "unavailable")
