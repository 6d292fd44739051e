"""Reading and writing the library's JSON files.

Only regular files are read, and writes are atomic. Errors name the file and the field.

Every file is one JSON object that begins with `"format"` and `"version"`. A file of an older version is migrated in
memory when it is read, and stays unchanged on disk. A file of a newer version is refused.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from ..errors import ProfileError

T = TypeVar("T")
Migration = Callable[[dict[str, Any]], dict[str, Any]]

MAX_BYTES = 2**28
"""Largest file that is read whole; profiles, tables and histograms are far smaller."""
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises OSError for anything else: a pipe may never begin, a device never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "a NUL in its name", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """Read a regular file of at most MAX_BYTES. Raises OSError, whose `strerror` says why not."""
    with open_file(path) as file:
        known = os.fstat(file.fileno()).st_size  # 0 for files that the kernel makes up
        data = b"" if known > MAX_BYTES else file.read(MAX_BYTES + 1)
    if max(known, len(data)) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_BYTES >> 20} MiB", str(path))
    return data


def peek_format(path: Path) -> str | None:
    """Read a JSON file's `format` field. None if it has none or cannot be read; reading the whole file tells why."""
    try:
        return msgspec.json.decode(read_file(path), type=_Header).format
    except (OSError, ValueError, RecursionError, msgspec.DecodeError):
        return None


class _Header(msgspec.Struct):
    format: str | None = None


def read_json(
    path: Path,
    kind: type[T],
    file_format: str,
    version: int,
    migrations: Mapping[int, Migration],
    version_of: Callable[[dict[str, Any]], int | None] = lambda raw: None,
) -> T:
    """Decode `path` into the msgspec Struct `kind`. Raises ProfileError for whatever is wrong with it.

    `migrations[v]` turns the raw object of version v into that of v + 1. `version_of` recognises files from before the
    header existed.
    """
    try:
        data = read_file(path)
    except OSError as e:
        raise ProfileError(f"cannot read {path}: {e.strerror or e}") from None
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProfileError(f"{path} is corrupt or truncated ({e}); restore it, or delete it to measure again") from None
    if not isinstance(raw, dict):
        raise ProfileError(f"{path} is not a {file_format} file")
    found = raw.get("version") if raw.get("format") == file_format else version_of(raw)
    if type(found) is not int:
        raise ProfileError(f"{path} is not a {file_format} file (its format says {raw.get('format')!r})")
    if found > version:
        raise ProfileError(
            f"{path} has {file_format} version {found}, this ramp-moe reads up to {version}; upgrade ramp-moe"
        )
    try:
        for v in range(found, version):
            if v not in migrations:
                raise ProfileError(f"{path}: {file_format} version {v} never existed")
            raw = migrations[v](raw)
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as e:
        raise ProfileError(f"{path}: {e}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ProfileError(f"{path} cannot be migrated from version {found}: missing or wrong field {e}") from None


def write_json(path: Path, record: msgspec.Struct) -> None:
    """Write `record` to `path` atomically. Each top-level field, and each item of a top-level list, has a line of its
    own, so that a diff shows what changed."""
    write_atomically(path, _layout(msgspec.to_builtins(record)))


def check_target(path: Path) -> tuple[Path, int | None]:
    """Find the path that writing to `path` reaches through links, and the mode of the file there, None if there is
    none.

    Raises ProfileError for a name that cannot exist, and for anything but a regular file.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return target, None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise ProfileError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; name another file") from None
    if stat.S_ISLNK(mode):
        raise ProfileError(f"cannot write {path}: its links go round in a circle; name another file")
    if stat.S_ISDIR(mode):
        raise ProfileError(f"cannot write {path}: it is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise ProfileError(f"cannot write {path}: it is not a regular file; name another")
    return target, mode


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all: a temporary file beside it is flushed, then renamed over it.

    A link is followed and a file's mode is kept. Raises ProfileError for anything but a regular file, if the folder
    cannot be written, or if the disk is full. The old file then stays as it was.
    """
    path, mode = check_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".ramp-moe.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644 if mode is None else stat.S_IMODE(mode))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise ProfileError(f"cannot write {path}: {e.strerror or e}") from None


def _layout(record: dict[str, Any]) -> bytes:
    lines = []
    for key, value in record.items():
        body = msgspec.json.encode(value)
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            body = b"[\n  " + b",\n  ".join(msgspec.json.encode(v) for v in value) + b"\n ]"
        lines.append(b" " + msgspec.json.encode(key) + b": " + body)
    return b"{\n" + b",\n".join(lines) + b"\n}\n"
