"""What a kernel that runs is given: weights, a batch, buffers; and what it must offer to be dispatched to."""

from __future__ import annotations

import functools
import logging
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import KernelError, RoutingError, ShapeError, UnknownNameError
from .hardware import Hardware
from .kernel import LAYOUTS, Kernel, KernelConfig, is_installed
from .shapes import SCALE_BLOCK, MoEShape, scale_block, scale_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

ACTIVATIONS = ("swiglu", "gelu_tanh", "swiglu_oai", "swiglu_clamped")
"""silu(gate) * up; gelu(gate, tanh) * up; gpt-oss: gate cut off above 7 and up at -7 and 7, then gate *
sigmoid(1.702 gate) * (up + 1); DeepSeek-V4: the same cut at a limit that the weights name, then silu(gate) * up."""

_logger = logging.getLogger("ramp_moe")

ROW_CHUNK = 8
"""Rows of gate, and then of up, that lie together in the layout gate-up-interleaved-8."""


@dataclass(frozen=True)
class MoEWeights:
    """A layer's experts, contiguous on one device. What is given with other strides (padded rows, say) is copied, with
    a line in the log: until the tensor given is dropped it takes its memory twice, and what is then written to it has
    no effect.

    gate_up `[E, 2 I, H]` and down `[E, H, I]` are bf16, fp16 or float8_e4m3fn; fp8 weights come with float32 scales,
    one for each [B, B] block: gate_up_scale `[E, 2 ceil(I / B), H / B]`, down_scale `[E, H / B, ceil(I / B)]`. Gate and
    up have blocks of their own, counted from their first row, of which the last may be short. B is 128, or one of
    `ramp_moe.spec.shapes.scale_blocks` for a shard that begins inside a block of 128; H is a multiple of 128. Biases
    `[E, 2 I]` and `[E, H]` are optional. `layout`, one of LAYOUTS, is the order of the rows of gate_up and of its bias;
    so are the scale's, where one block row of gate and one of up come in turn if interleaved. Raises ShapeError for
    whatever does not fit together, UnknownNameError for an activation or a layout that does not exist, KernelError
    for a `limit` that the activation lacks or does not have: swiglu_clamped cuts gate and up off there.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "swiglu"
    layout: str = "gate-first"
    limit: float | None = None

    def __post_init__(self) -> None:
        import torch

        if self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", self.activation, ACTIVATIONS)
        if self.activation != "swiglu_clamped" and self.limit is not None:
            raise KernelError(f"{self.activation} takes no limit, here {self.limit}; swiglu_clamped does")
        if self.activation == "swiglu_clamped" and not (self.limit is not None and 0 < self.limit < math.inf):
            raise KernelError(f"swiglu_clamped needs a positive limit, as limit=10.0, not {self.limit}")
        if self.gate_up.ndim != 3 or self.gate_up.shape[1] % 2:
            raise ShapeError(f"gate_up must be [E, 2 I, H], not {list(self.gate_up.shape)}")
        experts, rows, hidden = self.gate_up.shape
        inter = rows // 2
        check_layout(self.layout, inter)
        if self.gate_up.dtype not in _dtype_names():
            raise ShapeError(f"gate_up is {self.gate_up.dtype}; weights must be bf16, fp16 or float8_e4m3fn")
        expected: dict[str, tuple[tuple[int, ...], Any]] = {"down": ((experts, hidden, inter), self.gate_up.dtype)}
        if self.gate_up.dtype == torch.float8_e4m3fn:
            if hidden % SCALE_BLOCK:
                raise ShapeError(f"fp8 weights need a hidden size in multiples of {SCALE_BLOCK}, not {hidden}")
            block = self.scale_block or SCALE_BLOCK
            wide, deep = hidden // block, -(-inter // block)
            expected["gate_up_scale"] = ((experts, 2 * deep, wide), torch.float32)
            expected["down_scale"] = ((experts, wide, deep), torch.float32)
        elif self.gate_up_scale is not None or self.down_scale is not None:
            raise ShapeError(f"scales belong to fp8 weights, these are {self.gate_up.dtype}")
        if self.gate_up_bias is not None:
            expected["gate_up_bias"] = ((experts, rows), None)
        if self.down_bias is not None:
            expected["down_bias"] = ((experts, hidden), None)
        for name, (shape, dtype) in expected.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                raise ShapeError(f"fp8 weights need {name}, float32 {list(shape)}")
            if tuple(tensor.shape) != shape:
                blocks = " or ".join(map(str, scale_blocks(inter)))
                apart = f"; gate and up have scale blocks of their own, of {blocks}" if inter % SCALE_BLOCK else ""
                hint = apart if name == "gate_up_scale" else ""
                raise ShapeError(f"{name} must be {list(shape)}, not {list(tensor.shape)}{hint}")
            if dtype is not None and tensor.dtype != dtype:
                raise ShapeError(f"{name} must be {dtype}, not {tensor.dtype}")
        for name in ("gate_up_bias", "down_bias"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ShapeError(f"{name} must be float32, bf16 or fp16, not {tensor.dtype}")
        for name in ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                _note_copy(name, tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize * tensor.numel() / 2**30)
                object.__setattr__(self, name, tensor.contiguous())
            if tensor is not None and tensor.device != self.gate_up.device:
                raise ShapeError(f"{name} is on {tensor.device}, gate_up on {self.gate_up.device}; move it there")

    @property
    def scale_block(self) -> int | None:
        """Rows, and columns, that share an fp8 scale, by the columns of gate_up_scale; None without scales."""
        if self.gate_up_scale is None:
            return None
        return scale_block(self.gate_up_scale.shape[-1], self.gate_up.shape[2], self.gate_up.shape[1] // 2)

    def shape(self, top_k: int, name: str | None = None) -> MoEShape:
        """The layer's shape, for a router that names `top_k` experts a token."""
        experts, rows, hidden = self.gate_up.shape
        return MoEShape(experts, top_k, hidden, rows // 2, _dtype_names()[self.gate_up.dtype], name)


@functools.cache  # once for all the layers of a model
def _note_copy(name: str, shape: tuple[int, ...], stride: tuple[int, ...], gib: float) -> None:
    _logger.warning(
        "ramp_moe: %s %s has the strides %s: it is copied, %.3g GiB a layer more until yours is dropped",
        name, list(shape), list(stride), gib,
    )  # fmt: skip


def check_layout(layout: str, intermediate_size: int) -> None:
    """Raises UnknownNameError for a layout that is not in LAYOUTS, ShapeError for one that the size rules out."""
    if layout not in LAYOUTS:
        raise UnknownNameError("weight layout", layout, LAYOUTS)
    if layout == "gate-up-interleaved-8" and intermediate_size % ROW_CHUNK:
        raise ShapeError(f"{layout} needs an intermediate size in multiples of {ROW_CHUNK}, not {intermediate_size}")


def _dtype_names() -> dict[torch.dtype, str]:
    import torch

    return {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Batch:
    """One step's input: hidden_states `[T, H]` bf16 or fp16, topk_ids int32 `[T, k]`, topk_weights float32 `[T, k]`.

    Ids of -1 or E are skipped (expert parallelism, padding); so is any other id out of range. Raises ShapeError or
    RoutingError for tensors that do not fit together.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def __post_init__(self) -> None:
        import torch

        x, ids, weights = self.hidden_states, self.topk_ids, self.topk_weights
        if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
            raise ShapeError(f"hidden_states must be contiguous bf16 or fp16 [T, H], not {x.dtype} {list(x.shape)}")
        if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype != torch.int32 or not ids.is_contiguous():
            raise RoutingError(
                f"topk_ids must be contiguous int32 [{x.shape[0]}, k], not {ids.dtype} {list(ids.shape)}"
            )
        if weights.shape != ids.shape or weights.dtype != torch.float32 or not weights.is_contiguous():
            raise RoutingError(
                f"topk_weights must be contiguous float32 {list(ids.shape)}, not {weights.dtype} {list(weights.shape)}"
            )
        for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
            if tensor.device != x.device:
                raise RoutingError(f"{name} is on {tensor.device}, hidden_states on {x.device}; move it there")

    @property
    def num_tokens(self) -> int:
        return int(self.hidden_states.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[1])


def kernel_ids(topk_ids: Tensor, num_experts: int, num_valid: Tensor | None) -> Tensor:
    """topk_ids `[T, k]` int32 or int64 as a Batch has them, int32, with -1 for tokens from num_valid int32 `[1]` on."""
    import torch

    ids = topk_ids
    if ids.dtype == torch.int64:  # beyond 32 bits they would wrap around to an expert: they stay out of range
        ids = ids.clamp(-2, num_experts + 1).to(torch.int32)
    if num_valid is not None:
        ids = ids.where(torch.arange(len(ids), dtype=torch.int32, device=ids.device)[:, None] < num_valid, -1)
    return ids


@dataclass
class Workspace:
    """Named device buffers that grow as needed and are used again, one set for each stream.

    A buffer is valid until the next `get` of its name on the same stream, which is the order that the stream runs in.
    One that was outgrown is kept, since a captured graph may still use it; sizes double, so that all of them together
    are at most twice the largest. Threads that launch on one stream would write to each other's: a layer holds `lock`
    until all of a batch is launched. A copy has buffers of its own.
    """

    _buffers: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _latest: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """As they were last asked for: the layers of a model ask alike, and making a view takes microseconds."""
    _outgrown: list[Tensor] = field(default_factory=list)
    _plans: dict[tuple[str, int], tuple[object, Any]] = field(default_factory=dict)
    """By name and stream, what `plan` was last asked for, and what it made."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of this shape and dtype."""
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
    """Bytes, in none of the memory pools that this thread may be told to allocate from: torch.compile's graphs use the
    memory in theirs again, and whatever outlives a call must not be there. In a capture they are the graph's own."""
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
    """A kernel that can run here, not only be described. It implements `prepare`, `default_config` and `run`."""

    requires: tuple[str, ...] = ()
    """Packages that `run` imports, as `requires = ("triton",)`: by the name of the import, which pip must know, too."""
    graph_safe = True
    """Whether `launch` may be captured in a CUDA graph, once it has run on the same stream with the same sizes."""
    switchable = True
    """Whether its kernels are as fast as nodes of a graph that other kernels can switch on and off."""

    def unavailable(self) -> str | None:
        """Why this kernel cannot run here although its description is fine, with the remedy; None if it can. By default
        the packages of `requires` that are missing. Another reason is a package that is too old. Imports nothing heavy.
        """
        if isinstance(self.requires, str):
            return f"requires = {self.requires!r} names no packages; write requires = ({self.requires!r},)"
        missing = [name for name in self.requires if not is_installed(name)]
        return f"{' and '.join(missing)} missing: pip install {' '.join(missing)}" if missing else None

    @abstractmethod
    def prepare(self, weights: MoEWeights) -> Any:
        """Bring the weights into the kernel's own form, once; what is given in a layout that it reads is not copied.

        A layer gives the weights in one of `readable_layouts`, or gate-first where none of those is in LAYOUTS. Raises
        KernelError where the kernel cannot take them.
        """

    @abstractmethod
    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        """The static choice for a batch size, for where there is no profile."""

    def warm_sizes(self, shape: MoEShape, max_tokens: int) -> Sequence[int]:
        """Numbers of tokens, up to max_tokens: a configuration that was launched with each of them has compiled all
        that batches of 1 to max_tokens tokens run. By default the largest alone, for a kernel of which the size of a
        batch decides nothing that is compiled."""
        return (max_tokens,)

    @abstractmethod
    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None] | None:
        """Write out `[T, H]` for a batch with at least one token, in the order of the current stream, without
        synchronising with the host.

        A generator yields after each stage of `config.stages`, in their order, once the stage is launched; `launch`
        and `steps` follow from it. A function that yields nothing is timed as a whole. For one that returns something
        `launch` and `steps` raise TypeError.
        """

    def launch(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> None:
        """All of `run`."""
        for _ in self._running(config, prepared, batch, out, workspace) or ():
            pass

    def steps(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[str]:
        """`run`, stage by stage: launches one and yields its key, then the next. A profiler times the stages so. A
        `run` that yields nothing is one step without a key. Raises KernelError if `run` yields more or less often than
        the configuration has stages."""
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

    def inline_key(self, config: KernelConfig, shape: MoEShape) -> Hashable | None:
        """What configurations must share for `launch_inline` to take them together. None for one that it never takes,
        which by default all are."""
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
        """`launch` of configs[choice], whichever that is when the launches run: choice int32 `[1]` is on the device,
        and in a CUDA graph may differ at every replay. configs are two to four of one `inline_key`. Raises KernelError
        where the kernel has no such launch."""
        raise KernelError(f"{self.name} cannot be several configurations in one launch")
