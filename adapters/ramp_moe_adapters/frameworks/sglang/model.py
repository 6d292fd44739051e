"""Makes all layers of a model in SGLang, once it is loaded. Needs SGLang.

This precedes the KV cache, which takes the memory that is left. Once the model's graphs are captured, a table in the
log tells what computes which batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ..engine_errors import why
from . import recorder
from . import runner as backend
from .calibrate import loading
from .runner import RampRunnerCore

LOADED = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
CAPTURED = "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs"
_logger = logging.getLogger("ramp_moe")


def install() -> None:
    """Make `ramp_moe` a choice of `--moe-runner-backend`, and have its layers made when a model is loaded.

    A second call has no effect. Raises KernelError as `runner.install` does.
    """
    if backend.install():
        HookRegistry.register(LOADED, loaded, HookType.AFTER)
        HookRegistry.register(CAPTURED, captured, HookType.AFTER)


def loaded(_: None, runner: Any, *args: Any, **options: Any) -> None:
    """After SGLang has loaded a model, make its layers. One of each kind is measured, and what batches outside of
    graphs can need is compiled. What fails is said, and left to the first batch."""
    try:
        recorder.take()
        make_layers(runner.model, getattr(runner.model_config.hf_text_config, "num_experts_per_tok", None), runner)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # frees weights in SGLang's order: the KV cache is sized by what is free
    except Exception as e:  # a server must not end by it
        _logger.warning("ramp_moe: layers are made when they first run: %s", why(e))


def captured(_: None, runner: Any, *args: Any, **options: Any) -> None:
    """Log what computes each size, after SGLang has captured its graphs."""
    recorder.start()
    try:
        report(runner.model)
    except Exception as e:
        _logger.warning("ramp_moe: what was chosen cannot be said: %s", why(e))


def make_layers(model: torch.nn.Module, top_k: int | None, runner: Any) -> None:
    """Make the layer of each of the model's modules that ramp_moe computes, one after another.

    top_k: the model's, for modules that do not tell theirs. runner: SGLang's, which has loaded it. A layer that cannot
    be made is left to SGLang, and each reason is logged once.
    """
    now = loading(runner, backend._builder)
    for module, core in _cores(model):
        ids = core.config.top_k or top_k
        if ids is not None and not core.config.num_fused_shared_experts:
            core.make(module.quant_method.get_triton_quant_info(module), ids, now)


def report(model: torch.nn.Module) -> None:
    """Log what computes each kind of layer, in a table if times are known, what was dropped, and how many layers are
    SGLang's own."""
    cores, dropped = [core for _, core in _cores(model)], dict[str, str]()
    for layer in {(c.layer.shape, *c.layer.kernels, *c.layer.layouts): c.layer for c in cores if c.made}.values():
        kernels, layouts = ", ".join(layer.kernels), " and ".join(layer.layouts)
        _logger.info("ramp_moe: %s by %s; weights in %s", layer.shape.slug, kernels, layouts)
    for core in cores:
        if core.made:
            core.report()
            dropped = core.layer.dropped | dropped
    for name, reason in dropped.items():
        _logger.info("ramp_moe: dropped %s: %s", name, reason)
    if left := sum(not core.made for core in cores):
        _logger.info("ramp_moe: %d of %d layers are SGLang's own", left, len(cores))


def _cores(model: torch.nn.Module) -> Iterator[tuple[Any, RampRunnerCore]]:
    """The modules whose runner is ramp_moe's, each with its runner."""
    for module in model.modules():
        core = getattr(getattr(getattr(module, "quant_method", None), "runner", None), "runner_core", None)
        if isinstance(core, RampRunnerCore):
            yield module, core
