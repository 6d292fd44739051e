"""The command `ramp-moe`. Every command has --json. An error is a line that names the remedy, with exit code 2."""

from __future__ import annotations

from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def __getattr__(name: str) -> Any:
    """Import `main` at its first use. Ctrl-C then ends the command without a traceback, as it does later."""
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .group import main
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    return main
