"""Whether a kernel keeps its interface."""

from .pytest_cases import KernelConformance

__all__ = ["KernelConformance"]
