"""Environment variables that switch something on or off."""

from __future__ import annotations

import logging
import os

ON = ("1", "true", "yes", "on")
OFF = ("0", "false", "no", "off", "")


def switched_on(variable: str, logger: logging.Logger) -> bool:
    """Whether the variable is one of ON, in any case of letters. Unset it is off; so it is with one line in the log for
    a value that is neither in ON nor in OFF."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in ON + OFF:
        off = ", ".join(word for word in OFF if word)
        logger.warning("%s=%s says neither on (%s) nor off (%s): off", variable, value, ", ".join(ON), off)
    return value in ON
