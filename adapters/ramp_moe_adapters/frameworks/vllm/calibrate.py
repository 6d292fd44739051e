"""Measures the first of vLLM's layers of each shape when it is loaded, against vLLM's own experts. Needs vLLM.

Rank 0 of a tensor-parallel group measures, and all ranks of the group choose by its times.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from ramp_moe.plugin import Batch, Hardware, KernelError, LaunchableKernel, MoEWeights, version_of
from ramp_moe.runtime import calibrated_plan, probe
from ramp_moe.runtime.calibrated_plan import Calibrated, CalibrationRecord
from ramp_moe.runtime.calibration import Calibration, Search, Timer, spread
from ramp_moe.runtime.calibration_seconds import VARIABLE, seconds
from ramp_moe.runtime.graph_timer import GraphTimer
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import LayerPlan, usable_kernels
from ramp_moe.runtime.plan_report import left, plan_rows, table
from ramp_moe.runtime.warm import warm
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

from ..engine_errors import why
from ..engine_weights import LAYOUT
from .stock import Stock

if TYPE_CHECKING:
    from torch import Tensor

STOCK = "vllm_triton"
"""The adapter kernel of vLLM's own path. It is not timed, since that path is timed as vLLM runs it."""
ENGINE = "vLLM"
FORM = "w13_weight", "w13_weight_scale_inv", "w13_bias", "w2_bias"
"""Parameters of vLLM's by which layers of one size differ."""
_agreed: dict[object, CalibrationRecord | None] = {}
"""Records that the ranks share, by `group_key`."""
_spent: list[float] = []
"""Seconds that each measured shape took in this process. The time limit is for the whole model."""


@dataclass(frozen=True)
class LoadedLayer:
    """One of vLLM's layers, with this rank's weights as they were loaded.

    moe: its configuration.
    module: its RoutedExperts.
    local_ids: see `RampExperts`.
    captured: numbers of tokens of CUDA graphs, ascending.
    most: tokens of the largest batch.
    """

    moe: Any
    module: Any
    weights: MoEWeights
    top_k: int
    ep_size: int
    local_ids: Tensor | None
    captured: tuple[int, ...]
    most: int

    @property
    def eager(self) -> list[int]:
        return [n for n in self.sizes if n > max(self.captured, default=0)]

    @property
    def sizes(self) -> list[int]:
        return spread(self.captured, self.most)


def layer_of(module: Any, moe: Any, weights: MoEWeights, ep_size: int, local_ids: Tensor | None) -> LoadedLayer:
    """Describe a module of vLLM, whose weights are loaded."""
    ranks = moe.dp_size * moe.pcp_size
    config = get_current_vllm_config_or_none()
    captured = () if config is None else config.compilation_config.cudagraph_capture_sizes or ()
    kept = tuple(sorted(n * ranks for n in captured))
    return LoadedLayer(moe, module, weights, module.top_k, ep_size, local_ids, kept, moe.max_num_tokens * ranks)


def group_key(moe: Any, module: Any) -> object:
    """What ranks that agree have in common of a layer: all that makes it another kind of layer, measured apart."""
    sizes = moe.num_experts, moe.experts_per_token, moe.hidden_dim, moe.intermediate_size_per_partition
    # Without the first size: ranks may have unlike numbers of experts.
    forms = (None if t is None else (str(t.dtype), *t.shape[1:]) for t in map(module._parameters.get, FORM))
    return *sizes, str(moe.in_dtype), str(moe.activation), *forms


def agree(key: object, measure: Callable[[], CalibrationRecord | None]) -> CalibrationRecord | None:
    """What rank 0 of the tensor-parallel group measured, on all of its ranks. `measure` runs once per key.

    Every rank must call this for the same keys in the same order, whatever failed before.
    """
    if key not in _agreed:
        group = _group()
        if group is None:
            _agreed[key] = measure()
        else:
            record = measure() if group.rank_in_group == 0 else None
            told = [None if record is None else msgspec.json.encode(record)]
            torch.distributed.broadcast_object_list(told, src=group.ranks[0], group=group.cpu_group)
            _agreed[key] = None if told[0] is None else msgspec.json.decode(told[0], type=CalibrationRecord)
    return _agreed[key]


def _group() -> Any:
    """vLLM's group of tensor-parallel ranks; None for a rank alone."""
    group = get_tp_group() if model_parallel_is_initialized() else None
    return None if group is None or group.world_size == 1 else group


def calibrate(plan: LayerPlan, layer: LoadedLayer, say: Callable[[str], None]) -> Calibrated | None:
    """Make the shape's plan from times on the layer. Returns None if nothing is to be, or can be, measured.

    plan: without times. Raises KernelError if every candidate failed.
    """
    shape = layer.weights.shape(layer.top_k)
    limit = seconds(say)
    kernels = [k for k in usable_kernels(shape, plan.hardware) if k.name != STOCK]
    model = plan.model

    def search(found: Calibration | None) -> Search:
        return Search(shape, plan.hardware, kernels, model, layer.sizes, layer.ep_size, found)

    def probed(found: Calibration | None) -> Search:
        nonlocal kernels
        faults = {k.name: f for k in probe.third_party(kernels) if (f := probe.fault(k.name, shape, plan.hardware))}
        kernels = [k for k in kernels if k.name not in faults]
        begun = search(found)
        begun.found.dropped |= faults
        return begun

    def measure() -> CalibrationRecord | None:
        nonlocal limit
        make = TIMERS.get(layer.weights.gate_up.device.type)
        if not limit or make is None:
            return None
        limit -= sum(_spent)
        if limit <= 0:
            say(f"{shape.slug} is not measured: the time for a model is over ({VARIABLE})")
            return None
        began = time.monotonic()
        try:
            key = key_of(layer, plan.hardware, kernels)
            return elsewhere(
                lambda: calibrated_plan.measured(
                    key, probed, lambda: make(layer, kernels, plan.hardware), limit, say, kernels
                )
            )
        except Exception as e:  # whatever measuring raises: what is predicted stands
            say(f"nothing is measured: {why(e)}")
            return None
        finally:
            _spent.append(time.monotonic() - began)

    record = agree(group_key(layer.moe, layer.module), measure)
    if record is None:
        return None
    kernels = [k for k in kernels if k.name not in record.dropped]
    if record.key["shape"] != shape.slug:  # experts that do not divide evenly
        say(f"rank 0 has measured {record.key['shape']}, this rank has {shape.slug}: what is predicted stands")
        return None
    done = search(calibrated_plan.known(record))
    if not done.found.tokens and not done.found.dropped:
        say(f"no time was left to measure {shape.slug}: what is predicted stands ({VARIABLE})")
        return None
    return calibrated_plan.calibrated(done, plan, kernels, LAYOUT)


def compile_all(made: Calibrated, layer: LoadedLayer, runtime: LayerRuntime, say: Callable[[str], None]) -> None:
    """Compile what eager batches of any size can need, by launching every candidate that may be chosen.

    Candidates that raise are dropped.
    """
    assert made.plan.model is not None
    if layer.weights.gate_up.device.type not in TIMERS:
        return
    candidates = {c.name: c for c in made.plan.model.candidates}
    for name, reason in warm(runtime, candidates.values(), layer.most, layer.moe.in_dtype).items():
        say(f"left out: {name}: {reason}")
        runtime.drop(candidates[name], reason)


def report(made: Calibrated, layer: LoadedLayer, graphs: Any, say: Callable[[str], None]) -> None:
    """Log what computes each size, and keep it in the cache beside the times. Only the first of several ranks does."""
    if (group := _group()) is not None and group.rank_in_group:
        return
    rows = plan_rows(made, graphs, layer.captured, layer.eager, layer.ep_size)
    line = left(made, rows, ENGINE)
    shape = layer.weights.shape(layer.top_k)
    say("\n".join([f"{shape.slug}: what computes batches of how many tokens", *table(rows, ENGINE)]))
    if line:
        say(f"{shape.slug}: {line}")
    record = _agreed[group_key(layer.moe, layer.module)]
    if record is not None and (record.plan, record.left) != (rows, line):
        record.plan, record.left = rows, line
        calibrated_plan.keep(record, say)


def key_of(layer: LoadedLayer, hardware: Hardware, kernels: Sequence[LaunchableKernel]) -> dict[str, str]:
    """The key of a calibration record: all that its times depend on."""
    weights, moe = layer.weights, layer.moe
    return {
        "engine": ENGINE,
        "gpu": torch.cuda.get_device_name() if weights.gate_up.is_cuda else hardware.name,
        "driver": _driver(),
        "shape": weights.shape(layer.top_k).slug,
        "weights": f"{weights.activation}, bias {weights.gate_up_bias is not None}, blocks {weights.scale_block}",
        "ep_size": str(layer.ep_size),
        "activations": str(moe.in_dtype),
        "sizes": ",".join(map(str, layer.sizes)),
        "tuned": os.environ.get("VLLM_TUNED_CONFIG_FOLDER", ""),
        "kernels": ",".join(f"{k.name} {_version(k)}" for k in kernels),
        **{name: version_of(name) for name in ("vllm", "torch", "triton")},
    }


def elsewhere(run: Callable[[], CalibrationRecord]) -> CalibrationRecord:
    """Call `run` in a separate thread. In this one, vLLM may allocate from the pool that a sleeping server frees."""
    context = contextvars.copy_context()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def there() -> CalibrationRecord:
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
    """The timer of all kernels and of vLLM's experts, on the loaded weights."""
    ours = LayerRuntime(layer.weights, layer.top_k, hardware, kernels, copies=3)
    stock, moe, module = Stock(layer.moe, layer.weights), layer.moe, layer.module
    spaces = functools.lru_cache(maxsize=1)(lambda n: stock.workspaces(n, layer.top_k, module.activation, moe.in_dtype))

    def local(ids: Tensor) -> Tensor:
        return ids if layer.local_ids is None else layer.local_ids[ids]

    def launch(candidate: Any, batch: Batch, out: Tensor) -> None:
        if candidate is not None:
            if (reason := ours.dropped.get(candidate.kernel)) is not None:
                raise KernelError(reason)
            here = Batch(batch.hidden_states, local(batch.topk_ids).int().contiguous(), batch.topk_weights)
            ours.launch(candidate, here, out)
            return
        stock.run(
            out, batch.hidden_states, batch.topk_weights, batch.topk_ids, module.activation, moe.num_experts,
            module.expert_map, *spaces(batch.num_tokens),
        )  # fmt: skip

    def safe(candidate: Any) -> bool:
        return candidate is None or ours.kernel(candidate.kernel)[0].graph_safe

    return GraphTimer(launch, layer.weights, moe.in_dtype, local, safe)


TIMERS: dict[str, Callable[[LoadedLayer, Sequence[LaunchableKernel], Hardware], Timer]] = {"cuda": _gpu_timer}
"""Makers of timers, by type of device. Nothing is measured on other types."""


def _version(kernel: LaunchableKernel) -> str:
    try:
        return kernel.version()
    except Exception:  # a plugin's own mistake, which must not stop the others; its kernel is tried apart
        return "?"


def _driver() -> str:
    try:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no NVIDIA driver
        return "?"
