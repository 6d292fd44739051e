"""SGLang 0.5's plugin: `--moe-runner-backend ramp_moe` has every MoE layer computed by the kernel that is predicted to
be fastest for its batch, in CUDA graphs by the device's choice at every replay.

SGLang loads `register` through the entry-point group `sglang.srt.plugins`, in every process. What needs SGLang itself
is in `model.py` and `runner.py` beside this.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata

from ramp_moe import Diagnostic

KNOWN = "0.5."
"""Versions that the runner was written for begin so."""
_logger = logging.getLogger("ramp_moe")


def installed() -> tuple[str, str | None]:
    """SGLang's version ("" if there is none), and why the plugin leaves it alone; None if it does not."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "", "its version cannot be told, since it is not installed"
    return version, None if version.startswith(KNOWN) else f"it knows {KNOWN}x"


def diagnostics() -> Iterator[Diagnostic]:
    """What the plugin would do in SGLang. Imports nothing of it."""
    version, refusal = installed()
    if not version:
        yield Diagnostic("engine", "sglang", "not installed")
    else:
        state = f"left alone, {refusal}" if refusal else "`--moe-runner-backend ramp_moe` dispatches its MoE layers"
        yield Diagnostic("engine", f"sglang {version}", state)


def register() -> None:
    """Make `ramp_moe` a choice of `--moe-runner-backend`. Again, it does nothing. Another SGLang than 0.5, or one
    whose runners or their registry differ, is left alone, with one line in the log."""
    version, refusal = installed()
    if refusal:
        _logger.warning("ramp_moe is no backend of %s: %s", f"sglang {version}".strip(), refusal)
        return
    try:
        from .model import install

        install()
    except Exception as e:  # a plugin that raises ends the server
        _logger.warning("ramp_moe is no backend of sglang %s: %s: %s", version, type(e).__name__, e)
