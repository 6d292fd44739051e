"""Finds and compiles FlashInfer's module for sm_90.

FlashInfer itself compiles the module at its first use, silently and for hours. Here another process compiles it in the
same way, into FlashInfer's own cache, and reports progress. After an interruption, ninja continues where it stopped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ramp_moe.plugin import Built, KernelError, Progress, is_installed, version_of

INSTALL = "pip install 'ramp-moe[flashinfer]'"

MODULE = "fused_moe_90"
"""Name of the module; on an H20 it has a suffix."""
TARGET = "9.0a"
POLL_SECONDS = 1.0
TOLD_LINES = 12
"""Number of last lines of a failed compilation's output to report."""
COMPILE = f"""
import json, os, torch
if not torch.cuda.is_available():
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "{TARGET}")
from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module
spec = gen_cutlass_fused_moe_sm90_module()
library = spec.get_library_path()
about = {{"library": str(library), "units": len(spec.sources), "prebuilt": bool(spec.is_aot)}}
about["stamp"] = os.stat(library).st_mtime_ns if os.path.isfile(library) else None
print(json.dumps(about), flush=True)
if not spec.is_aot:
    spec.build(verbose=False, need_lock=True)
"""


def cache() -> Path:
    """FlashInfer's cache folder, which all of its versions share."""
    return Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", Path.home())) / ".cache" / "flashinfer"


def problem() -> str | None:
    """Why the module can neither be loaded nor compiled here; None if it can. Imports nothing from FlashInfer."""
    if not _writable(cache()):
        return f"flashinfer cannot write its cache {cache()}; set FLASHINFER_WORKSPACE_BASE"
    if _prebuilt():
        return None
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return f"flashinfer's module {MODULE} is not installed, and FLASHINFER_DISABLE_JIT forbids compiling it"
    if not _nvcc():
        return "flashinfer compiles its module with nvcc, and finds none; install a CUDA toolkit and set CUDA_HOME"
    if shutil.which("ninja") is None:
        return "flashinfer compiles its module with ninja, and finds none; pip install ninja"
    return None


def fp8_problem() -> str | None:
    """Why FlashInfer's fp8 block-scaled GEMMs cannot be compiled; None if they can, or need not be.

    FlashInfer compiles each tile with nvcc at its first use, into a separate cache.
    """
    if os.environ.get("TRTLLM_DG_ENABLED", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    compiler = os.environ.get("TRTLLM_DG_NVCC_COMPILER") or (f"{home}/bin/nvcc" if home else "nvcc")
    if shutil.which(compiler) is None:
        return f"flashinfer compiles its fp8 GEMMs with nvcc, and does not find {compiler}; set CUDA_HOME"
    folder = Path(os.environ.get("TRTLLM_DG_CACHE_DIR", Path.home() / ".tensorrt_llm"))
    return None if _writable(folder) else f"flashinfer cannot write its cache {folder}; set TRTLLM_DG_CACHE_DIR"


def ready() -> bool:
    """Whether the installed version's module is already compiled, as far as its files show."""
    found = cache().glob(f"{version_of('flashinfer')}/*/cached_ops/{MODULE}*/{MODULE}*.so")
    return _prebuilt() or any(found)


def build(configs: tuple[str, ...], report: Progress, jobs: int | None) -> Built:
    """Compile what FlashInfer's cache lacks, in `jobs` processes (None: ninja decides).

    configs: names of the configurations that the module holds.

    Raises KernelError if something is missing or does not compile.
    """
    if not is_installed("flashinfer"):
        raise KernelError(f"flashinfer missing; {INSTALL}")
    if reason := problem():
        raise KernelError(reason)
    start, cpu = time.perf_counter(), _cpu_seconds()
    with tempfile.TemporaryFile() as errors, _compiler(jobs, errors) as process:
        about = _first_line(process)
        library = Path(about.get("library", ""))
        while process.poll() is None:
            if not about.get("prebuilt"):
                done = len(list(library.parent.glob("*.o")))
                report(done, int(about["units"]), "")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise KernelError("flashinfer's module cannot be compiled:\n" + "\n".join(lines[-TOLD_LINES:]))
    compiled = library.stat().st_mtime_ns != about["stamp"]
    return Built(
        folder=library.parent,
        compiled=configs if compiled else (),
        reused=() if compiled else configs,
        dropped={},
        notes=(f"one module of {about['units']} units holds all configurations",),
        bytes=library.stat().st_size,
        seconds=time.perf_counter() - start,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def announced() -> None:
    """Compile the module now, and show progress on stderr. Raises KernelError as `build` does."""
    told = -1

    def tell(done: int, total: int, last: str) -> None:
        nonlocal told
        if 20 * done // total > told:
            told = 20 * done // total
            print(f"flashinfer_cutlass: {done} of {total} units compiled", file=sys.stderr, flush=True)

    print(
        "flashinfer_cutlass: compiling FlashInfer's module for its first use, which takes hours of CPU time; "
        "'ramp-moe kernels build --kernel flashinfer_cutlass' does it ahead",
        file=sys.stderr,
        flush=True,
    )
    build((), tell, None)


def prune() -> int:
    """Delete the modules that FlashInfer versions other than the installed one compiled. Returns the bytes freed."""
    freed = 0
    for folder in cache().glob(f"*/*/cached_ops/{MODULE}*"):
        if folder.is_dir() and folder.parents[2].name != version_of("flashinfer"):
            freed += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            shutil.rmtree(folder)
    return freed


@contextlib.contextmanager
def _compiler(jobs: int | None, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process that compiles. If this process is interrupted, end it together with its children."""
    given = dict(os.environ) | ({} if jobs is None else {"MAX_JOBS": str(jobs)})
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE], stdout=subprocess.PIPE, stderr=errors, env=given, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # ninja then deletes half-written files
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _first_line(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the process says about the module; {} if it ends without a word."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b'{"library"'):  # skips what an import may print
            found: dict[str, Any] = json.loads(line)
            return found
    process.wait()
    return {}


def _prebuilt() -> bool:
    """Whether FlashInfer, or its package of compiled modules, ships the compiled module."""
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return True
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "data" / "aot" / MODULE / f"{MODULE}.so").exists()


def _nvcc() -> bool:
    """Whether nvcc is in one of the places where FlashInfer looks."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        return os.access(os.path.join(home, "bin", "nvcc"), os.X_OK)
    return shutil.which("nvcc") is not None or os.access("/usr/local/cuda/bin/nvcc", os.X_OK)


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or, if it does not exist, in the nearest one above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _cpu_seconds() -> float:
    """CPU seconds of all processes that this one has started and waited for."""
    used = os.times()
    return used.children_user + used.children_system
