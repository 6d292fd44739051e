"""The command `ramp-moe`. Every command has --json; an error is one line that names the remedy, exit code 2."""

from __future__ import annotations

from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def __getattr__(name: str) -> Any:
    """`main`, imported when it is asked for: Ctrl-C in that time ends the command as later, without a traceback."""
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .group import main
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    return main
