"""Reading GPU code, linking, and loading, on made-up objects."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_compiler import Fake, Machine
from ramp_moe import KernelError
from ramp_moe_kernels.cute.aot import cache as cache_module
from ramp_moe_kernels.cute.aot import toolkit
from ramp_moe_kernels.cute.aot.build import build
from ramp_moe_kernels.cute.aot.cache import Cache
from ramp_moe_kernels.cute.aot.cubin import Usage, usage

load_module = sys.modules["ramp_moe_kernels.cute.aot.load"]


def cubin(registers: list[int], frames: list[int], machine: int = 190) -> bytes:
    """An ELF file with what the compiler says of kernels, and an attribute of another form before it."""
    info = struct.pack("<BBH", 3, 0x37, 134)
    for attribute, values in ((0x2F, registers), (0x11, frames)):
        info += b"".join(struct.pack("<BBHII", 4, attribute, 8, i, value) for i, value in enumerate(values))
    header = b"\x7fELF\x02\x01".ljust(18, b"\0") + struct.pack("<H", machine)
    header = header.ljust(40, b"\0") + struct.pack("<Q", 64)
    header = header.ljust(58, b"\0") + struct.pack("<HH", 64, 2) + bytes(2)
    at = 64 + 2 * 64
    sections = bytes(64) + struct.pack("<IIQQQQ", 0, 0x70000000, 0, 0, at, len(info)).ljust(64, b"\0")
    return header + sections + info


@pytest.mark.parametrize(
    ("registers", "frames", "expected"),
    [([168], [0], Usage(168, 0)), ([168], [216], Usage(168, 216)), ([32, 255], [8, 0], Usage(255, 8))],
)
def test_usage(registers: list[int], frames: list[int], expected: Usage) -> None:
    host = cubin([1], [1], machine=62)
    assert usage(b"..." + host + cubin(registers, frames)) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nothing", "no GPU code"),
        (cubin([1], [1], machine=62), "no GPU code"),
        (cubin([168], []), "does not say how many registers"),
        (cubin([168], [0])[:-3], "not as expected"),
        (cubin([168], [0])[:50], "not as expected"),
    ],
)
def test_what_is_no_gpu_code(data: bytes, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        usage(data)


@pytest.fixture
def dsl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a DSL with two toolkits and empty runtimes, and no driver."""
    folder = tmp_path / "dsl"
    for toolkit_name in ("cu12", "cu13", "cute"):
        (folder / toolkit_name / "lib").mkdir(parents=True)
        (folder / toolkit_name / "lib" / "libcuda_dialect_runtime_static.a").write_bytes(b"!<arch>\n")
    monkeypatch.setattr(toolkit, "dsl_folder", lambda: folder)
    monkeypatch.setattr(toolkit, "_driver_major", lambda: None)
    versions = {"nvidia-cutlass-dsl": "4.8.1", "apache-tvm-ffi": "0.1.15.post2"}
    monkeypatch.setattr(toolkit.metadata, "version", versions.__getitem__)
    monkeypatch.delenv("CC", raising=False)
    return folder


def test_the_toolchain_is_what_the_driver_supports(dsl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolkit.toolchain() == "dsl4.8.1-cu13"
    assert all(abi.startswith("ffi0.1-") for abi in toolkit.runtime_abis())
    monkeypatch.setattr(toolkit, "_driver_major", lambda: 12)
    assert toolkit.toolchain() == "dsl4.8.1-cu12"
    monkeypatch.setattr(toolkit, "_driver_major", lambda: 11)
    with pytest.raises(KernelError, match="the driver supports CUDA 11, nvidia-cutlass-dsl is for 12 or newer"):
        toolkit.toolchain()
    for place in ("cu12", "cu13"):
        shutil.rmtree(dsl / place)
    with pytest.raises(KernelError, match="has no CUDA toolkit; install it again"):
        toolkit.toolchain()
    monkeypatch.setattr(toolkit, "dsl_folder", lambda: None)
    assert toolkit.toolchain() is None


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("", "1"),
        ("cx16 popcnt sse4_1 sse4_2 ssse3 avx2", "21"),
        (" ".join(f for level in toolkit._X86_LEVELS for f in level), "4321"),
    ],
)
def test_levels_of_a_processor(flags: str, levels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    monkeypatch.setattr(toolkit.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert toolkit._processors() == [f"x86_64-v{v}" for v in levels]
    monkeypatch.setattr(toolkit.platform, "machine", lambda: "aarch64")
    assert toolkit._processors() == ["aarch64"]


def test_without_a_linker(dsl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="needs a C compiler, and there is none; install gcc"):
        toolkit.Linker(tmp_path)
    monkeypatch.setenv("CC", "mycc -m64")
    with pytest.raises(KernelError, match="mycc, which CC names, is not found"):
        toolkit.Linker(tmp_path)


def test_a_linker_that_fails(dsl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(
        KernelError, match=r"the C compiler false fails: .*; linking compiled kernels needs one that works"
    ):
        toolkit.Linker(tmp_path)


def test_a_runtime_that_is_missing(dsl: Path, tmp_path: Path) -> None:
    (dsl / "cu13" / "lib" / "libcuda_dialect_runtime_static.a").unlink()
    with pytest.raises(KernelError, match=r"lacks .*; install it again"):
        toolkit.Linker(tmp_path)


OBJECT = """
#include <stdint.h>
typedef void (*SetError)(const char *, const char **, int32_t);
void CuteDSLRT_TVMFFISetRaisedCudaError(SetError, int32_t);
int cudaLaunch(void);
const char *cudaGetErrorName(int32_t code) { return code == 2 ? "cudaErrorMemoryAllocation" : "?"; }
const char *cudaGetErrorString(int32_t code) { return "out of memory"; }
void __tvm_ffi_fails(SetError set_error) { CuteDSLRT_TVMFFISetRaisedCudaError(set_error, 2); }
void __tvm_ffi_launches(void) { cudaLaunch(); }
void helper(void) {}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_shows_its_function_alone_and_names_cudas_errors(dsl: Path, tmp_path: Path) -> None:
    source, compiled, library = tmp_path / "a.c", tmp_path / "a.o", tmp_path / "a.so"
    source.write_text(OBJECT)
    subprocess.run(["cc", "-c", "-fPIC", source, "-o", compiled], check=True)
    toolkit.Linker(tmp_path).link(compiled, library)
    # As tvm-ffi loads it: CUDA's functions are bound when they are called.
    load = "import os, ctypes, _ctypes; h = _ctypes.dlopen({!r}, os.RTLD_LAZY); print(h)"
    subprocess.run([sys.executable, "-c", load.format(str(library))], check=True)
    source.write_text(OBJECT.replace("cudaLaunch();", ""))
    subprocess.run(["cc", "-c", "-fPIC", source, "-o", compiled], check=True)
    toolkit.Linker(tmp_path).link(compiled, library)
    loaded, told = ctypes.CDLL(str(library)), []
    set_error = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_int32)
    loaded.__getattr__("__tvm_ffi_fails")(set_error(lambda kind, parts, n: told.append((kind, b"".join(parts[:n])))))
    assert told == [(b"RuntimeError", b"CUDA error cudaErrorMemoryAllocation: out of memory")]
    with pytest.raises(AttributeError):
        _ = loaded.helper


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_an_object_that_does_not_link_is_not_to_blame(dsl: Path, tmp_path: Path) -> None:
    (tmp_path / "a.o").write_bytes(b"no object")
    with pytest.raises(OSError, match="the C compiler cc fails"):
        toolkit.Linker(tmp_path).link(tmp_path / "a.o", tmp_path / "a.so")


def current(root: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The cache of this folder for a pretended toolchain."""
    monkeypatch.setenv(cache_module.VARIABLE, str(root))
    monkeypatch.setattr(cache_module, "toolchain", lambda: "dsl1.0-cu13")
    monkeypatch.setattr(cache_module, "runtime_abis", lambda: ["ffi0.1-x86_64-v3"])
    return Cache.current()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cache with "a" in it and "b" dropped."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(folder / "machine", {"b": "spills"})
        found = current(folder / "root", monkeypatch)
        build([Fake("a"), Fake("b")], cache=found, compiler=machine.compiler, jobs=1)
    return folder / "root"


@pytest.fixture
def cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Where `load` looks, with "a" in it and "b" dropped, and no DSL."""
    shutil.copytree(built, tmp_path / "root")
    monkeypatch.setattr(load_module, "dsl_folder", lambda: None)
    found = current(tmp_path / "root", monkeypatch)
    monkeypatch.setattr(cache_module, "toolchain", lambda: None)
    load_module._function.cache_clear()
    return found


@pytest.fixture
def tvm_ffi(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this test: a library's function is (path, name)."""
    fake = SimpleNamespace(load_module=lambda path: SimpleNamespace(get_function=lambda name: lambda: (path, name)))
    monkeypatch.setitem(sys.modules, "tvm_ffi", fake)
    monkeypatch.setattr(load_module, "_load_cuda_runtime", lambda: None)


@pytest.mark.usefixtures("tvm_ffi")
def test_loading_needs_no_dsl(cache: Cache) -> None:
    assert load_module.load(Fake("a"))() == (cache.library(Fake("a")), "a")


@pytest.mark.usefixtures("tvm_ffi")
def test_what_cannot_be_loaded(cache: Cache) -> None:
    with pytest.raises(KernelError, match=r"^b .*: spills: 216 bytes"):
        load_module.load(Fake("b"))
    with pytest.raises(KernelError, match=r"^c is not compiled: .* lacks it. Run `ramp-moe kernels build`"):
        load_module.load(Fake("c"))
    cache.library(Fake("a")).write_bytes(b"x")
    with pytest.warns(UserWarning, match="is corrupt"), pytest.raises(KernelError, match=r"^a is not compiled"):
        load_module.load(Fake("a"))


@pytest.mark.usefixtures("tvm_ffi")
def test_what_is_missing_is_compiled_where_that_is_possible(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path / "machine", {"d": "raises"})
    monkeypatch.setattr(load_module, "dsl_folder", lambda: tmp_path)
    monkeypatch.setattr(load_module, "build", lambda c, cache: build(c, cache=cache, compiler=machine.compiler))
    lost = Machine(tmp_path / "lost", {"e": "dies"})
    assert list(build([Fake("e")], cache=cache, compiler=lost.compiler).dropped) == ["e"]
    assert load_module.load(Fake("e"))()[1] == "e"
    assert load_module.load(Fake("c"))()[1] == "c"
    with pytest.raises(KernelError, match=r"^d .*: TypeError: no such tile"):
        load_module.load(Fake("d"))


def test_loading_without_a_cuda_runtime(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", SimpleNamespace())
    monkeypatch.setattr(load_module, "_cuda_runtimes", lambda: ["libnone.so.1"])
    load_module._load_cuda_runtime.cache_clear()
    with pytest.raises(KernelError, match=r"no CUDA runtime .* is found: pip install nvidia-cuda-runtime"):
        load_module.load(Fake("a"))


def test_loading_without_tvm_ffi(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(KernelError, match=r"apache-tvm-ffi is missing: pip install 'ramp-moe\[cute\]'"):
        load_module.load(Fake("a"))


@pytest.mark.usefixtures("tvm_ffi")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("of", ["tvm-ffi", "kernel", "configuration"])
def test_an_object_of_another_version_is_not_loaded(cache: Cache, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    if of == "tvm-ffi":
        monkeypatch.setattr(cache_module, "runtime_abis", lambda: ["ffi0.2-x86_64-v3"])
    if of == "kernel":
        sources = cache.folder.parent
        sources.rename(sources.with_name(f"{sources.name[:-8]}deadbeef"))
    if of == "configuration":
        for path in cache.folder.glob("a.*"):
            path.write_bytes(path.read_bytes().replace(b"Fake", b"Fame"))
    with pytest.raises(KernelError, match=r"^a is not compiled") as raised:
        load_module.load(Fake("a"))
    assert "\n" not in str(raised.value)
