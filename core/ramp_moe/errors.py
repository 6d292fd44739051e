"""The errors that a caller can provoke. All derive from RampMoEError, and name the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RampMoEError(Exception):
    """Base class. The command line prints the message and exits with code 2.

    remedy: the last line of the message.
    """

    def __init__(self, *args: object, remedy: str = "") -> None:
        super().__init__(*((f"{args[0]}\n{remedy}", *args[1:]) if remedy else args))
        self.remedy = remedy


class ShapeError(RampMoEError):
    """A MoE shape or grid geometry that cannot exist: for one, a count below one, or a shard that does not divide.

    Also raised for tensors of other shapes, dtypes or devices than a layer takes.
    """


class RoutingError(RampMoEError):
    """Top-k ids, an expert histogram or a routing trace that does not fit the shape."""


class UnknownNameError(RampMoEError):
    """A model, device, kernel, form or routing kind that nobody registered. The message suggests the nearest name."""

    def __init__(self, what: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)  # whatever a caller gives
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {what} {shown(name)}; {hint}{'; ' + remedy if remedy else ''}")


class HardwareError(RampMoEError):
    """A GPU that is absent, unknown, or not as its constants say, such as a MIG slice."""


class ProfileError(RampMoEError):
    """A sweep or fit file that is missing, corrupt, foreign, from a newer version, or for another shape."""


class NoProfileError(ProfileError):
    """No profile was recorded for this shape and device. No file is at fault."""


class KernelError(RampMoEError):
    """A kernel that cannot serve the request: unsupported shape, no configuration left, a broken description."""


def describe(thing: object) -> str:
    """Convert an object that a plugin made to text on one line, even if its `__str__` raises."""
    try:
        return " ".join(str(thing).split()) or "no message"
    except Exception as e:
        return f"{type(thing).__name__} (its __str__ raises {type(e).__name__})"


def shown(thing: object) -> str:
    """Convert what a caller gave to a short text on one line, even if its `__repr__` raises."""
    try:
        return f"{' '.join(repr(thing).split()):.60}"
    except Exception as e:
        return f"{type(thing).__name__} (its __repr__ raises {type(e).__name__})"
