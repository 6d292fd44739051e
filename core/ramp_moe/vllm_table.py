"""Static tables in vLLM's format: JSON files that name a configuration of its Triton fused MoE for some batch sizes.

The format is that of `get_config_file_name` and `get_moe_configs` in vllm 0.33's `fused_moe.py`, and of the files which
its tuning script writes. A file is named

    E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json

(N is the shard's intermediate size; bf16 and fp16 have neither dtype nor block_shape, and share a file) and holds
`{"1": {"BLOCK_SIZE_M": 16, ...}, "64": {...}}`, with `triton_version` beside the batch sizes at most. vLLM need not be
installed to read one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .cost_model import Candidate
from .errors import ProfileError
from .evaluation import IndexArray, Labels
from .files import read_file
from .hardware import Hardware
from .kernel import KernelConfig, ParamValue
from .shapes import SCALE_BLOCK, MoEShape

POLICY = "vllm-static"
"""The name of dispatch by such a table among the baselines."""

JUDGED_ON = ("vllm_triton", "triton")
"""Kernels on whose recorded times a table can be judged, the first that was recorded: vLLM's own, or one with the same
parameters."""

TUNED = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
POWERS_OF_TWO = frozenset({"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"})
MAX_TABLE_BLOCK = 1024
TRITON_DEFAULTS = {"num_warps": 4, "num_stages": 3}
"""What Triton takes where an entry leaves these out."""
IGNORED = {"SPLIT_K": None, "num_ctas": 1}
"""Keys that say nothing: vLLM sets SPLIT_K to 1 whatever a file says, and one CTA a cluster is what Triton does."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One entry: the parameters of both GEMM launches. `extra` are those of other compilers (AMD's waves_per_eu)."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int = TRITON_DEFAULTS["num_warps"]
    stages: int = TRITON_DEFAULTS["num_stages"]
    extra: tuple[tuple[str, ParamValue], ...] = ()

    @property
    def name(self) -> str:
        extra = "".join(f"-{k}={v}" for k, v in self.extra)
        return (
            f"bm{self.block_m}-bn{self.block_n}-bk{self.block_k}-gm{self.group_m}-w{self.warps}-st{self.stages}{extra}"
        )

    @property
    def params(self) -> tuple[tuple[str, ParamValue], ...]:
        """As vLLM spells them."""
        values = (self.block_m, self.block_n, self.block_k, self.group_m, self.warps, self.stages)
        return (*zip((*TUNED, *TRITON_DEFAULTS), values, strict=True), *self.extra)

    @classmethod
    def of(cls, entry: Mapping[str, ParamValue], shape: MoEShape) -> Launch:
        """Under block scales a deeper step runs as one of the scale block, so the two are the same launch. Raises
        KeyError for a key that is missing, ValueError for a value that cannot be."""
        values = TRITON_DEFAULTS | dict(entry)
        found = []
        for key in (*TUNED, *TRITON_DEFAULTS):
            value = values.pop(key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key} must be a positive integer, not {value!r}")
            if key in POWERS_OF_TWO and (value & (value - 1) or value > MAX_TABLE_BLOCK):
                raise ValueError(f"{key} must be a power of two up to {MAX_TABLE_BLOCK}, as Triton's are, not {value}")
            found.append(value)
        extra = sorted((k, v) for k, v in values.items() if k not in IGNORED or IGNORED[k] not in (None, v))
        block_m, block_n, block_k, group_m, warps, stages = found
        block_k = min(block_k, SCALE_BLOCK) if shape.dtype == "fp8" else block_k
        return cls(block_m, block_n, block_k, group_m, warps, stages, tuple(extra))


def device_names(hardware: Hardware) -> list[str]:
    """The hardware's names as vLLM's files spell them, which are the driver's names with underscores: every H200
    goes by NVIDIA_H200 there."""
    names = ("NVIDIA_H200" if "H200" in n.split() else _with_vendor(n, hardware) for n in hardware.device_names)
    return list(dict.fromkeys(re.sub(r"[\s/]+", "_", n) for n in names))


def _with_vendor(name: str, hardware: Hardware) -> str:
    vendor = "AMD" if hardware.arch.startswith("gfx") else "NVIDIA"
    return name if name.startswith(vendor) else f"{vendor} {name}"


def file_names(shape: MoEShape, hardware: Hardware) -> list[str]:
    """The name of the file that vLLM looks for, one for each name that the device may go by."""
    dtype = f",dtype=fp8_w8a8,block_shape=[{SCALE_BLOCK},{SCALE_BLOCK}]" if shape.dtype == "fp8" else ""
    return [
        f"E={shape.num_experts},N={shape.intermediate_size},device_name={device}{dtype}.json"
        for device in device_names(hardware)
    ]


@dataclass(frozen=True)
class VllmTable:
    """One file: entries by batch size, in the file's order."""

    path: Path
    entries: Mapping[int, Launch]

    def lookup(self, tokens: int) -> Launch:
        """The entry of the nearest batch size; of two equally near the one that stands first in the file (the smaller
        in every file that is sorted), as `try_get_optimal_moe_config` in vLLM's `fused_moe.py` has it."""
        return self.entries[min(self.entries, key=lambda size: abs(size - tokens))]


def read_table(path: Path, shape: MoEShape) -> VllmTable:
    """The file's entries, whatever it is called; read anew only where it has changed, since a static choice is made for
    every batch. Raises ProfileError, in one line, for what vLLM could not use."""
    try:
        return _read(path, path.stat().st_mtime_ns, shape)
    except OSError as e:
        raise ProfileError(f"cannot read {path}: {e.strerror or e}") from None


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int, shape: MoEShape) -> VllmTable:
    try:
        raw = msgspec.json.decode(read_file(path), type=dict[str, msgspec.Raw])
        raw.pop("triton_version", None)
        entries: dict[int, Launch] = {}
        for size, entry in raw.items():
            if not re.fullmatch(r"[0-9]{1,9}", size):
                raise ProfileError(f"{path}: {size[:20]!r} is not a batch size")
            try:
                entries[int(size)] = Launch.of(msgspec.json.decode(entry, type=dict[str, ParamValue]), shape)
            except KeyError as e:
                raise ProfileError(f"{path}: the entry of batch size {size} has no {e.args[0]}") from None
            except msgspec.DecodeError as e:
                raise ProfileError(f"{path}: the entry of batch size {size} is no object of parameters: {e}") from None
            except ValueError as e:
                raise ProfileError(f"{path}: the entry of batch size {size}: {e}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProfileError(f"{path} is not a table in vLLM's format, a JSON object by batch size: {e}") from None
    if not entries:
        raise ProfileError(f"{path} has no entry: vLLM's format is a JSON object by batch size")
    return VllmTable(path, entries)


def find_table(folders: Sequence[Path], shape: MoEShape, hardware: Hardware) -> VllmTable | None:
    """The table that vLLM would take out of these folders, the first folder first; None where none has one."""
    for folder in folders:
        for name in file_names(shape, hardware):
            if (folder / name).exists():
                return read_table(folder / name, shape)
    return None


def open_table(place: Path, shape: MoEShape, hardware: Hardware) -> VllmTable:
    """The table for this shape and device: `place` itself, or the file of its name in the folder `place`. Raises
    ProfileError where there is none, or the file is for another shape or device."""
    wanted = " or ".join(file_names(shape, hardware))
    if place.is_dir():
        if (found := find_table([place], shape, hardware)) is None:
            raise ProfileError(f"{place} holds no table for {shape.label} on {hardware.name}, which is {wanted}")
        return found
    if place.name not in file_names(shape, hardware) and place.exists():
        raise ProfileError(f"{place} is not for {shape.label} on {hardware.name} by its name, which would be {wanted}")
    return read_table(place, shape)


# --- judged on what was recorded --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A table's entries as recorded candidates: `picks` has the candidate's index by batch size."""

    table: VllmTable
    kernel: str
    picks: Mapping[int, int]
    exact: int
    """How many entries were recorded as they are."""

    def choices(self, labels: Labels) -> IndexArray:
        by_launch = {launch: self.picks[size] for size, launch in self.table.entries.items()}
        return np.array([by_launch[self.table.lookup(tokens)] for tokens, _ in labels], np.intp)

    def note(self) -> str:
        whose = "" if self.kernel == JUDGED_ON[0] else ", which are not those of vLLM's kernel"
        mapped = "" if self.exact == len(self.picks) else ", the others mapped onto the nearest recorded one"
        return (
            f"{POLICY}: {self.table.path.name}, judged on {self.kernel}'s recorded times{whose}; "
            f"{self.exact} of {len(self.picks)} entries were recorded as they are{mapped}"
        )

    def as_dict(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        entries = {
            str(size): {"entry": dict(launch.params), "config": candidates[self.picks[size]].config.name}
            for size, launch in self.table.entries.items()
        }
        return {"file": str(self.table.path), "kernel": self.kernel, "exact": self.exact, "entries": entries}


def judge(table: VllmTable, candidates: Sequence[Candidate]) -> Judged:
    """Find each entry among the recorded configurations of the first of JUDGED_ON that has some.

    The nearest has the token block nearest to the entry's; of those, the smallest sum of distances in the other
    parameters over its GEMMs (weight rows and depth of a tile, GROUP_M, warps, stages; split-K, which vLLM has not),
    all distances in log2; of those, the kernel's first. Raises ProfileError where no such kernel was recorded.
    """
    kernel = next((k for k in JUDGED_ON if any(c.kernel == k for c in candidates)), None)
    if kernel is None:
        recorded = ", ".join(dict.fromkeys(c.kernel for c in candidates))
        raise ProfileError(f"a table of vLLM's is judged on recorded times of {' or '.join(JUDGED_ON)}, not {recorded}")
    own = [(i, c.config) for i, c in enumerate(candidates) if c.kernel == kernel]
    picks, exact = {}, 0
    for size, launch in table.entries.items():
        *distance, _, pick = min((*_distance(c, launch), c.name != launch.name, i) for i, c in own)
        picks[size] = pick
        exact += not any(distance)
    return Judged(table, kernel, picks, exact)


def _distance(config: KernelConfig, launch: Launch) -> tuple[float, float]:
    """(of the token blocks, of everything else), in log2 and summed over the GEMMs."""
    block = other = 0.0
    per_gemm = zip(
        *(_values(config, ends) for ends in (("group_m", "group_size_m"), ("warps",), ("stages",))), strict=True
    )
    for grid, values in zip(config.gemms, per_gemm, strict=True):
        block += _log2(grid.block_tokens, launch.block_m)
        own = (grid.block_weights, grid.block_k, grid.split_k, *values)
        wanted = (launch.block_n, launch.block_k, 1, launch.group_m, launch.warps, launch.stages)
        other += sum(_log2(a, b) for a, b in zip(own, wanted, strict=True))
    return block, other


def _log2(a: int, b: int) -> float:
    return abs(math.log2(a / b))


def _values(config: KernelConfig, ends: tuple[str, ...]) -> list[int]:
    """A parameter's value for each GEMM, where both share one or each has its own."""
    found = [int(v) for k, v in config.params if k.lower().endswith(ends)]
    return found * (len(config.gemms) // len(found))
