"""Whether a kernel keeps its interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pytest_cases import KernelConformance

__all__ = ["KernelConformance"]


def __getattr__(name: str) -> Any:
    """`KernelConformance`, imported when it is asked for: it needs pytest, and has Triton interpret without a GPU.
    The command line, which asks for neither, imports modules beside it."""
    if name != "KernelConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pytest_cases import KernelConformance

    return KernelConformance
