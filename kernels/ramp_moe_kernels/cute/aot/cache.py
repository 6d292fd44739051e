"""The cache of compiled objects: in RAMP_MOE_CACHE, or else in the user's cache folder.

    cute/v1-sm_90a-SOURCES/dsl4.8.1-cu13-ffi0.1-x86_64-v3/NAME.so     the library of a configuration
                                                         /NAME.json   its manifest, which is written last. Without it
                                                                      there is no entry.
                                                         /NAME.lock   held by the process that compiles it. The
                                                                      operating system releases it when that ends.

SOURCES is a digest of what the kernel is compiled from. So each version of it, of the DSL and of tvm-ffi has its own
folder. If the DSL is not installed, nothing can be compiled. Any folder of these sources is then used that this
machine's processor can run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import platformdirs
from ramp_moe.measurements.json_file import read_json, write_atomically, write_json
from ramp_moe.plugin import KernelError, Place, ProfileError, digest_of

from .cubin import Usage
from .toolkit import runtime_abis, toolchain

VARIABLE = "RAMP_MOE_CACHE"
COMPILED = Place(Path(__file__).parents[1] / "moe.py", "compile_config")
"""The function that compiles an object. The digest covers all code that it uses."""
ARCHITECTURE = "sm_90a"
FORMAT = "ramp-moe/object"
VERSION = 1
"""Version of the manifest's format and of how libraries are linked."""
MAX_LOST = 2
"""Compilers that die over a configuration before it is given up. One may be the machine's fault (memory, a signal)."""

ABANDONED_SECONDS = 3600
"""Age from which an unfinished file can no longer be that of a running process."""


class Configuration(Protocol):
    """What can be compiled. Its `name` is unique, and safe for files and functions. Its repr determines the object."""

    @property
    def name(self) -> str: ...


class Entry(msgspec.Struct, kw_only=True):
    """What is known about a configuration: its library, or the reason why it has none.

    lost: number of compilers that died over it, or exceeded their time.
    """

    format: str = FORMAT
    version: int = VERSION
    config: str
    sha256: str | None = None
    bytes: int = 0
    usage: Usage | None = None
    reason: str | None = None
    lost: int = 0

    @property
    def finished(self) -> bool:
        """Whether the entry is final, so that the configuration is not compiled again."""
        return self.lost == 0 or self.lost >= MAX_LOST


class Damaged(KernelError):
    """An entry of the cache that differs from what was written."""


def cache_folder() -> Path:
    """Root of the cache."""
    named = os.environ.get(VARIABLE)
    return Path(named).absolute() if named else Path(platformdirs.user_cache_dir("ramp-moe", appauthor=False))


@dataclass(frozen=True)
class Cache:
    """The objects in one folder."""

    folder: Path

    @classmethod
    def current(cls, compiled: Place = COMPILED) -> Cache:
        """The cache of the present sources on this machine. Raises KernelError without tvm-ffi."""
        of_sources, abis, chain = _of_sources(compiled), runtime_abis(), toolchain()
        try:
            for abi in abis:
                found = sorted(of_sources.glob(f"{chain or '*'}-{abi}"), key=lambda f: (f.stat().st_mtime, f.name))
                if found:
                    return cls(found[-1])
        except OSError as e:
            raise KernelError(f"cannot read the cache folder {of_sources}: {e.strerror}") from None
        return cls(of_sources / f"{chain or 'any'}-{abis[0]}")

    def library(self, config: Configuration) -> Path:
        return self.folder / f"{config.name}.so"

    def look_up(self, config: Configuration) -> Entry | None:
        """The configuration's entry, checked; None if there is none. Raises Damaged if it is not what was written."""
        manifest = self._manifest(config)
        if not os.path.lexists(manifest):
            return None
        try:
            entry = read_json(manifest, Entry, FORMAT, VERSION, {})
        except ProfileError as e:
            raise Damaged(str(e)) from None
        if entry.config != repr(config):
            raise Damaged(f"{manifest} is of {entry.config}, not of {config!r}")
        if entry.reason is None:
            self._check(self.library(config), entry)
        return entry

    def _check(self, library: Path, entry: Entry) -> None:
        try:
            data = library.read_bytes()
        except OSError as e:
            raise Damaged(f"cannot read {library}: {e.strerror}") from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise Damaged(f"{library} is corrupt: its checksum is not that of its manifest")

    def store(self, config: Configuration, entry: Entry, library: bytes | None = None) -> None:
        """Write an entry, whole or not at all. Raises KernelError if the folder cannot be written, or is full."""
        if library is not None:
            entry.sha256, entry.bytes = hashlib.sha256(library).hexdigest(), len(library)
        try:
            if library is not None:
                write_atomically(self.library(config), library)
            write_json(self._manifest(config), entry)
        except ProfileError as e:
            raise KernelError(f"{e}; make room, or name another cache folder with {VARIABLE}") from None

    @contextlib.contextmanager
    def lock(self, config: Configuration) -> Iterator[bool]:
        """Try to lock a configuration, without waiting. Yields whether this process alone may compile it meanwhile.

        Raises KernelError if the folder cannot be written.
        """
        path = self.folder / f"{config.name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise KernelError(
                f"cannot write to the cache folder {self.folder}: {e.strerror}; name another with {VARIABLE}"
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError as e:
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise KernelError(
                        f"cannot lock {path}: {e.strerror}; name another folder with {VARIABLE}"
                    ) from None
                held = False
            yield held
        finally:
            os.close(descriptor)  # releases the lock

    def _manifest(self, config: Configuration) -> Path:
        return self.folder / f"{config.name}.json"


def prune(compiled: Place = COMPILED) -> int:
    """Delete the objects of all other versions of the kernel and its compiler, and files of interrupted writes.

    Returns the bytes freed. Raises KernelError if something cannot be deleted.
    """
    current = Cache.current(compiled).folder
    others = [f for f in current.parent.parent.glob(f"v*-{ARCHITECTURE}-*") if f != current.parent]
    others += [f for f in current.parent.glob(f"*-{runtime_abis()[0]}") if f != current]
    freed = 0
    try:
        others += [f for f in current.glob(".*.tmp") if time.time() - f.stat().st_mtime > ABANDONED_SECONDS]
        for path in others:
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            freed += sum(f.stat().st_size for f in files)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as e:
        raise KernelError(f"cannot delete {e.filename}: {e.strerror}") from None
    return freed


def _of_sources(compiled: Place) -> Path:
    return cache_folder() / "cute" / f"v{VERSION}-{ARCHITECTURE}-{digest_of(compiled)}"
