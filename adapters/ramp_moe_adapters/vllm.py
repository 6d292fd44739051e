"""The plugin of vLLM 0.33 that the entry point `vllm.general_plugins` names.

It does nothing unless RAMP_MOE_VLLM=1: vLLM's own option for this, `--moe-backend`, knows vLLM's backends alone. What
needs vLLM itself is in `vllm_experts.py` beside this.
"""

from __future__ import annotations

import logging
import os

from .vllm_triton import VllmTriton

SWITCH = "RAMP_MOE_VLLM"
_logger = logging.getLogger("vllm.ramp_moe")
"""Under vLLM's own, which alone it configures."""


def register() -> None:
    """Have the MoE layers that vLLM makes from now on in this process computed by dispatched layers, if switched on.
    vLLM calls this in every process, in some of them more than once. Another vLLM than 0.33, and another plugin that
    has replaced its experts, are left alone, with one line in the log."""
    if os.environ.get(SWITCH, "0") != "1":
        return
    if reason := VllmTriton().unavailable():
        _logger.warning("%s is set, but %s", SWITCH, reason)
        return
    from .vllm_experts import install

    install()
