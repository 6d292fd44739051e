"""Shapes of models that nobody registered, read from a config.json on this machine. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from ..errors import ShapeError
from ..spec.model_config import shape_of_config
from ..spec.shapes import MoEShape

CONFIG = "config.json"
MAX_BYTES = 2**24
"""Largest config that is read. Those of models have thousands of bytes."""

HUB = (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"))
"""Variables that say where Hugging Face's cache is, the first first, and its place below each."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_shape(name: str, dtype: str | None = None) -> MoEShape | None:
    """The shape of the model that `name` names: the path of a config.json or of its folder, or the id of a checkpoint
    in the local Hugging Face cache.

    dtype: the format of the weights; if None, the config says it.

    Returns None if `name` is no path that exists, and no id that is cached. Raises ShapeError for a path that does not
    exist, for a file that is not the config of a mixture of experts, and for one that cannot be read. Raises
    UnknownNameError for an unknown architecture.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            path = path / CONFIG
        if path.is_file():
            return _shape(path, None, dtype)
        if _ID.fullmatch(name) and not name.endswith(".json") and path.name != CONFIG:
            cached = _cached(name)
            return None if cached is None else _shape(cached, name, dtype)
    except (OSError, RuntimeError) as e:
        raise ShapeError(f"cannot look for the model {name}: {getattr(e, 'strerror', None) or e}") from None
    if path.name == CONFIG or name.endswith(".json") or name[:1] in ("/", ".", "~"):
        raise ShapeError(f"there is no {path}; give the path of a model's {CONFIG}, or of the folder that holds it")
    return None


def _cached(repository: str) -> Path | None:
    """The config of a checkpoint in the cache: that of the branch main, else the newest. None if there is none."""
    folder = _hub() / f"models--{repository.replace('/', '--')}"
    main, snapshots = folder / "refs" / "main", folder / "snapshots"
    found = sorted(snapshots.glob(f"*/{CONFIG}"), key=lambda p: p.lstat().st_mtime, reverse=True)
    if main.is_file():
        commit = main.read_text(errors="replace").strip()
        found.sort(key=lambda p: p.parent.name != commit)
    return next((p for p in found if p.is_file()), None)


def _hub() -> Path:
    for variable, below in HUB:
        if given := os.environ.get(variable):
            return Path(given).expanduser() / below
    return Path("~/.cache/huggingface/hub").expanduser()


def _shape(path: Path, name: str | None, dtype: str | None) -> MoEShape:
    if path.stat().st_size > MAX_BYTES:
        raise ShapeError(f"{path} is larger than {MAX_BYTES >> 20} MiB, so it is no model's {CONFIG}")
    try:
        config = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ShapeError(f"{path} is not JSON, as a model's {CONFIG} is: {e}") from None
    if not isinstance(config, dict):
        raise ShapeError(f"{path} holds no JSON object, as a model's {CONFIG} does")
    try:
        return shape_of_config(config, name, dtype)
    except ShapeError as e:
        raise ShapeError(f"{path}: {e}") from None
