"""The journal of a profile that is being measured. It keeps what a killed run has measured, so that none of it is lost.

It is JSON lines: a `Header`, then one event a line, appended as it happens. Its path is DEVICE/SHAPE.journal in the
folder of profiles. It is locked while a run has it open, and deleted when the profiles are written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import ProfileError
from ..measurements.sweep import Run, ShapeRecord, Split
from ..spec.hardware import Hardware
from ..spec.shapes import MoEShape
from .plan import PlannedBatch

FORMAT = "ramp-moe/journal"
VERSION = 1
SYNC_SECONDS = 1.0
"""A power cut loses at most this many seconds; a kill loses nothing that was appended."""


class Stopped(ProfileError):
    """A run that cannot go on: `what` happened, and the `remedy`, which names the journal if there is one."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


class BatchRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    num_tokens: int
    routing: str
    seed: int
    split: Split

    @classmethod
    def of(cls, batch: PlannedBatch) -> BatchRecord:
        return cls(batch.num_tokens, batch.routing, batch.seed, batch.split)

    def batch(self) -> PlannedBatch:
        return PlannedBatch(self.num_tokens, self.routing, self.seed, self.split)


class KernelRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel's part of a header. `base` is the digest of the recorded sweep that the run extends, None if a new one
    begins."""

    version: str
    candidates: list[str]
    base: str | None


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be equal for a run to go on with what an earlier one measured, and when the first one began.

    `run` is what the sweeps will say of it. The time at which it was measured may differ, and notes are events.
    """

    format: str
    version: int
    digest: str
    device: str
    shape: ShapeRecord
    run: Run
    prune: float | None
    rounds: int
    close: float
    kernels: dict[str, KernelRecord]
    batches: list[BatchRecord]

    @classmethod
    def of(
        cls,
        shape: MoEShape,
        hardware: Hardware,
        run: Run,
        prune: float | None,
        rounds: int,
        close: float,
        kernels: dict[str, KernelRecord],
        batches: list[BatchRecord],
    ) -> Header:
        record = ShapeRecord.of(shape)
        same = msgspec.structs.replace(run, measured="")
        content = [FORMAT, VERSION, hardware.name, record, same, prune, rounds, close, kernels, batches]
        digest = hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()
        return cls(FORMAT, VERSION, digest, hardware.name, record, run, prune, rounds, close, kernels, batches)


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="event", tag=str.lower):
    """Something that happened. `spent` counts the seconds of all runs so far. A candidate is named KERNEL/CONFIG, a
    batch by its index in the header, which files call its row."""

    spent: float


class Passed(Event, frozen=True):
    phase: Literal["warm", "check"]
    candidate: str


class Dropped(Event, frozen=True):
    """A candidate failed, or was pruned."""

    candidate: str
    reason: str
    pruned: bool = False


class Restored(Event, frozen=True):
    """A candidate that failed was not to blame: it is a candidate again."""

    candidate: str


class Visit(Event, frozen=True):
    batch: int = msgspec.field(name="row")
    candidate: str
    us: list[float]


class Bounded(Event, frozen=True):
    """The candidate is too far behind to be worth timing on the batch."""

    batch: int = msgspec.field(name="row")
    candidate: str


class Stages(Event, frozen=True):
    batch: int = msgspec.field(name="row")
    candidate: str
    us: dict[str, list[float]]


class BatchDone(Event, frozen=True, tag="row"):
    """Everything is measured on the batch."""

    batch: int = msgspec.field(name="row")


class Noted(Event, frozen=True):
    """A line for the profiles' notes."""

    text: str


class Judged(Event, frozen=True):
    """Pruning has taken place on this number of tune batches; what was pruned stands before it."""

    batches: int


class Complete(Event, frozen=True):
    """Everything is measured; what remains is to write the profiles."""


AnyEvent = Passed | Dropped | Restored | Visit | Bounded | Stages | BatchDone | Noted | Judged | Complete


@dataclass
class Taken:
    """What has been measured so far, according to the events."""

    spent: float = 0.0
    passed: dict[str, set[str]] = field(default_factory=lambda: {"warm": set(), "check": set()})
    dropped: dict[str, Dropped] = field(default_factory=dict)
    visits: dict[int, dict[str, list[list[float]]]] = field(default_factory=dict)
    """Microseconds of each visit's launches, by batch and candidate."""
    bounded: dict[int, set[str]] = field(default_factory=dict)
    """Candidates that are not timed on a batch, by batch."""
    stages: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Microseconds, by batch and stage key."""
    staged: dict[int, set[str]] = field(default_factory=dict)
    """Candidates whose stages were asked for, by batch."""
    stageless: set[str] = field(default_factory=set)
    """Kernels that do not time their stages one by one."""
    batches: set[int] = field(default_factory=set)
    """Those on which everything is measured."""
    notes: list[str] = field(default_factory=list)
    judged: int = 0
    complete: bool = False

    def add(self, event: AnyEvent) -> None:
        self.spent = event.spent
        match event:
            case Passed():
                self.passed[event.phase].add(event.candidate)
            case Dropped():
                self.dropped[event.candidate] = event
            case Restored():
                self.dropped.pop(event.candidate, None)
            case Visit():
                self.visits.setdefault(event.batch, {}).setdefault(event.candidate, []).append(event.us)
            case Bounded():
                self.bounded.setdefault(event.batch, set()).add(event.candidate)
            case Stages():
                self.staged.setdefault(event.batch, set()).add(event.candidate)
                if not event.us:
                    self.stageless.add(event.candidate.partition("/")[0])
                of_batch = self.stages.setdefault(event.batch, {})
                for key, us in event.us.items():
                    of_batch.setdefault(key, []).extend(us)
            case BatchDone():
                self.batches.add(event.batch)
            case Noted():
                self.notes.append(event.text)
            case Judged():
                self.judged = event.batches
            case Complete():
                self.complete = True


class Journal:
    """An open, locked journal: `taken` is what it holds, `header` its first line."""

    def __init__(self, path: Path, descriptor: int, header: Header, taken: Taken, size: int) -> None:
        self.path, self.header, self.taken = path, header, taken
        self._descriptor, self._size, self._synced = descriptor, size, time.monotonic()

    def begin(self) -> Journal:
        """Write the header."""
        self._write(msgspec.json.encode(self.header) + b"\n")
        return self

    def append(self, event: AnyEvent) -> None:
        """Keep the event. Raises Stopped if it cannot be written; the journal is then as it was before."""
        self._write(msgspec.json.encode(event) + b"\n")
        self.taken.add(event)

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += written
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        except OSError as e:
            self._cut_back()
            raise Stopped(
                f"cannot write {self.path}: {e.strerror or e}",
                "everything measured so far is kept there, and the same command goes on from it once there is room",
            ) from None

    def _cut_back(self) -> None:
        """Remove what a failed write left of its line. If even that fails, reading drops it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._size)

    def delete(self) -> None:
        """Remove the file, once all that it held is written elsewhere."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close and unlock."""
        with contextlib.suppress(OSError):  # every line was written: only a power cut could still lose some
            os.fsync(self._descriptor)
        os.close(self._descriptor)


def journal_path(folder: Path, shape: MoEShape, hardware: Hardware) -> Path:
    """Path of the journal: one for all kernels, so that two runs never measure or write one profile at once."""
    return folder / hardware.name / f"{shape.slug}.journal"


def open_journal(path: Path, make_header: Callable[[Header | None], Header], note: Callable[[str], None]) -> Journal:
    """Open the journal at `path`, to go on with it or to begin one.

    `make_header` makes the header that the run needs, given the one that is there, or None to begin. A journal of
    another header is moved aside, and `note` told. Raises ProfileError if another run has it open, if it is corrupt
    (with file and line), or if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
        try:
            found, lines, size = _read(path)
            if found is not None and make_header(found).digest == found.digest:
                os.ftruncate(descriptor, size)
                return Journal(path, descriptor, found, _replay(path, lines), size)
            header = make_header(None)
            if size:
                aside = _set_aside(path)
                note(f"{path} is of other kernels, versions, settings or another GPU; it is kept as {aside.name}")
                old, descriptor = descriptor, _locked(path)
                os.close(old)
            os.ftruncate(descriptor, 0)
            return Journal(path, descriptor, header, Taken(), 0).begin()
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as e:
        raise ProfileError(f"cannot open {path}: {e.strerror or e}") from None


def _locked(path: Path) -> int:
    """Open and lock the file. Raises OSError, or ProfileError if another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have finished, and deleted the file, between the two calls.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ProfileError(f"another `ramp-moe profile` is writing {path}; wait for it, or stop it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


class _Peek(msgspec.Struct):
    format: str = ""
    version: int = 0


def _read(path: Path) -> tuple[Header | None, list[bytes], int]:
    """Read the header (None for an empty file or another version's), the lines of events, and the bytes that whole
    lines take.

    What follows the last line end belongs to a write that a kill cut off.
    """
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    if not size:
        return None, [], 0
    first, *lines = data[: size - 1].split(b"\n")
    try:
        peek = msgspec.json.decode(first, type=_Peek)
        if peek.format != FORMAT:
            raise msgspec.DecodeError(f"it is not a {FORMAT} file")
        header = msgspec.json.decode(first, type=Header) if peek.version == VERSION else None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _corrupt(path, 1, e) from None
    return header, lines, size


def _replay(path: Path, lines: list[bytes]) -> Taken:
    taken = Taken()
    decoder = msgspec.json.Decoder(AnyEvent)
    for number, line in enumerate(lines, 2):
        try:
            taken.add(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise _corrupt(path, number, e) from None
    return taken


def _corrupt(path: Path, line: int, error: Exception) -> ProfileError:
    return ProfileError(
        f"{path}, line {line} is corrupt ({error}); delete the file from that line on to keep what was measured "
        "before, or move it away to begin again"
    )


def _set_aside(path: Path) -> Path:
    """Rename the file to the first free NAME.old-N beside it."""
    aside = next(p for i in itertools.count(1) if not (p := path.with_name(f"{path.name}.old-{i}")).exists())
    os.rename(path, aside)
    return aside
