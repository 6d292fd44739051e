"""What a profiling run is given, what it tells while it runs, and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .worker import BenchLike
from .writing import Profile

MAX_WARMERS = 14

MakeBench = Callable[[int | None], Callable[[], BenchLike]]
"""Given a number of experts (None: all), what makes a bench in the worker; it must pickle."""


def default_warmers() -> int:
    """Processes that compile at the same time: this one and the driver have their share of the CPUs."""
    return max(1, min((os.cpu_count() or 1) - 2, MAX_WARMERS))


@dataclass(frozen=True)
class Settings:
    """minutes: what the whole run may take; a batch that is begun is finished, and the first eight are always measured.
    folder: of profiles, to write to. prune: candidates that never come within this factor of the best are pruned after
    the first batches; infinite to keep all. launches: of each visit to a candidate. rounds: visits on a batch, at most,
    of those candidates within `close` of its best. warmers: processes that compile. first_call_s, call_s: seconds
    after which a call that may compile, or another, counts as hung."""

    minutes: float
    folder: Path
    prune: float = 1.2
    launches: int = 5
    rounds: int = 3
    close: float = 1.25
    warmers: int = field(default_factory=default_warmers)
    first_call_s: float = 300.0
    call_s: float = 120.0

    @property
    def method(self) -> str:
        return (
            f"whole paths and stages from top-k ids to output in a CUDA graph of {self.launches} launches, each after "
            "256 MiB were written to flush L2, between CUDA events recorded in the graph; median of "
            f"{self.launches} to {self.launches * self.rounds} launches in up to {self.rounds} rounds of interleaved "
            "configurations; every configuration's output checked against float32 once"
        )


@dataclass(frozen=True)
class Environment:
    """What the profile says of the machine. gpu: the start of the GPU's UUID; software: versions by name."""

    device_name: str
    driver: str
    gpu: str
    software: dict[str, str]
    notes: list[str] = field(default_factory=list)


class Progress(Protocol):
    """Who is told how the run goes."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def at(self, done: int, doing: str, spent: float) -> None:
        """Of the phase's steps so many are done; what is being done; seconds that the run has taken."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Result:
    """What a run wrote: a profile for each kernel; batches measured of those planned; seconds of all its sittings."""

    profiles: list[Profile]
    batches: int
    planned: int
    spent: float
    notes: list[str]
