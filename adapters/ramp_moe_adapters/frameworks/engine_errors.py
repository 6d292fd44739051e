"""What is said of a batch or a layer that failed, and was left to the engine."""

from __future__ import annotations

from ramp_moe.plugin import KernelError, RampMoEError


def why(error: Exception) -> str:
    """What an exception says, on one line; with its type if it is none of ours."""
    told = " ".join(str(error).split())
    return told if isinstance(error, RampMoEError) else f"{type(error).__name__}: {told}"


def both_failed(error: Exception, path: str, other: Exception) -> KernelError:
    """The error of a batch that the engine's own path cannot compute, either."""
    return KernelError(f"ramp_moe failed ({why(error)}), and {path} after it ({why(other)})")
