"""Makes and warms up all layers of a model in SGLang, once it is loaded. Needs SGLang.

This precedes the KV cache, which takes the memory that is left. Once the model's graphs are captured, a table in the
log tells which candidate runs at which batch size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from ramp_moe.plugin import Batch
from ramp_moe.runtime.layer_factory import LayerKind, kind_of
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_schedule

from ..engine_errors import why
from . import runner as backend
from .runner import Choices, RampRunnerCore

if TYPE_CHECKING:
    from ramp_moe.runtime.layer import LayerRuntime

LOADED = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
CAPTURED = "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs"
EAGER = "eager"
_logger = logging.getLogger("ramp_moe")


def install() -> None:
    """Make `ramp_moe` a choice of `--moe-runner-backend`, and have its layers made when a model is loaded.

    A second call has no effect. Raises KernelError as `runner.install` does.
    """
    if backend.install():
        HookRegistry.register(LOADED, loaded, HookType.AFTER)
        HookRegistry.register(CAPTURED, captured, HookType.AFTER)


def loaded(_: None, runner: Any, *args: Any, **options: Any) -> None:
    """After SGLang has loaded a model, make its layers, and run one of each kind at the sizes that it may meet outside
    of graphs. Kernels are then compiled, and buffers have their size, before the first request. What fails is said, and
    left to the first batch."""
    try:
        make_layers(runner.model, getattr(runner.model_config.hf_text_config, "num_experts_per_tok", None))
        for core in first_of_each_kind(runner.model).values():
            _logger.info("ramp_moe: warming up %s", core.layer.shape.title)
            core.eager = warm_up(core.layer, _most_tokens(), runner.model_config.dtype)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # frees weights in SGLang's order: the KV cache is sized by what is free
    except Exception as e:  # a server must not end by it
        _logger.warning("ramp_moe: layers are made when they first run: %s", why(e))


def captured(_: None, runner: Any, *args: Any, **options: Any) -> None:
    """Log what was chosen, after SGLang has captured its graphs."""
    try:
        for line in report(runner.model):
            _logger.info("ramp_moe: %s", line)
    except Exception as e:
        _logger.warning("ramp_moe: what was chosen cannot be said: %s", why(e))


def make_layers(model: torch.nn.Module, top_k: int | None) -> None:
    """Make the layer of each of the model's modules that ramp_moe computes, one after another.

    top_k: the model's, for modules that do not tell theirs. A layer that cannot be made is left to SGLang, and each
    reason is logged once.
    """
    for module, core in _cores(model):
        ids = core.config.top_k or top_k
        if ids is not None and not core.config.num_fused_shared_experts:
            core.make(module.quant_method.get_triton_quant_info(module), ids)


def warm_up(layer: LayerRuntime, most: int, dtype: torch.dtype) -> Choices:
    """Run a layer at all sizes up to `most` tokens for which choices are made.

    Returns what ran, by size. Raises KernelError if no kernel computes one of them.
    """
    shape, device, found = layer.shape, layer.held[0].down.device, Choices()
    x = torch.zeros(most, shape.hidden_size, dtype=dtype, device=device)
    ids = torch.arange(most * shape.top_k, dtype=torch.int32, device=device).remainder_(shape.num_experts)
    weights = torch.full((most, shape.top_k), 1 / shape.top_k, dtype=torch.float32, device=device)
    with torch.inference_mode():
        # The largest comes first, so that buffers grow once. One less than a size has other divisors, for which Triton
        # compiles other code.
        for n in sorted({size - less for size in sizes(most) for less in (0, 1)} - {0}, reverse=True):
            batch = Batch(x[:n], ids.view(most, -1)[:n], weights[:n])
            layer(batch.hidden_states, batch.topk_ids, batch.topk_weights)
            found[n] = EAGER, layer.choose(batch).name, 1
    return dict(sorted(found.items()))


def sizes(most: int) -> list[int]:
    """Numbers of tokens up to `most`, ascending, four in each octave. The layer rounds other numbers up to these."""
    steps = (range(1 << bit, 2 << bit, max(1, 1 << bit >> 2)) for bit in range(most.bit_length()))
    return sorted({min(n, most) for n in itertools.chain(*steps)})


def first_of_each_kind(model: torch.nn.Module) -> dict[LayerKind, RampRunnerCore]:
    """Those whose layers are made."""
    found: dict[LayerKind, RampRunnerCore] = {}
    for _, core in _cores(model):
        if core.made:
            found.setdefault(_kind(core.layer), core)
    return found


def _kind(layer: LayerRuntime) -> LayerKind:
    return kind_of(layer.held[0], layer.shape.top_k)


def report(model: torch.nn.Module) -> Iterator[str]:
    """Lines of a table for each kind of layer: batch sizes, how they are dispatched, and by what."""
    cores = [core for _, core in _cores(model)]
    for kind, core in first_of_each_kind(model).items():
        number = sum(other.made and _kind(other.layer) == kind for other in cores)
        yield f"{kind.shape.title}, {number} of {len(cores)} layers"
        graphs = core.layer.graphs
        plans = {} if graphs is None else graphs.plans
        in_graphs: Choices = {n: (p.mode, p.bodies[0].name, len(p.bodies)) for n, p in sorted(plans.items())}
        yield from (f"  in graphs, {line}" for line in _lines(in_graphs))
        yield from (f"  {line}" for line in _lines(core.eager))
        yield from (f"  dropped {name}: {reason}" for name, reason in core.layer.dropped.items())
    if left := sum(not core.made for core in cores):
        yield f"{left} of {len(cores)} layers are SGLang's own"


def _lines(choices: Mapping[int, tuple[str, str, int]]) -> Iterator[str]:
    """Lines of a table of choices. Neighbouring sizes with the same choice share a line."""
    for (mode, name, bodies), group in itertools.groupby(choices, key=lambda n: choices[n]):
        of = list(group)
        several = f", first of {bodies}" if bodies > 1 else ""
        tokens = f"{of[0]} to {of[-1]}" if len(of) > 1 else f"{of[0]}"
        yield f"{tokens} tokens: {mode}, {name}{several}"


def _cores(model: torch.nn.Module) -> Iterator[tuple[Any, RampRunnerCore]]:
    """The modules whose runner is ramp_moe's, each with its runner."""
    for module in model.modules():
        core = getattr(getattr(getattr(module, "quant_method", None), "runner", None), "runner_core", None)
        if isinstance(core, RampRunnerCore):
            yield module, core


def _most_tokens() -> int:
    """The most tokens that SGLang gives a layer at a time."""
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size
    return int(chunk if chunk and chunk > 0 else schedule.max_prefill_tokens)
