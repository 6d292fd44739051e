"""The plugin for vLLM 0.33 that the entry point `vllm.general_plugins` names.

It does nothing unless RAMP_MOE_VLLM is 1, true, yes or on. (vLLM's own option for experts, `--moe-backend`, only takes
vLLM's own backends.) `layer.py` and the files that it imports need vLLM. This file does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ramp_moe import Diagnostic
from ramp_moe.runtime.calibration_seconds import VARIABLE, seconds

from ...kernels.vllm_triton.kernel import VllmTriton
from ..switches import NEITHER, RECORD, state_of, switched_on

SWITCH = "RAMP_MOE_VLLM"
_logger = logging.getLogger("vllm.ramp_moe")
"""A child of vLLM's logger, since vLLM configures no other."""


def diagnostics() -> Iterator[Diagnostic]:
    """What the variables are set to, and what the plugin would do in vLLM. Does not import vLLM."""
    on = state_of(SWITCH)
    yield Diagnostic("variable", SWITCH, NEITHER if on is None else "on" if on else "off")
    said: list[str] = []
    limit = seconds(said.append)
    meaning = f"seconds to measure a model's layers when they are loaded: {limit:g}"
    yield Diagnostic("variable", VARIABLE, said[0] if said else meaning if limit else "nothing is measured")
    yield Diagnostic("variable", RECORD, "samples of what is routed are written there, as a trace")
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        yield Diagnostic("engine", "vllm", "not installed")
        return
    if not on:
        state = f"left alone; set {SWITCH}=1 to have its MoE layers dispatched"
    elif reason := VllmTriton().unavailable():
        state = f"left alone, although {SWITCH} is set: {reason}"
    else:
        state = "MoE layers are dispatched"
    yield Diagnostic("engine", f"vllm {version}", state)


def record(path: str | Path) -> None:
    """Have the layers of this process's engine sample what they route, from now on. Needs vLLM.

    path: of the trace, for `ramp-moe compare --trace`. CUDA graphs that were captured before are not sampled. With
    RAMP_MOE_RECORD=path in the environment, all are.
    """
    from .recorder import recording

    recording.begin(path)


def register() -> None:
    """Replace the MoE layers that vLLM makes from now on in this process by dispatched ones, if switched on.

    vLLM calls this in every process, and more than once in some. Three kinds of vLLM are left alone, with one line in
    the log: other versions than 0.33, those with another interface, and those whose experts another plugin replaced.
    """
    if not switched_on(SWITCH, _logger):
        return
    if reason := VllmTriton().unavailable():
        _logger.warning("%s is set, but %s", SWITCH, reason)
        return
    try:
        from .layer import install

        install()
    except Exception as e:  # a plugin that raises ends the server
        _logger.warning("%s is set, but vllm's experts cannot be replaced (%s: %s)", SWITCH, type(e).__name__, e)
