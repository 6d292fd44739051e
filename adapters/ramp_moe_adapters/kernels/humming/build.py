"""Compiles tiles ahead of time, in another process that needs no GPU, into Humming's own cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from ramp_moe.plugin import Built, Hardware, KernelConfig, KernelError, MoEShape, Progress

from . import package
from .config import REGISTERS, SMEM_BYTES, WarpTile, tiles_of
from .formats import Which


def build(
    shape: MoEShape, hardware: Hardware, configs: Sequence[KernelConfig], report: Progress, jobs: int | None
) -> Built:
    """Compile what Humming's cache lacks of the configurations, with `jobs` compilers at once (None: one a core).

    A configuration is dropped if one of its tiles does not compile. Raises KernelError if something is missing.
    """
    if reason := package.problem():
        raise KernelError(reason)
    start, cpu = time.perf_counter(), _cpu_seconds()
    pairs = {c.name: tiles_of(c.params) for c in configs}
    wanted: dict[tuple[Which, WarpTile], None] = {}
    for up, down in pairs.values():
        wanted |= {("up", up): None, ("down", down): None}
    failed: dict[tuple[str, WarpTile], str] = {}
    new: set[tuple[str, WarpTile]] = set()
    files: dict[str, int] = {}
    report(0, len(wanted), "")
    for done, line in enumerate(_outcomes(shape, hardware, list(wanted), jobs), 1):
        key = (line["which"], WarpTile(**line["tile"]))
        if "error" in line:
            failed[key] = line["error"]
        else:
            files[line["file"]] = line["bytes"]
            new |= {key} if line["new"] else set()
        report(done, len(wanted), f"{key[0]} {key[1].name}")
    dropped = dict[str, str]()
    compiled, reused = list[str](), list[str]()
    for name, (up, down) in pairs.items():
        keys: list[tuple[str, WarpTile]] = [("up", up), ("down", down)]
        if reasons := [failed[key] for key in keys if key in failed]:
            dropped[name] = reasons[0]
        else:
            (compiled if new & set(keys) else reused).append(name)
    return Built(
        folder=package.cache(),
        compiled=tuple(compiled),
        reused=tuple(reused),
        dropped=dropped,
        notes=(f"{len(wanted)} tiles of two GEMMs make {len(pairs)} configurations",),
        bytes=sum(files.values()),
        seconds=time.perf_counter() - start,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def prune() -> int:
    """Delete what Humming compiled from headers that are gone or have changed. Returns the bytes freed."""
    freed = 0
    for told in package.cache().glob("*/signature.txt"):
        with contextlib.suppress(OSError, ValueError):
            stamps = json.loads("{" + told.read_text(encoding="utf-8").rsplit("$${", 1)[1].split("}")[0] + "}")
            if all(os.path.exists(path) and os.stat(path).st_mtime == stamp for path, stamp in stamps.items()):
                continue
            freed += sum(f.stat().st_size for f in told.parent.rglob("*") if f.is_file())
            shutil.rmtree(told.parent)
    return freed


def _outcomes(
    shape: MoEShape, hardware: Hardware, wanted: list[tuple[Which, WarpTile]], jobs: int | None
) -> Iterator[dict[str, Any]]:
    """Compile in another process, and yield what it says of each tile."""
    job = {
        "shape": [shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size, shape.dtype],
        "device": {"name": hardware.name, "sm_count": hardware.num_sms},
        "jobs": jobs or len(os.sched_getaffinity(0)),
        "tiles": [[which, asdict(tile)] for which, tile in wanted],
    }
    command = [sys.executable, "-m", f"{__package__}.build"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it says on stdout tells why
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        other: list[str] = []
        try:
            for line in process.stdout:
                if line.startswith('{"which"'):
                    yield json.loads(line)
                else:
                    other.append(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise KernelError("humming cannot compile ahead: " + (other[-1].strip() if other else "its process was ended"))


def _cpu_seconds() -> float:
    """CPU seconds of all processes that this one has started and waited for."""
    used = os.times()
    return used.children_user + used.children_system


def main() -> None:
    """Compile what stdin asks for, and print a line for each tile."""
    import torch

    job = json.load(sys.stdin)
    if torch.cuda.is_available():
        torch.zeros(1, dtype=torch.int32, device="cuda")  # initialises the driver
    else:
        limits = {"max_registers_per_sm": REGISTERS, "max_smem_size": SMEM_BYTES, "max_threads_per_block": 1024}
        package.stand_in(job["device"] | limits | {"sm_version": 90, "sm_major": 9, "sm_minor": 0})
    package.package().nvrtc.get_nvrtc_library_path()
    shape = MoEShape(*job["shape"])
    layers = {which: package.layer_config(shape, which).to_str() for which in ("up", "down")}

    def compile_one(which: str, fields: dict[str, Any]) -> dict[str, Any]:
        about: dict[str, Any] = {"which": which, "tile": fields}
        try:
            made = package.compiled(layers[which], WarpTile(**fields), ahead=True)
        except KernelError as e:
            return about | {"error": str(e)}
        return about | {"file": str(made.file), "bytes": made.file.stat().st_size, "new": made.new}

    with ThreadPoolExecutor(job["jobs"]) as pool:
        for future in as_completed([pool.submit(compile_one, *tile) for tile in job["tiles"]]):
            print(json.dumps(future.result()), flush=True)


if __name__ == "__main__":
    main()
