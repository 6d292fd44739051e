"""Times kernels and an engine's own experts on the weights of a layer that the engine has loaded."""

from __future__ import annotations

import contextvars
import gc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from ramp_moe.plugin import Batch, Hardware, KernelError, LaunchableKernel, MoEWeights, version_of
from ramp_moe.runtime.calibration import Timer, spread
from ramp_moe.runtime.graph_timer import GraphTimer
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.kernel import known_version
from torch import Tensor

T = TypeVar("T")
Own = Callable[[Batch, Tensor], None]
"""Runs an engine's own experts on a batch whose ids are of all ranks' experts. It may write its output elsewhere."""


@dataclass(frozen=True)
class LoadedLayer:
    """One of an engine's layers, with this rank's weights as they were loaded.

    dtype: of hidden states.
    kind: all by which layers differ, alike on all ranks of a tensor-parallel group.
    captured: numbers of tokens of CUDA graphs, ascending.
    most: tokens of the largest batch.
    local: converts ids of all ranks' experts to this rank's, and other ranks' to -1.
    own: makes the engine's own experts of the weights. None if the engine has none that read them as they are loaded:
        the layer may then hold them in a kernel's own format alone.
    like: names of the kernels that are no slower than the experts that the engine would take instead, if own is None.
    depends: what else their times depend on, by name.
    """

    weights: MoEWeights
    top_k: int
    ep_size: int
    dtype: torch.dtype
    kind: tuple[object, ...]
    captured: tuple[int, ...]
    most: int
    local: Callable[[Tensor], Tensor] = field(repr=False)
    own: Callable[[], Own] | None = field(repr=False)
    depends: Mapping[str, str] = field(default_factory=dict)
    like: frozenset[str] = frozenset()

    @property
    def sizes(self) -> list[int]:
        """Batch sizes to measure, ascending."""
        return spread(self.captured, self.most)

    @property
    def eager(self) -> list[int]:
        """Those of `sizes` that no CUDA graph holds."""
        return [n for n in self.sizes if n > max(self.captured, default=0)]


def key_of(engine: str, layer: LoadedLayer, hardware: Hardware, kernels: Sequence[LaunchableKernel]) -> dict[str, str]:
    """The key of a calibration record: all that its times depend on. engine: its name; in small letters, its
    package's."""
    weights = layer.weights
    return {
        "engine": engine,
        "gpu": torch.cuda.get_device_name() if weights.gate_up.is_cuda else hardware.name,
        "driver": _driver(),
        "shape": weights.shape(layer.top_k).slug,
        "weights": f"{weights.activation}, bias {weights.gate_up_bias is not None}, blocks {weights.scale_block}",
        "ep_size": str(layer.ep_size),
        "activations": str(layer.dtype),
        "sizes": ",".join(map(str, layer.sizes)),
        "kernels": ",".join(f"{k.name} {_version(k)}" for k in kernels),
        **layer.depends,
        **{name: version_of(name) for name in (engine.lower(), "torch", "triton")},
    }


def elsewhere(run: Callable[[], T]) -> T:
    """Call `run` in a separate thread. In this one, an engine may allocate from a pool that it frees while it
    sleeps."""
    context = contextvars.copy_context()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def there() -> T:
        if device is not None:
            torch.cuda.set_device(device)
        return context.run(run)

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(there).result()
    if device is not None:
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _gpu_timer(layer: LoadedLayer, kernels: Sequence[LaunchableKernel], hardware: Hardware) -> Timer:
    """The timer of all kernels and of the engine's own experts, on the loaded weights."""
    ours = LayerRuntime(layer.weights, layer.top_k, hardware, kernels, copies=3, host_sync_us=math.inf)
    own = None if layer.own is None else layer.own()

    def launch(candidate: Any, batch: Batch, out: Tensor) -> None:
        if candidate is None:
            if own is None:
                raise KernelError("the engine has no experts of its own on these weights")
            own(batch, out)
            return
        if (reason := ours.dropped.get(candidate.kernel)) is not None:
            raise KernelError(reason)
        ids = layer.local(batch.topk_ids).int().contiguous()
        ours.launch(candidate, Batch(batch.hidden_states, ids, batch.topk_weights), out)

    def safe(candidate: Any) -> bool:
        return candidate is None or ours.kernel(candidate.kernel)[0].graph_safe

    return GraphTimer(launch, layer.weights, layer.dtype, layer.local, safe)


TIMERS: dict[str, Callable[[LoadedLayer, Sequence[LaunchableKernel], Hardware], Timer]] = {"cuda": _gpu_timer}
"""Makers of timers, by type of device. Nothing is measured on other types."""


def _version(kernel: LaunchableKernel) -> str:
    try:
        return known_version(kernel)
    except KernelError:  # a plugin's own mistake, which must not stop the others; its kernel is tried apart
        return "?"


def _driver() -> str:
    """The version of NVIDIA's driver; "?" if there is none."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\s(\d+(?:\.\d+)+)\s", file.readline())
    except OSError:
        found = None
    return found[1] if found else "?"
