"""Whether kernels may be compiled while a model runs."""

from __future__ import annotations

import os

from ..errors import KernelError

VARIABLE = "RAMP_MOE_COMPILE"
"""Environment variable: 0 compiles nothing but what `ramp-moe kernels build` is asked for."""
ON = ("1", "true", "yes", "on")
OFF = ("0", "false", "no", "off")
"""The words that the switches of servers take, too. Here an unset variable is on."""


def allowed() -> bool:
    """Whether layers and launches may compile what the cache lacks. They may unless RAMP_MOE_COMPILE is one of OFF.

    Raises KernelError if it is neither on nor off.
    """
    given = os.environ.get(VARIABLE, "").strip().lower()
    if given and given not in ON + OFF:
        raise KernelError(
            f"{VARIABLE}={given} says neither on ({', '.join(ON)}) nor off ({', '.join(OFF)}); set it to 0 to compile "
            "nothing while a model runs"
        )
    return given not in OFF
