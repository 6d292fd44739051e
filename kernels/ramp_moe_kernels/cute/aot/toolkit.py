"""What building needs on this machine: the DSL, which of its toolkits it will use, and a C compiler that links."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from ramp_moe.plugin import KernelError

INSTALL = "pip install 'ramp-moe[cute]'"
_LINK_SECONDS = 60

# The DSL's static runtime, all that a compiled object calls, lacks this one function of its header CuteDSLRuntime.h; it
# is in a library of 44 MB, whose first load takes longer than a kernel may take to start.
_SHIM = """
#include <stdint.h>
typedef void (*SetError)(const char *kind, const char **parts, int32_t num_parts);
const char *cudaGetErrorName(int32_t);
const char *cudaGetErrorString(int32_t);
void CuteDSLRT_TVMFFISetRaisedCudaError(SetError set_error, int32_t code) {
  const char *parts[] = {"CUDA error ", cudaGetErrorName(code), ": ", cudaGetErrorString(code)};
  set_error("RuntimeError", parts, 4);
}
"""
# What levels 2, 3 and 4 of x86-64 add, in the operating system's names.
_X86_LEVELS = (
    {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
)
# All that a library shows, so that two have nothing in common that the loader could mix up.
_EXPORTS = "{ global: __tvm_ffi_*; local: *; };"


def dsl_folder() -> Path | None:
    """Where the package of nvidia-cutlass-dsl is. None if it is not installed, or no whole distribution. Imports
    nothing."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places and any(metadata.distributions(name="nvidia-cutlass-dsl")) else None


def toolchain() -> str | None:
    """What decides how an object is compiled, as part of a path: versions of the DSL and of its CUDA toolkit. None
    where the DSL is not installed. Raises KernelError where this machine's driver is too old for it."""
    folder = dsl_folder()
    if folder is None:
        return None
    return f"dsl{metadata.version('nvidia-cutlass-dsl')}-cu{_toolkit(folder)}"


def runtime_abis() -> list[str]:
    """What libraries may ask of the machine that loads them, as parts of a path: those compiled here, then others that
    run here, too. It is the interface of tvm-ffi, which stays the same within a minor version, and the processor's
    instructions, all of which the DSL uses. Raises KernelError where tvm-ffi is not installed."""
    try:
        major, minor = metadata.version("apache-tvm-ffi").split(".")[:2]
    except metadata.PackageNotFoundError:
        raise KernelError(f"the package apache-tvm-ffi is missing: {INSTALL}") from None
    return [f"ffi{major}.{minor}-{processor}" for processor in _processors()]


def _processors() -> list[str]:
    """This machine's kind of processor, then those whose instructions it has, too."""
    machine = platform.machine()
    if machine != "x86_64":
        return [machine]
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    except OSError:
        flags = set()
    level = 1
    for needed in _X86_LEVELS:
        if not needed <= flags:
            break
        level += 1
    return [f"{machine}-v{v}" for v in range(level, 0, -1)]


class Linker:
    """Turns object files into shared libraries that need neither the DSL nor its runtime. Its own files are in
    `folder`. Raises KernelError where there is no DSL, or no C compiler."""

    def __init__(self, folder: Path) -> None:
        dsl = dsl_folder()
        if dsl is None:
            raise KernelError(f"compiling the cute kernel needs nvidia-cutlass-dsl: {INSTALL}")
        self._runtime = dsl / f"cu{_toolkit(dsl)}" / "lib" / "libcuda_dialect_runtime_static.a"
        if not self._runtime.is_file():
            raise KernelError(f"nvidia-cutlass-dsl lacks {self._runtime}; install it again: {INSTALL}")
        self._compiler = c_compiler()
        self._shim, self._exports = folder / "shim.o", folder / "exports"
        self._exports.write_text(_EXPORTS)
        source = folder / "shim.c"
        source.write_text(_SHIM)
        try:
            self._run("-c", "-O2", "-fPIC", source, "-o", self._shim)
        except OSError as e:
            raise KernelError(f"{e}; linking compiled kernels needs one that works, CC names another") from None

    def link(self, compiled: Path, library: Path) -> None:
        """Write `library`. CUDA's functions stay open until they are called. Raises OSError where that fails: the
        machine is to blame, not the object."""
        options = (f"-Wl,--version-script={self._exports}", "-Wl,-z,lazy", "-Wl,--gc-sections", "-s")
        self._run("-shared", "-o", library, compiled, self._shim, self._runtime, *options)

    def _run(self, *args: str | Path) -> None:
        command = [*self._compiler, *map(str, args)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LINK_SECONDS)
        except subprocess.CalledProcessError as e:
            said = next((line for line in e.stderr.splitlines() if "error" in line), e.stderr.strip())
            raise OSError(f"the C compiler {shlex.join(self._compiler)} fails: {said}") from None
        except (OSError, subprocess.TimeoutExpired) as e:
            raise OSError(f"the C compiler {shlex.join(self._compiler)} cannot be run: {e}") from None


def c_compiler() -> list[str]:
    """The command of the C compiler: what CC says, or else cc, gcc or clang. Raises KernelError where there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    missing = f"{asked[0]}, which CC names, is not found" if asked else "there is none"
    raise KernelError(
        f"linking compiled kernels needs a C compiler, and {missing}; install gcc (apt-get install gcc), or build on "
        "another machine and copy its cache folder"
    )


def _toolkit(folder: Path) -> int:
    """The CUDA major version that the DSL chooses when it is imported: the newest installed that the driver supports,
    or the newest where there is no driver."""
    installed = sorted(int(p.name[2:]) for p in folder.glob("cu[0-9]*") if p.name[2:].isdigit())
    driver = _driver_major()
    usable = [major for major in installed if driver is None or major <= driver]
    if not installed:
        raise KernelError(f"nvidia-cutlass-dsl in {folder} has no CUDA toolkit; install it again: {INSTALL}")
    if not usable:
        raise KernelError(
            f"the driver supports CUDA {driver}, nvidia-cutlass-dsl is for {installed[0]} or newer; update the driver"
        )
    return usable[-1]


def _driver_major() -> int | None:
    """CUDA's major version that the driver supports; asking takes no context on a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
