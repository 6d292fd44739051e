"""The installed version of the library."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "ramp-moe"


def _installed() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = _installed()
"""Version of the installed distribution; "0+unknown" if the sources run without being installed."""
