"""What a calibration measured, kept on disk: a file for each GPU, driver, shape and set of versions.

The files are in `calibration/` below RAMP_MOE_CACHE, or else below the user's cache folder. A process that measures
holds the file's lock, which the operating system releases when the process ends. So servers that start together on one
cache measure once, and those of one GPU do not disturb each other. A file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import platformdirs

from ..errors import ProfileError
from .json_file import read_json, write_json

VARIABLE = "RAMP_MOE_CACHE"
FORMAT = "ramp-moe/calibration"
VERSION = 1
POLL_SECONDS = 0.1


class Timing(msgspec.Struct):
    """Microseconds of one candidate, by name, on one batch: `tokens` routed as `routing`. An empty name is the
    engine's own path."""

    tokens: Annotated[int, msgspec.Meta(ge=1)]
    routing: str
    candidate: str
    us: Annotated[float, msgspec.Meta(gt=0)]


class PlanRow(msgspec.Struct):
    """What is done with batches of `tokens`, as a report shows it.

    choice: a candidate, the first of a graph's bodies; empty for the engine's own path. mode and bodies: of the graph;
    "eager" and 1 outside of graphs. Times are microseconds, None if nothing is known: what the cost model predicts
    without what was measured, what was measured, and the engine's own. histogram_us: what following the histogram would
    save if choosing took no time.
    """

    tokens: int
    choice: str
    mode: str
    bodies: int
    predicted_us: float | None
    measured_us: float | None
    engine_us: float | None
    histogram_us: float | None = None


class CalibrationRecord(msgspec.Struct, kw_only=True):
    """One shape's times on one GPU.

    key: what they depend on (see `path_of`). complete: nothing more was to be measured; else the time was over.
    dropped: candidates that failed, each with its reason. plan and left: the report, and one line on what is left to
    the engine.
    """

    format: str = FORMAT
    version: int = VERSION
    key: dict[str, str]
    complete: bool
    seconds: float
    timings: list[Timing]
    dropped: dict[str, str] = {}
    plan: list[PlanRow] = []
    left: str = ""


def folder() -> Path:
    """The folder of the files."""
    named = os.environ.get(VARIABLE)
    root = Path(named).absolute() if named else Path(platformdirs.user_cache_dir("ramp-moe", appauthor=False))
    return root / "calibration"


def path_of(key: Mapping[str, str]) -> Path:
    """The file of a key: what times depend on, by name, "shape" among them."""
    digest = hashlib.sha256(msgspec.json.encode(sorted(key.items()))).hexdigest()[:16]
    return folder() / f"{key['shape']}-{digest}.json"


def load(key: Mapping[str, str]) -> CalibrationRecord | None:
    """What is recorded for a key; None if nothing is. Raises ProfileError for a file that cannot be used."""
    path = path_of(key)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise ProfileError(f"cannot read {path}: {e.strerror or e}; set {VARIABLE} to another folder") from None
    found = read_json(path, CalibrationRecord, FORMAT, VERSION, {})
    if found.key != dict(key):
        raise ProfileError(f"{path} is of another GPU, shape or version; delete it")
    return found


def save(record: CalibrationRecord) -> None:
    """Write the record. Raises ProfileError if that is impossible; the old file then stays."""
    write_json(path_of(record.key), record)


def records() -> Iterator[CalibrationRecord]:
    """All that can be read, in the order of their names."""
    try:
        names = sorted(name for name in os.listdir(folder()) if name.endswith(".json"))
    except OSError:
        return
    for name in names:
        with contextlib.suppress(ProfileError):
            yield read_json(folder() / name, CalibrationRecord, FORMAT, VERSION, {})


@contextlib.contextmanager
def locked(key: Mapping[str, str], seconds: float) -> Iterator[bool]:
    """Hold the lock of a key's file. Yields whether it is held: another process may keep it longer than `seconds`.

    Raises ProfileError if the folder cannot be written.
    """
    path = path_of(key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise ProfileError(f"cannot write {path.parent}: {e.strerror or e}; set {VARIABLE} to another folder") from None
    try:
        yield _taken(file, time.monotonic() + seconds)
    finally:
        os.close(file)  # which releases it


def _taken(file: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        except OSError as e:  # a file system without locks
            raise ProfileError(
                f"cannot lock files there: {e.strerror or e}; set {VARIABLE} to another folder"
            ) from None
