"""`ramp-moe env`: describes an installation on one page, to paste into a bug report.

Nothing heavy is imported. If one section fails, it says so, and the others are still shown.
"""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import msgspec

from ..dispatch.profile_store import FIT_SUFFIX, user_data_dir
from ..errors import HardwareError, RampMoEError, ShapeError, describe
from ..measurements.calibration_file import PlanRow, records
from ..measurements.calibration_file import folder as calibrations
from ..measurements.plan_table import table
from ..profiler.gpu import installed_gpus
from ..registry.registry import ALLOW_LIST, Registry, get_registry
from ..spec.formats import FORMATS
from ..spec.hardware import Hardware, identify
from ..spec.kernel import Kernel, why_unsupported
from ..spec.launchable import LaunchableKernel
from ..version import DISTRIBUTION, __version__
from .listing import why_unavailable
from .options import json_option
from .output import print_json, say

PACKAGES = (
    *("numpy", "torch", "triton", "cuda-bindings", "nvidia-cutlass-dsl", "apache-tvm-ffi"),
    *("transformers", "vllm", "sglang", "alpha_moe", "sgl-deep-gemm", "deep-gemm", "flashinfer-python"),
)
"""Distributions whose versions matter, if they are installed."""
AMD_DRIVER = Path("/dev/kfd")
PREFIX = "RAMP_MOE_"
ASKED_MODEL = "olmoe-1b-7b"
"""Model for which every kernel is asked, in every dtype, whether it supports the GPU."""

Section = list[dict[str, Any]]


@click.command()
@click.option("--model", help="Add what servers on this machine do with each batch size of this model's layers.")
@json_option
def env(model: str | None, as_json: bool) -> None:
    """Describe this installation: versions, GPUs, kernels, caches, plugins and settings. Paste it into a bug report."""
    shapes = None if model is None else _slugs(model)
    found = dict(_sections())
    if shapes is not None:
        found["plans"] = _plans(shapes)
    if as_json:
        print_json(found)
        return
    for title, rows in found.items():
        say(title)
        if title == "plans":
            for line in _plan_lines(rows):
                say(f"  {line}")
            continue
        for line in _lines(rows) or ["none"]:
            say(f"  {line}")


def _sections() -> Iterator[tuple[str, Section]]:
    """Yield title and rows of each section. A section that fails has one row, which holds the error."""
    sections: dict[str, Callable[[Registry], Section]] = {
        "versions": _versions,
        "gpus": _gpus,
        "kernels": _kernels,
        "caches": _caches,
        "profiles": _profiles,
        "engines": _engines,
        "variables": _variables,
        "plugins": _plugins,  # last: the other sections may reveal problems of plugins
    }
    for title, find in sections.items():
        try:
            rows = find(get_registry())
        except Exception as e:
            reason = describe(e) if isinstance(e, RampMoEError) else f"{type(e).__name__}: {describe(e)}"
            rows = [{"error": reason}]
        yield title, rows


def _versions(_: Registry) -> Section:
    found = {
        DISTRIBUTION: f"{__version__} ({Path(__file__).parents[1]})",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return [{"name": name, "version": version} for name, version in found.items()]


def _gpus(registry: Registry) -> Section:
    try:
        gpus = _identified(registry)
    except HardwareError as e:
        return [{"error": f"none: {e}"}]
    return [
        {"name": name, "driver": driver, "hardware": known and known.name, "problem": problem}
        for name, driver, known, problem in gpus
    ]


def _identified(registry: Registry) -> list[tuple[str, str, Hardware | None, str | None]]:
    """(name, driver, registered hardware, why there is none) of each GPU. Raises HardwareError without a GPU."""
    found: list[tuple[str, str, Hardware | None, str | None]] = []
    for name, driver in _reported_gpus():
        try:
            found.append((name, driver, identify(registry.hardware.values(), name), None))
        except HardwareError as e:
            found.append((name, driver, None, str(e)))
    return found


def _reported_gpus() -> list[tuple[str, str]]:
    """(name, driver) of each GPU: from nvidia-smi, or else from torch if the machine has AMD's driver."""
    try:
        return installed_gpus()
    except HardwareError:
        if not AMD_DRIVER.exists():
            raise
    import torch

    driver = f"ROCm {torch.version.hip}"
    return [(torch.cuda.get_device_name(i), driver) for i in range(torch.cuda.device_count())]


def _kernels(registry: Registry) -> Section:
    try:
        known = list({h.name: h for _, _, h, _ in _identified(registry) if h is not None}.values())
    except HardwareError:
        known = []
    rows = []
    for name, kernel in registry.kernels.items():
        reason = _why_not(registry, kernel, known)
        rows.append({"name": name, "runs": "no" if reason else "yes" if known else "on a GPU", "reason": reason})
    return rows


def _why_not(registry: Registry, kernel: Kernel, known: Sequence[Hardware]) -> str | None:
    """What the kernel lacks here, or why it supports none of the GPUs in any dtype; None if it runs."""
    if not isinstance(kernel, LaunchableKernel):
        return "it is only described; there is nothing to launch"
    reason = why_unavailable(kernel)
    for hardware in known if reason is None else ():
        for dtype in kernel.formats:
            reason = why_unsupported(kernel, registry.shape(ASKED_MODEL, dtype), hardware)
            if reason is None:
                return None
    return reason


def _caches(registry: Registry) -> Section:
    return [{"name": d.name} | _content(Path(d.state)) for d in registry.diagnostics() if d.kind == "cache"]


def _profiles(_: Registry) -> Section:
    folder = user_data_dir()
    fits = len(list(folder.glob(f"*/*/*{FIT_SUFFIX}")))
    sweeps = len(list(folder.glob("*/*/*.json"))) - fits
    return [{"name": f"{sweeps} sweeps, {fits} fits"} | _content(folder)]


def _content(folder: Path) -> dict[str, Any]:
    """The folder, with the number of files below it and their bytes."""
    files = bytes_ = 0
    for place, _, names in os.walk(folder):  # skips what it may not read
        files += len(names)
        bytes_ += sum(os.lstat(os.path.join(place, name)).st_size for name in names)
    return {"folder": str(folder), "files": files, "bytes": bytes_}


def _slugs(model: str) -> set[str]:
    """Slugs of the model's layers in every dtype. Raises UnknownNameError, or ShapeError if a shard does not divide."""
    registry, found = get_registry(), set[str]()
    failed: ShapeError | None = None
    for dtype in FORMATS:
        try:
            found.add(registry.shape(model, dtype).slug)
        except ShapeError as e:  # a slug says its dtype itself
            failed = e
    if failed is not None and not found:
        raise failed
    return found


def _plans(shapes: Collection[str]) -> Section:
    """What was calibrated of these shapes, by the cache: servers write it when they load a model."""
    return [msgspec.to_builtins(record) for record in records() if record.key.get("shape") in shapes]


def _plan_lines(plans: Section) -> Iterator[str]:
    if not plans:
        yield f"no server has measured the model here yet: {calibrations()} has nothing of it"
    for plan in plans:
        key, state = plan["key"], "complete" if plan["complete"] else "cut short; the next start goes on"
        gpu, driver, engine = (key.get(name, "?") for name in ("gpu", "driver", "engine"))
        yield f"{key['shape']} on {gpu}, driver {driver}, in {engine} {key.get(engine.lower(), '')}: {state}"
        yield from (f"  {line}" for line in table([PlanRow(**row) for row in plan["plan"]], engine))
        if plan["left"]:
            yield f"  {plan['left']}"


def _engines(registry: Registry) -> Section:
    return [{"name": d.name, "state": d.state} for d in registry.diagnostics() if d.kind == "engine"]


def _variables(registry: Registry) -> Section:
    """Every variable with our prefix that is set, with its meaning; for an unknown one, the nearest name."""
    known = {d.name: d.state for d in registry.diagnostics() if d.kind == "variable"}
    known[ALLOW_LIST] = "only these third-party plugins are loaded"
    return [
        {"name": name, "value": value, "meaning": known.get(name) or _unknown(name, known)}
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIX)
    ]


def _unknown(name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return "unknown: nothing reads it" + (f"; did you mean {near[0]}?" if near else "")


def _plugins(registry: Registry) -> Section:
    return [
        {"name": p.name, "version": p.version, "origin": p.origin, "problems": p.problems} for p in registry.plugins
    ]


def _lines(rows: Section) -> list[str]:
    """The rows as lines. Columns are padded, except the last."""
    cells = [[_shown(key, value) for key, value in row.items() if value is not None] for row in rows]
    columns = max(map(len, cells), default=0)
    widths = [max((len(row[i]) for row in cells if len(row) > i + 1), default=0) for i in range(columns)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in cells]


def _shown(key: str, value: Any) -> str:
    match key, value:
        case "files", int():
            return f"{value} files"
        case "bytes", int():
            return f"{value / 1e6:.1f} MB"
        case _, list():
            return "; ".join(map(str, value)) or "ok"
    return " ".join(str(value).split())
