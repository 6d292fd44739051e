"""How long a server may measure when it loads a model. Imports nothing heavy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

VARIABLE = "RAMP_MOE_CALIBRATE_S"
SECONDS = 20.0
"""For one model on one GPU."""

Say = Callable[[str], None]
"""Tells a person one line."""


def seconds(say: Say) -> float:
    """What RAMP_MOE_CALIBRATE_S says, 0 or more; SECONDS if it is not set, or, with a line, if it is no such number."""
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return SECONDS
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        say(f"{VARIABLE}={given} is no number of seconds; {SECONDS:g} are taken, and 0 measures nothing")
        return SECONDS
    return found
