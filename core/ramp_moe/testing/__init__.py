"""Whether a kernel keeps its interface.

`KernelConformance` needs pytest, and is imported when it is first used: the command line checks kernels without it.
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
