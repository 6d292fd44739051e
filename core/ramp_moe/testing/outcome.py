"""The possible outcomes of checking a kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import KernelError

MAX_DEFAULT_TOKENS = 8192
"""Largest batch that a kernel is asked its default configuration for."""


class Failure(KernelError):
    """A check that fails: the message names the configuration and the remedy."""


class Skip(KernelError):
    """A check that cannot be made here: the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one check. `detail` says why it failed or was skipped; if it passed, it is a note or empty."""

    check: str
    result: Literal["passed", "failed", "skipped"]
    detail: str = ""


def powers_of_two(most: int) -> Iterable[int]:
    """1, 2, 4, ... up to `most`."""
    return (1 << i for i in range(most.bit_length()))
