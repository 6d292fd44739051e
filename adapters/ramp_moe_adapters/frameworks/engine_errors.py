"""Messages about a batch or a layer that failed and is left to the engine."""

from __future__ import annotations

from ramp_moe.plugin import KernelError, RampMoEError


def why(error: Exception) -> str:
    """The message of an exception on one line, with its type if it is no RampMoEError."""
    told = " ".join(str(error).split())
    return told if isinstance(error, RampMoEError) else f"{type(error).__name__}: {told}"


def both_failed(error: Exception, path: str, other: Exception) -> KernelError:
    """Make the error for a batch that ramp_moe and the engine's own path have failed to compute."""
    return KernelError(f"ramp_moe failed ({why(error)}), and {path} after it ({why(other)})")
