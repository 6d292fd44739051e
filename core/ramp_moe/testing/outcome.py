"""What a check of a kernel may find."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import KernelError

if TYPE_CHECKING:
    pass


MAX_DEFAULT_TOKENS = 8192


class Failure(KernelError):
    """A check that fails: the message names the configuration and the remedy."""


class Skip(KernelError):
    """A check that cannot be made here, and why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one check. `detail`: why it failed or was skipped, or a note."""

    check: str
    result: Literal["passed", "failed", "skipped"]
    detail: str = ""


def powers_of_two(most: int) -> Iterable[int]:
    return (1 << i for i in range(most.bit_length()))
