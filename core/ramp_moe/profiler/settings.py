"""A profiling run's settings, the progress that it reports, and its result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .worker import BenchLike
from .writing import Profile

MAX_WARMERS = 14

MakeBench = Callable[[], BenchLike]
"""Makes a bench in the worker; it must pickle."""


def default_warmers() -> int:
    """Processes that compile at the same time. This one and the driver keep their share of the CPUs."""
    return max(1, min((os.cpu_count() or 1) - 2, MAX_WARMERS))


@dataclass(frozen=True)
class Settings:
    """Settings of a profiling run.

    minutes: the whole run's time. A batch that is begun is finished, and eight are measured in any case. folder: the
    folder of profiles to write to.

    prune: a factor. Candidates further than this from their kernel's best on all of the first eight tune batches are
    pruned. After 16 batches a third of the margin counts. Infinite keeps all.

    launches: of each visit to a candidate. rounds: most visits on a batch, for candidates within `close` of their
    kernel's best. stages: whether stages are timed besides whole paths. warmers: processes that compile. first_call_s,
    call_s: seconds after which a call that may compile, or another, counts as hung.
    """

    minutes: float
    folder: Path
    prune: float = 1.15
    launches: int = 5
    rounds: int = 3
    close: float = 1.1
    stages: bool = True
    warmers: int = field(default_factory=default_warmers)
    first_call_s: float = 300.0
    call_s: float = 120.0

    @property
    def method(self) -> str:
        return (
            f"whole paths{' and stages' if self.stages else ''} from top-k ids to output, each launch after 256 MiB "
            "were written to flush L2, with events around the path or its stages, all replayed as one CUDA graph "
            "(launched from the host where the kernel cannot be captured, or the path is over 3x the best and 500 us); "
            f"median of up to {self.launches * self.rounds} launches, {self.launches} in each of {self.rounds} rounds "
            "of interleaved configurations (2 in each where a path takes over 1 ms; one round where it is over "
            f"{self.close:g}x the kernel's best; one launch where it is over 3x the best and 500 us); every "
            "configuration's output checked against float32"
        )


@dataclass(frozen=True)
class Environment:
    """The machine, as the profile describes it. gpu: the start of the GPU's UUID. software: versions by name."""

    device_name: str
    driver: str
    gpu: str
    software: dict[str, str]
    notes: list[str] = field(default_factory=list)


class Progress(Protocol):
    """Receives the progress of a run."""

    def phase(self, name: str, steps: int) -> None:
        """Begin a phase of `steps` steps."""

    def at(self, done: int, doing: str, spent: float) -> None:
        """Report the phase's finished steps, what is being done, and the seconds that the run has taken."""

    def note(self, text: str) -> None:
        """Tell the user something."""


@dataclass(frozen=True)
class Result:
    """What a run wrote: a profile for each kernel, the number of measured and of planned batches, and the seconds of
    all its sittings."""

    profiles: list[Profile]
    batches: int
    planned: int
    spent: float
    notes: list[str]
