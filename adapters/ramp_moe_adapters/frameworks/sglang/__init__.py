"""SGLang 0.5's plugin: `--moe-runner-backend ramp_moe` has every MoE layer computed by the kernel that is predicted to
be fastest for its batch, in CUDA graphs by the device's choice at every replay.

SGLang loads `register` through the entry-point group `sglang.srt.plugins`, in every process. What needs SGLang itself
is in `sglang_runner.py` beside this.
"""

from __future__ import annotations

import logging
from importlib import metadata

KNOWN = "0.5."
"""Versions that the runner was written for begin so."""
_logger = logging.getLogger("ramp_moe")


def register() -> None:
    """Make `ramp_moe` a choice of `--moe-runner-backend`. Again, it does nothing. Another SGLang than 0.5, or one
    whose runners or their registry differ, is left alone, with one line in the log."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        _logger.warning("ramp_moe is no backend of sglang: its version cannot be told, since it is not installed")
        return
    if not version.startswith(KNOWN):
        _logger.warning("ramp_moe is no backend of sglang %s: it knows %sx", version, KNOWN)
        return
    try:
        from .runner import install

        install()
    except Exception as e:  # a plugin that raises ends the server
        _logger.warning("ramp_moe is no backend of sglang %s: %s: %s", version, type(e).__name__, e)
