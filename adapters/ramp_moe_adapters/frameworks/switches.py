"""Environment variables of the plugins for engines."""

from __future__ import annotations

import logging
import os

from ramp_moe.spec.compiling import OFF, ON

RECORD = "RAMP_MOE_RECORD"
"""Names the file into which a server records what it routes."""
NEITHER = f"says neither on ({', '.join(ON)}) nor off ({', '.join(OFF)}): off"


def state_of(variable: str) -> bool | None:
    """Whether an environment variable is one of ON, in any case of letters; None if it is in neither ON nor OFF.

    An unset variable is off.
    """
    value = os.environ.get(variable, "").strip().lower()
    return value in ON if value in (*ON, *OFF, "") else None


def switched_on(variable: str, logger: logging.Logger) -> bool:
    """Whether the variable is on. A value that is neither on nor off is off, with one line in the log."""
    state = state_of(variable)
    if state is None:
        logger.warning("%s=%s %s", variable, os.environ[variable].strip().lower(), NEITHER)
    return bool(state)
