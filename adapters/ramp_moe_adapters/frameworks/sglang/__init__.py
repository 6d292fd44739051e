"""The plugin for SGLang 0.5. With `--moe-runner-backend ramp_moe`, every MoE layer runs its predicted-fastest kernel.

The choice is made per batch; in a CUDA graph, the device chooses at every replay. SGLang loads `register` in every
process, through the entry-point group `sglang.srt.plugins`. What needs SGLang itself is in the other files here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ramp_moe import Diagnostic

KNOWN = "0.5."
"""Beginning of the versions that the runner supports."""
_logger = logging.getLogger("ramp_moe")


def installed() -> tuple[str, str | None]:
    """SGLang's version ("" if it is not installed), and why the plugin does not serve it (None if it does)."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "", "it is not installed"
    return version, None if version.startswith(KNOWN) else f"it knows {KNOWN}x"


def diagnostics() -> Iterator[Diagnostic]:
    """Describe what the plugin would do in SGLang. Imports nothing from SGLang."""
    version, refusal = installed()
    if not version:
        yield Diagnostic("engine", "sglang", "not installed")
    else:
        state = f"left alone, {refusal}" if refusal else "`--moe-runner-backend ramp_moe` dispatches its MoE layers"
        yield Diagnostic("engine", f"sglang {version}", state)


def record(path: str | Path) -> None:
    """Have the layers of this process's engine sample what they route, from now on. Needs SGLang.

    path: of the trace, for `ramp-moe compare --trace`. CUDA graphs that were captured before are not sampled. With
    RAMP_MOE_RECORD=path in the environment, all are.
    """
    from .recorder import recording

    recording.begin(path)


def register() -> None:
    """Make `ramp_moe` a choice of `--moe-runner-backend`. A second call has no effect.

    If SGLang is not 0.5, or its runners or their registry differ, nothing is registered and one warning is logged.
    """
    version, refusal = installed()
    if refusal:
        _logger.warning("ramp_moe is no backend of %s: %s", f"sglang {version}".strip(), refusal)
        return
    try:
        from .model import install

        install()
    except Exception as e:  # a plugin that raises ends the server
        _logger.warning("ramp_moe is no backend of sglang %s: %s: %s", version, type(e).__name__, e)
