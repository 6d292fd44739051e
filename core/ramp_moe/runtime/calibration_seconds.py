"""Reads how long a server may measure when it loads a model. Imports nothing heavy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

VARIABLE = "RAMP_MOE_CALIBRATE_S"
SECONDS = 20.0
"""Default for one model on one GPU."""

Say = Callable[[str], None]
"""Tells a person one line."""


def seconds(say: Say) -> float:
    """The number that RAMP_MOE_CALIBRATE_S holds; SECONDS if it is not set.

    If it is not a finite number of 0 or more, says so in one line, and returns SECONDS.
    """
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
