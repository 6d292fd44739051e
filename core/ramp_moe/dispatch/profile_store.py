"""The folders that hold profiles, and which profile is used: an explicit path, then the user's data folder, then what
ships.

In a folder of profiles a sweep is DEVICE/KERNEL/SHAPE.json and a fit DEVICE/KERNEL/SHAPE.fit.json. SHAPE is
`MoEShape.slug`: device and shape match exactly or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import platformdirs

from ..cost_model import fit_file
from ..cost_model.fit_file import FitRecord, load_fit
from ..errors import NoProfileError, ProfileError
from ..measurements.json_file import peek_format
from ..measurements.sweep import Sweep, load_sweep
from ..spec.hardware import Hardware
from ..spec.shapes import MoEShape

FIT_SUFFIX = ".fit.json"
MAX_NAMED = 4
"""Most recorded shapes that a message names."""
_logger = logging.getLogger("ramp_moe")


def user_data_dir() -> Path:
    """The folder of the user's own profiles (XDG_DATA_HOME/ramp-moe/profiles on Linux)."""
    return Path(platformdirs.user_data_dir("ramp-moe", appauthor=False)) / "profiles"


def relative_path(kernel: str, shape: MoEShape, hardware: Hardware, suffix: str = ".json") -> Path:
    return Path(hardware.name) / kernel / (shape.slug + suffix)


def _is_dir(path: Path) -> bool:
    """Call `Path.is_dir()`. Raises ProfileError if a folder on the way may not be entered."""
    try:
        return path.is_dir()
    except OSError as e:
        raise ProfileError(f"cannot read {e.filename}: {e.strerror}") from None


def _listed(folder: Path, pattern: str) -> list[Path]:
    """List the files of `folder` by a glob pattern, in order. A folder that cannot be read has none, with a note."""
    try:
        return sorted(folder.glob(pattern))
    except OSError as e:
        _logger.warning("passed over: cannot read %s: %s", e.filename or folder, e.strerror)
        return []


class ProfileStore:
    """Finds sweeps and fits. `explicit` are files or folders that the user named, `shipped` folders that plugins gave.

    A file is unusable if it is truncated, foreign, of a newer version, or for something else than its place says. In
    what the user named, that is an error. In the user's data folder, and in what ships, the file is passed over: a
    warning of the logger `ramp_moe` names it, and the next place is looked at. Raises ProfileError for an explicit path
    that does not exist or is not a profile.
    """

    def __init__(self, explicit: Sequence[Path] = (), shipped: Iterable[Path] = ()) -> None:
        self._sweeps: list[tuple[Path, Sweep]] = []
        self._fits: list[tuple[Path, FitRecord]] = []
        self._known: dict[Path, Sweep | FitRecord | None] = {}
        folders = []
        for path in map(Path, explicit):
            if _is_dir(path):
                folders.append(path)
            # A file is read at once: no later look-up may ever reach it, and its errors must not wait for one.
            elif peek_format(path) == fit_file.FORMAT:
                self._fits.append((path, load_fit(path)))
            else:
                self._sweeps.append((path, load_sweep(path)))
        self._explicit_folders = folders
        self.folders = [*folders, user_data_dir(), *shipped]

    def check(self, kernels: Iterable[str], shape: MoEShape, hardware: Hardware) -> None:
        """Raise ProfileError for something the user named that this look-up does not use.

        That is a file for another kernel, shape or device, or a folder without a profile for any of these kernels.
        Otherwise it would be passed over silently.
        """
        names = list(kernels)
        for path, k, s, d in (
            *((p, x.kernel, x.shape, x.device) for p, x in self._sweeps),
            *((p, x.kernel, x.shape.shape(), x.device) for p, x in self._fits),
        ):
            if k not in names:
                raise ProfileError(f"{path} is a profile of kernel {k}, which is not one of: {', '.join(names)}")
            if (s, d) != (shape, hardware.name):
                raise ProfileError(
                    f"{path} is for {s.label} ({s.slug}) on {d}, not for {shape.label} ({shape.slug}) on "
                    f"{hardware.name}; leave it out, or name its model and device"
                )
        for folder in self._explicit_folders:
            places = [folder / relative_path(k, shape, hardware, x) for k in names for x in (".json", FIT_SUFFIX)]
            if not [p for p in places if self._load(folder, p) is not None]:
                raise ProfileError(f"{folder} has no profile for this model and device, such as {places[0]}")

    def find(self, kernel: str, shape: MoEShape, hardware: Hardware) -> tuple[Path, Sweep] | None:
        """Find the first sweep for exactly this kernel, shape and device, with its path. None if there is none.

        Raises ProfileError if that sweep is in a folder that the user named, and unusable.
        """
        for path, sweep in self._sweeps:
            if (sweep.kernel, sweep.shape, sweep.device) == (kernel, shape, hardware.name):
                return path, sweep
        for folder in self.folders:
            place = folder / relative_path(kernel, shape, hardware)
            found = self._load(folder, place)
            if isinstance(found, Sweep):
                return place, found
        return None

    def of_other_shapes(self, kernel: str, shape: MoEShape, hardware: Hardware) -> list[Sweep]:
        """Find the sweeps of other shapes in the folders, the first of each, for this kernel, device and dtype."""
        found = dict[str, Sweep]()
        for folder in self.folders:
            for path in _listed(folder / hardware.name / kernel, f"*-{shape.dtype}.json"):
                if path.stem != shape.slug and path.stem not in found:
                    sweep = self._load(folder, path)
                    if isinstance(sweep, Sweep):
                        found[path.stem] = sweep
        return list(found.values())

    def find_fit(self, kernel: str, shape: MoEShape, hardware: Hardware) -> FitRecord | None:
        """Find the first fit for exactly this kernel, shape and device, like `find`."""
        for _, fit in self._fits:
            if (fit.kernel, fit.shape.shape(), fit.device) == (kernel, shape, hardware.name):
                return fit
        for folder in self.folders:
            found = self._load(folder, folder / relative_path(kernel, shape, hardware, FIT_SUFFIX))
            if isinstance(found, FitRecord):
                return found
        return None

    def _load(self, folder: Path, path: Path) -> Sweep | FitRecord | None:
        """Read the profile at `path`, a place of `folder`, once. None if there is none that can be used."""
        if path not in self._known:
            try:
                self._known[path] = _read(path)
            except ProfileError as e:
                if folder in self._explicit_folders:
                    raise
                _logger.warning("passed over: %s", e)
                self._known[path] = None
        return self._known[path]

    def require(self, kernel: str, shape: MoEShape, hardware: Hardware) -> tuple[Path, Sweep]:
        """Find a sweep like `find`, or raise ProfileError saying what is missing and what is there."""
        found = self.find(kernel, shape, hardware)
        if found is None:
            raise self.missing([kernel], shape, hardware)
        return found

    def missing(self, kernels: Iterable[str], shape: MoEShape, hardware: Hardware, aside: str = "") -> NoProfileError:
        """Make the error for kernels without a sweep of this shape and device, with the remedy and what is recorded.

        aside: follows the shape and device in the message.
        """
        names = list(kernels)
        known = [(d, s) for d, k, s in self.recorded() if k in names]
        shapes = sorted({s for d, s in known if d == hardware.name})
        devices = " and ".join(sorted({d for d, _ in known})) or "no device"
        more = f" and {len(shapes) - MAX_NAMED} more" if len(shapes) > MAX_NAMED else ""
        what = f"{' or '.join(names) or 'any kernel'} for {shape.label} ({shape.slug}) on {hardware.name}"
        remedy = f"measure it with `ramp-moe profile --model {shape.label} --dtype {shape.dtype}`, or "
        if hardware.vendor != "NVIDIA":  # which the profiler cannot measure yet
            remedy = ""
        remedy += (
            "name a sweep file with --profile, or another --model, --dtype or --device "
            "(`ramp-moe explain`, `compare` and `regions` need no sweep); recorded for "
            + (f"{hardware.name}: {', '.join(shapes[:MAX_NAMED])}{more}" if shapes else devices)
        )
        return NoProfileError(f"no sweep of {what}{aside}", remedy=remedy)

    def recorded(self) -> set[tuple[str, str, str]]:
        """List (device, kernel, shape slug) of every sweep in the folders, by their places. The files are not read."""
        paths = [p for folder in self.folders for p in _listed(folder, "*/*/*.json")]
        return {(p.parts[-3], p.parts[-2], p.stem) for p in paths if not p.name.endswith(FIT_SUFFIX)}


def _read(path: Path) -> Sweep | FitRecord | None:
    """Read the profile at DEVICE/KERNEL/SHAPE of a folder. None if there is no file.

    Raises ProfileError if it is unusable, or is for something else than its place says.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise ProfileError(f"cannot read {path}: {e.strerror}") from None
    if path.name.endswith(FIT_SUFFIX):
        fit = load_fit(path)
        found: Sweep | FitRecord = fit
        is_for = fit.kernel, fit.shape.shape().slug, fit.device
    else:
        found = sweep = load_sweep(path)
        is_for = sweep.kernel, sweep.shape.slug, sweep.device
    place = path.parent.name, path.name.removesuffix(FIT_SUFFIX).removesuffix(".json"), path.parent.parent.name
    if is_for != place:
        raise ProfileError(f"{path} is for {', '.join(is_for)}, its place says {', '.join(place)}; move it")
    return found
