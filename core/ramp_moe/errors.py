"""Every error that a caller can provoke derives from RampMoEError: a line or two that name the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RampMoEError(Exception):
    """Base class. The command line prints the message and exits with code 2.

    remedy: ends the message, on a line of its own."""

    def __init__(self, *args: object, remedy: str = "") -> None:
        super().__init__(*((f"{args[0]}\n{remedy}", *args[1:]) if remedy else args))
        self.remedy = remedy


class ShapeError(RampMoEError):
    """A MoE shape or grid geometry that cannot exist (a count below one, a shard that does not divide)."""


class RoutingError(RampMoEError):
    """Top-k ids, an expert histogram or a routing trace that does not fit the shape."""


class UnknownNameError(RampMoEError):
    """A model, device, kernel, form or routing kind that nobody registered; suggests the nearest name."""

    def __init__(self, what: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {what} {name!r}; {hint}{'; ' + remedy if remedy else ''}")


class HardwareError(RampMoEError):
    """The GPU at hand is absent, unknown, or not what its constants say (a MIG slice, for one)."""


class ProfileError(RampMoEError):
    """A sweep or fit file that is missing, corrupt, foreign, from a newer version, or for another shape."""


class NoProfileError(ProfileError):
    """Nothing was recorded for this shape and device: no file is at fault."""


class KernelError(RampMoEError):
    """A kernel that cannot serve the request: unsupported shape, no configuration left, a broken description."""


def describe(thing: object) -> str:
    """str() of something a plugin made, on one line; what a plugin made may fail at that, too."""
    try:
        return " ".join(str(thing).split()) or "no message"
    except Exception as e:
        return f"{type(thing).__name__} (its __str__ raises {type(e).__name__})"
