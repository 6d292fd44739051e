"""Loads compiled configurations, without the compiler."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ramp_moe.plugin import KernelError
from ramp_moe.spec.compiling import VARIABLE, allowed

from .build import build
from .cache import Cache, Configuration, Damaged
from .toolkit import INSTALL, dsl_folder

_CUDART = "libcudart.so"
_MAJORS = (13, 12)


def load(config: Configuration) -> Callable[..., None]:
    """The configuration's function, which launches on tvm-ffi's current stream of the tensors' device.

    If the cache lacks the configuration, and the DSL is installed, it is compiled first. A damaged object is compiled
    again, with a warning. Raises KernelError if there is no object and none can be made, or if the configuration was
    dropped. Raises KernelError, too, if apache-tvm-ffi or a CUDA runtime is missing.
    """
    cache = Cache.current()
    try:
        entry = cache.look_up(config)
    except Damaged as e:
        warnings.warn(f"{e}; it is compiled again", stacklevel=2)
        entry = None
    if entry is None or not entry.finished:
        if not allowed():
            raise KernelError(
                f"{config.name} is not compiled: {cache.folder} lacks it, and {VARIABLE}=0; `ramp-moe kernels build` "
                "compiles it"
            )
        if dsl_folder() is None:
            raise KernelError(
                f"{config.name} is not compiled: {cache.folder} lacks it. Run `ramp-moe kernels build`, which needs "
                f"nvidia-cutlass-dsl ({INSTALL}); or copy the cache folder of a machine that has"
            )
        reason = build([config], cache=cache).dropped.get(config.name)
    else:
        reason = entry.reason
    if reason is not None:
        raise KernelError(f"{config.name} is dropped: {reason}")
    return _function(cache.library(config), config.name)


def compilable() -> str | None:
    """Why nothing can be loaded here: there is no folder of objects, and no DSL to make any. None if there is one."""
    try:
        cache = Cache.current()
    except KernelError as e:
        return str(e)
    if cache.folder.is_dir() or dsl_folder() is not None:
        return None
    return (
        f"nothing is compiled in {cache.folder}, and nvidia-cutlass-dsl is not installed ({INSTALL}): run `ramp-moe "
        "kernels build --kernel cute`, or copy the cache folder of a machine that has"
    )


def runtime() -> Any:
    """The module tvm_ffi, with the CUDA runtime loaded. Raises KernelError if either is missing."""
    try:
        import tvm_ffi
    except ImportError:
        raise KernelError(f"the package apache-tvm-ffi is missing: {INSTALL}") from None
    _load_cuda_runtime()
    return tvm_ffi


@functools.cache
def _function(library: Path, name: str) -> Callable[..., None]:
    ffi = runtime()
    try:
        function: Callable[..., None] = ffi.load_module(library).get_function(name)
    except Exception as e:
        raise KernelError(f"cannot load {library}: {type(e).__name__}: {e}") from None
    return function


@functools.cache
def _load_cuda_runtime() -> None:
    """Make the symbols of a CUDA runtime visible to the libraries.

    It is the one that is loaded already, such as torch's, or else an installed one. Raises KernelError if there is
    none.
    """
    modes: list[int] = [os.RTLD_GLOBAL | os.RTLD_NOLOAD | os.RTLD_LAZY, os.RTLD_GLOBAL | os.RTLD_LAZY]
    for mode in modes:
        for path in _cuda_runtimes():
            try:
                ctypes.CDLL(path, mode=mode)
                return
            except OSError:
                continue
    raise KernelError(f"no CUDA runtime ({_CUDART}) is found: pip install nvidia-cuda-runtime, or a torch for CUDA")


def _cuda_runtimes() -> list[str]:
    """Candidates for the CUDA runtime: by name, for the loader to find, then files of NVIDIA's packages."""
    spec = importlib.util.find_spec("nvidia")
    folders: list[Any] = list(spec.submodule_search_locations or ()) if spec else []
    found = [f"{_CUDART}.{major}" for major in _MAJORS]
    for folder, major in ((f, m) for f in folders for m in _MAJORS):
        places = (Path(folder, f"cu{major}", "lib"), Path(folder, "cuda_runtime", "lib"))
        found += [str(p / f"{_CUDART}.{major}") for p in places]
    return found
