"""Whether kernels may be compiled while a model runs."""

from __future__ import annotations

import os

from ..errors import KernelError

VARIABLE = "RAMP_MOE_COMPILE"
"""Environment variable: 0 compiles nothing but what `ramp-moe kernels build` is asked for."""


def allowed() -> bool:
    """Whether layers and launches may compile what the cache lacks, which is so unless RAMP_MOE_COMPILE is 0.

    Raises KernelError if it is neither 0 nor 1.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if given not in ("", "0", "1"):
        raise KernelError(f"{VARIABLE}={given} is neither 0 nor 1; 0 compiles nothing while a model runs")
    return given != "0"
