"""Compiles and loads the library's CUDA C++ when it is first needed, with NVRTC and nvJitLink instead of nvcc."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import KernelError

INSTALL = "pip install 'ramp-moe[graphs]'"


class Function(NamedTuple):
    """A function that is loaded on a device. shared_bytes: of dynamic shared memory that a launch may ask for."""

    handle: Any
    shared_bytes: int


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a CUDA call returned beside its status: None, one value, or a tuple. Raises KernelError if it failed.

    doing: what the call is for, for the message.
    """
    status, *values = result
    if int(status) != 0:
        raise KernelError(f"{doing}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        from cuda.bindings import driver, nvjitlink, nvrtc, runtime  # noqa: F401
    except ImportError as e:
        return f"{e}; {INSTALL}"
    return None if _device_runtime() else f"libcudadevrt.a is not there; {INSTALL}"


def compile_cubin(source: str, name: str, arch: str) -> bytes:
    """Compile CUDA C++ to a cubin that is linked with the device runtime. Needs no GPU.

    name: of the file, for messages. arch: for one "sm_90". Raises KernelError with the compiler's log.
    """
    if reason := unavailable():
        raise KernelError(f"{name} cannot be compiled: {reason}")
    from cuda.bindings import nvjitlink, nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []), name)
    options = [f"--gpu-architecture={arch}".encode(), b"--relocatable-device-code=true", b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(status) != 0:
        log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program), name))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelError(f"{name} does not compile for {arch}: {log.decode().strip()}")
    cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program), name))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin), name)
    try:
        link = nvjitlink.create(1, [f"-arch={arch}"])
        nvjitlink.add_data(link, nvjitlink.InputType.CUBIN, bytes(cubin), len(cubin), name)
        nvjitlink.add_file(link, nvjitlink.InputType.LIBRARY, str(_device_runtime()))
        nvjitlink.complete(link)
        linked = bytearray(nvjitlink.get_linked_cubin_size(link))
        nvjitlink.get_linked_cubin(link, linked)
        nvjitlink.destroy(link)
    except nvjitlink.nvJitLinkError as e:
        raise KernelError(f"{name} does not link for {arch}: {e}") from e
    return bytes(linked)


@functools.cache
def load(path: Path, function: str, device: int) -> Function:
    """Compile a file of CUDA C++, and load one of its functions on a device, once per process.

    Raises KernelError if either fails.
    """
    import torch
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context current
        cubin = compile_cubin(path.read_text(encoding="utf-8"), path.name, f"sm_{major}{minor}")
        module = checked(driver.cuModuleLoadData(cubin), f"loading {path.name}")
        found = checked(driver.cuModuleGetFunction(module, function.encode()), f"loading {path.name}")
        of_function, of_device = driver.CUfunction_attribute, driver.CUdevice_attribute
        most = of_device.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        shared = checked(driver.cuDeviceGetAttribute(most, driver.CUdevice(device)), path.name)
        shared -= checked(driver.cuFuncGetAttribute(of_function.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, found), path.name)
        dynamic = of_function.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(found, dynamic, shared), f"loading {path.name}")
        return Function(found, shared)


@functools.cache
def _device_runtime() -> Path | None:
    """Path of libcudadevrt.a, in a wheel of the CUDA runtime or in a toolkit; None if it is in neither."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        folders += sorted(Path(root).glob("*/lib"))
    folders += [Path("/usr/local/cuda/lib64")]
    return next((f for folder in folders if (f := folder / "libcudadevrt.a").exists()), None)
