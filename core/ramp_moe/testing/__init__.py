"""Checks whether a kernel keeps its interface.

`KernelConformance` needs pytest, so it is imported at its first use. The command line checks kernels without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pytest_cases import KernelConformance

__all__ = ["KernelConformance"]


def __getattr__(name: str) -> Any:
    if name != "KernelConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .pytest_cases import KernelConformance

    return KernelConformance
