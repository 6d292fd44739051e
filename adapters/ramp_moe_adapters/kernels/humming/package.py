"""What this adapter uses of the package `humming`, which it imports only when it runs.

Humming compiles each tile by NVRTC at its first use, in about two seconds, and keeps the result in its own cache.
"""

from __future__ import annotations

import functools
import glob
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ramp_moe.plugin import KernelError, MoEShape, is_installed, version_of

from .config import WarpTile
from .formats import KINDS, PAD_K, PAD_N, Which, sizes

INSTALL = "pip install 'ramp-moe[humming]'"
TESTED = ("0.1.19", "0.1.20")
"""Versions whose tiles, layouts and predicates this adapter follows."""
NEEDED = ("torch", "triton", "humming", "jinja2", "cuda.bindings", "filelock", "tqdm", "safetensors")
HEADERS = ("nvrtc.h", "cuda_runtime.h")

_lock = threading.Lock()
_now = threading.local()
"""The label of what this thread compiles."""


def cache() -> Path:
    """Humming's cache of compiled kernels, which all of its versions share."""
    return Path(os.environ.get("HUMMING_CACHE_DIR") or Path.home() / ".humming" / "cache")


def problem() -> str | None:
    """Why the package can neither be loaded nor compile; None if it can. Imports nothing of it."""
    if missing := [name for name in NEEDED if not _has(name)]:
        return f"{' and '.join(missing)} missing; {INSTALL}"
    version = version_of("humming")
    if version not in TESTED:
        return f"humming-kernels {version} is not tested ({' or '.join(TESTED)} is); {INSTALL}"
    if not any(_has_nvrtc(root) for root in _toolkits()):
        return "humming compiles its kernels with NVRTC, and finds no libnvrtc with its headers; " + (
            "pip install 'humming-kernels[cu13]', or install a CUDA toolkit and set CUDA_HOME"
        )
    folder = cache()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return f"humming cannot write its cache {cache()}; set HUMMING_CACHE_DIR"
    return None


def _has(name: str) -> bool:
    try:
        return is_installed(name)
    except ModuleNotFoundError:  # the package around it
        return False


def _toolkits() -> Iterator[Path]:
    """The places in which Humming looks for a CUDA toolkit."""
    yield from map(Path, ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"))])
    yield from (Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    for entry in sys.path:
        yield from (Path(entry, "nvidia"), *sorted(Path(entry, "nvidia").glob("cu[0-9]*")))


def _has_nvrtc(root: Path) -> bool:
    places = (root, *(root.glob("cuda_*") if root.name == "nvidia" else ()))
    library = any(next((p / lib).glob("libnvrtc.so*"), None) for p in places for lib in ("lib64", "lib"))
    return library and all(any((p / "include" / name).exists() for p in places) for name in HEADERS)


class Package(NamedTuple):
    """The parts of the package that are used.

    Gemm: Humming's kernel of a tile, compiled when it is made. Ahead: the same, but not loaded, for which no GPU is
    needed.
    """

    device: Any
    schema: Any
    transform: Any
    tune: Any
    nvrtc: Any
    operators: Any
    Gemm: Any
    Ahead: Any


@functools.cache
def package() -> Package:
    """Import the package. Raises KernelError if it cannot be imported, or is another than the one described here."""
    try:
        kernel: Any = importlib.import_module("humming.kernel.humming")
        compiler: Any = importlib.import_module("humming.jit.compiler")
        device, schema, transform, tune, nvrtc = (
            importlib.import_module(f"humming.{name}")
            for name in ("device", "schema", "transform", "tune", "utils.nvrtc")
        )

        class Compiler(compiler.NVRTCCompiler):  # type: ignore[misc]
            """Says on stderr what it compiles."""

            @classmethod
            def _compile(cls, *given: Any) -> Any:
                _now.compiled = True
                if label := getattr(_now, "label", ""):
                    print(f"humming: compiling {label}", file=sys.stderr, flush=True)
                return super()._compile(*given)

        class Gemm(kernel.HummingKernel):  # type: ignore[misc]
            @staticmethod
            def _get_compiler() -> Any:
                return Compiler

        class Ahead(Gemm):
            def register_kernel(self) -> None:
                pass

        import torch

        return Package(device, schema, transform, tune, nvrtc, torch.ops.humming, Gemm, Ahead)
    except Exception as e:  # it looks for a compiler, loads libraries and makes folders
        raise KernelError(f"humming cannot be loaded ({type(e).__name__}: {e}); {INSTALL}") from e


def layer_config(
    shape: MoEShape,
    which: Which,
    *,
    experts: int | None = None,
    row_exponents: bool = False,
) -> Any:
    """Humming's LayerConfig of a GEMM.

    experts: of the tensors; None for the shape's.
    row_exponents: True if each row of fused exponents has a range of its own.
    """
    hum, kind, of = package(), KINDS[shape.dtype], sizes(shape, which)
    weights = hum.schema.HummingWeightSchema(
        b_dtype=kind.element,
        bs_dtype=kind.scale_dtype,
        weight_scale_group_size=kind.group,
        weight_scale_group_size_n=kind.group if kind.scales == "block" else 0,
        weight_scale_2_type="channel" if row_exponents else None,
    )
    inputs = {"a_dtype": "float8e4m3", "input_scale_group_size": kind.a_group, "input_scale_dtype": "float32"}
    return hum.transform.prepare_layer_config(
        of.n,
        of.k,
        weights,
        hum.schema.HummingInputSchema(**(inputs if kind.a_bits == 8 else {})),
        num_experts=experts or shape.num_experts,
        pad_n_to_multiple=PAD_N,
        pad_k_to_multiple=PAD_K,
        torch_dtype=_bf16(),
        device=hum.device.current_device.index,
    )


def _bf16() -> Any:
    import torch

    return torch.bfloat16


class Compiled(NamedTuple):
    """A compiled kernel: Humming's object, its file, and whether this call compiled it."""

    kernel: Any
    file: Path
    new: bool


def compiled(layer: str, tile: WarpTile, label: str = "", ahead: bool = False) -> Compiled:
    """Compile a tile for a layer, `LayerConfig.to_str()`, if Humming's cache lacks it. Says so if it has a label.

    ahead: True to compile only, which needs no GPU. Raises KernelError, with the compiler's message.
    """
    hum = package()
    _now.label, _now.compiled = label, False
    try:
        made = (hum.Ahead if ahead else hum.Gemm)(**_arguments(layer, tile))
    except Exception as e:
        reason = " ".join(str(e).split())[-500:]
        raise KernelError(f"humming cannot compile {tile.name} ({type(e).__name__}: {reason})") from e
    return Compiled(made, Path(made.kernel_filename), _now.compiled)


def _arguments(layer: str, tile: WarpTile) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(layer)
    return given | {"gemm_type": "indexed"} | tile.tuning()


@functools.cache
def loaded(layer: str, tile: WarpTile, device: int) -> Any:
    """What Humming's launch takes for a tile of a layer: int64 `[4]` on the CPU. `device` must be the current one.

    The tile is compiled if need be, and loaded once for all layers that are alike. The four are the rows that it is
    for, from and to, the kernel and the device's SMs. Without the last, each launch would ask the driver.
    """
    import torch

    given = json.loads(layer)
    sizes = f"{given['num_experts']} x {given['shape_n']} x {given['shape_k']} {given['b_dtype']}"
    with _lock:
        kernel = compiled(layer, tile, f"{tile.name} for {sizes}").kernel
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.tensor([0, 1 << 30, kernel.kernel_id, sms], dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=4096)
def own_choice(shape: MoEShape, which: Which, rows: int) -> WarpTile | None:
    """Humming's own choice for a GEMM of `rows` routed ids on the current device. Takes milliseconds.

    None if it sets something that a WarpTile does not have.
    """
    tune = package().tune
    return WarpTile.of(tune.get_heuristics_config(layer_config(shape, which), shape_m=rows, gemm_type="indexed"))


@functools.lru_cache(maxsize=64)
def own_table(shape: MoEShape, which: Which) -> tuple[tuple[int, WarpTile], ...]:
    """All of Humming's own choices for a GEMM: the most rows, in ascending order, and the tile for them.

    Takes one to four seconds. Empty if a choice sets something that a WarpTile does not have.
    """
    rows = package().tune.get_heuristics_config(layer_config(shape, which), gemm_type="indexed")
    found = [(int(most), WarpTile.of(tuning)) for _, most, tuning in rows]
    return tuple((most, tile) for most, tile in found if tile is not None) if all(t for _, t in found) else ()


def stand_in(values: Mapping[str, Any]) -> None:
    """Let the package describe and compile for a GPU that this machine lacks."""
    device = package().device
    value = SimpleNamespace(index=0, is_ppu=False, **values)
    made = object.__new__(device.DeviceInfo)
    made._index, made._value = 0, value
    device.DeviceInfo._instances[0] = made
    device.current_device._value = value
