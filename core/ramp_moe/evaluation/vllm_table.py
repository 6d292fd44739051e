"""Static tables in vLLM's format: JSON files that name a configuration of its Triton fused MoE for some batch sizes.

The format is that of `get_moe_configs` in vllm 0.33's `fused_moe.py` and in SGLang 0.5.23, and of the files which their
tuning scripts write: `{"1": {"BLOCK_SIZE_M": 16, ...}, "64": {...}}`. Beside the batch sizes there may be
`triton_version` and nothing else. `table_names` has the files' names. Neither engine must be installed to read one.

SGLang keeps a folder for each version of Triton. Some of its tables tune the down projection apart: such a table is two
files, and the second's name ends in `_down`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..cost_model.model import Candidate
from ..errors import ProfileError
from ..measurements.json_file import read_file
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig, ParamValue
from ..spec.shapes import SCALE_BLOCK, MoEShape
from .regret import IndexArray, Labels
from .table_names import TableName, file_names

POLICY = "vllm-static"
"""Name of this policy among the baselines."""

JUDGED_ON = ("vllm_triton", "triton")
"""Kernels on whose recorded times a table can be judged, of which the first that was recorded is used. They are vLLM's
own, and one with the same parameters."""

TUNED = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
TRITON_DEFAULTS = {"num_warps": 4, "num_stages": 3}
"""Triton's values for parameters that an entry leaves out."""
IGNORED = {"SPLIT_K": None, "num_ctas": 1, "USE_TMA": False}
"""Keys without effect: vLLM sets SPLIT_K to 1 whatever a file says, and the others are what Triton does anyway."""

POWERS_OF_TWO = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps")
"""Parameters that must be powers of two: Triton compiles nothing else."""
MAX_WARPS, MAX_ELEMENTS = 32, 2**20
"""Most warps of a CTA, and most elements of a block of Triton's."""

MOST_NAMED = 3
"""Most unused files that an error names."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One entry: the parameters of both GEMM launches. `extra` has those of other compilers (AMD's waves_per_eu)."""

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
        """The parameters with vLLM's names."""
        values = (self.block_m, self.block_n, self.block_k, self.group_m, self.warps, self.stages)
        return (*zip((*TUNED, *TRITON_DEFAULTS), values, strict=True), *self.extra)

    @classmethod
    def of(cls, entry: Mapping[str, ParamValue], shape: MoEShape) -> Launch:
        """Make a launch of an entry. Under block scales a step deeper than the scale block runs as one of the scale
        block, so the two are the same launch.

        Raises KeyError for a missing key, ValueError for an impossible value.
        """
        values = TRITON_DEFAULTS | dict(entry)
        found = []
        for key in (*TUNED, *TRITON_DEFAULTS):
            value = values.pop(key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key} must be a positive integer, not {value!r}")
            if key in POWERS_OF_TWO and value.bit_count() > 1:
                raise ValueError(f"{key} must be a power of two, as Triton has it, not {value}")
            found.append(value)
        extra = sorted((k, v) for k, v in values.items() if k not in IGNORED or IGNORED[k] not in (None, v))
        block_m, block_n, block_k, group_m, warps, stages = found
        if warps > MAX_WARPS:
            raise ValueError(f"num_warps {warps} are more than the {MAX_WARPS} of a CTA")
        if max(block_m * block_n, block_m * block_k, block_n * block_k) > MAX_ELEMENTS:
            raise ValueError(f"a block of {block_m} x {block_n} x {block_k} exceeds Triton's {MAX_ELEMENTS} elements")
        block_k = min(block_k, SCALE_BLOCK) if shape.dtype == "fp8" else block_k
        return cls(block_m, block_n, block_k, group_m, warps, stages, tuple(extra))


Pair = tuple[Launch, Launch]
"""Launches of the up projection and of the down projection."""


@dataclass(frozen=True)
class VllmTable:
    """One file: entries by batch size, in the file's order. `down` is the table of the down projection, if it has its
    own."""

    path: Path
    entries: Mapping[int, Launch]
    down: VllmTable | None = None

    def lookup(self, tokens: int) -> Launch:
        """Look up the entry of the nearest batch size, as `try_get_optimal_moe_config` in vLLM's `fused_moe.py` does.

        Of two equally near ones it takes the first in the file, which is the smaller one in every sorted file.
        """
        return self.entries[min(self.entries, key=lambda size: abs(size - tokens))]

    def pair(self, tokens: int) -> Pair:
        """Look up the entries of both projections.

        They share one schedule. So the down projection's entry gets the token block of the up projection's, whatever
        its own, as in SGLang.
        """
        up = self.lookup(tokens)
        return up, up if self.down is None else replace(self.down.lookup(tokens), block_m=up.block_m)

    @property
    def sizes(self) -> list[int]:
        """The batch sizes that either file names."""
        return list(dict.fromkeys([*self.entries, *(self.down.entries if self.down else ())]))

    def pairs(self) -> list[Pair]:
        """Every pair that some batch size has. Pairs change only halfway between two sizes of a file."""
        tokens = set(self.sizes)
        for table in (self, self.down):
            sizes = sorted(table.entries) if table else []
            tokens |= {(a + b) // 2 + i for a, b in itertools.pairwise(sizes) for i in (-1, 0, 1)}
        return list(dict.fromkeys(self.pair(t) for t in sorted(tokens)))


def read_table(path: Path, shape: MoEShape) -> VllmTable:
    """Read the file's entries, whatever its name. It is read anew only if it has changed, since every batch asks for a
    static choice.

    Raises ProfileError, in one line, for what vLLM could not use.
    """
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
    """Find the table that vLLM would take out of these folders, the first folder first; None if none has one.

    vLLM looks for no table of the down projection.
    """
    for folder in folders:
        for name in file_names(shape, hardware):
            if (folder / name).exists():
                return read_table(folder / name, shape)
    return None


def open_table(place: Path, shape: MoEShape, hardware: Hardware) -> VllmTable:
    """Open the table for this shape and device: the file `place`, or the file of its name in the folder `place`.

    A folder is searched as vLLM or SGLang would. A table of the down projection beside the file belongs to it. Raises
    ProfileError if there is none, or the file is for another shape, device or format.
    """
    wanted = " or ".join(file_names(shape, hardware))
    if place.is_dir():
        ups, downs, others = _search(place, shape, hardware)
        if not ups:
            seen = [*(f"{p.name} is for the down projection alone" for p in downs), *others]
            near = f"; not used: {'; '.join(list(dict.fromkeys(seen))[:MOST_NAMED])}" if seen else ""
            raise ProfileError(f"{place} holds no table for {shape.label} on {hardware.name}, which is {wanted}{near}")
        up, down = ups[0], next(iter(downs), None)
    else:
        if place.exists() and (reason := _other(place.name, shape, hardware)):
            raise ProfileError(
                f"{place} is not for {shape.label} on {hardware.name} by its name, which would be {wanted}: {reason}"
            )
        up, beside = place, place.with_name(f"{place.stem}_down.json")
        down = beside if beside.exists() else None
    return replace(read_table(up, shape), down=None if down is None else read_table(down, shape))


def _other(name: str, shape: MoEShape, hardware: Hardware) -> str | None:
    """Explain why a file of this name is not the table; None if it is."""
    try:
        parsed = TableName.parse(name)
    except ProfileError as e:
        return str(e)
    if parsed.down:
        return "it is for the down projection alone; name the file of the up projection, without _down"
    return parsed.mismatch(shape, hardware)


def _search(place: Path, shape: MoEShape, hardware: Hardware) -> tuple[list[Path], list[Path], list[str]]:
    """Search a folder, and its folders by version of Triton, for tables of the shape and device.

    Returns those of the up projection and those of the down projection alone, the first that is taken first. The third
    list says why others for this layer and device are not used.
    """
    vllms = file_names(shape, hardware)
    ups: list[Path] = []
    downs: list[Path] = []
    others: list[str] = []
    for folder in (place, *_by_version(place), *_by_version(place / "configs")):
        for path in sorted(folder.glob("E=*.json"), key=lambda p: (p.name not in vllms, p.name)):
            try:
                name = TableName.parse(path.name)
            except ProfileError as e:
                if path.name.startswith(f"E={shape.num_experts},N={shape.intermediate_size},"):
                    others.append(str(e))
                continue
            reason = name.mismatch(shape, hardware)
            if reason is None:
                (downs if name.down else ups).append(path)
            elif name.elsewhere(shape, hardware) is None:
                others.append(f"{path.name}: {reason}")
    return ups, downs, others


def _by_version(place: Path) -> list[Path]:
    """SGLang's folders triton_X_Y_Z: first that of the installed Triton, then the newest, as SGLang orders them."""
    folders = (p for p in place.glob("triton_*") if re.fullmatch(r"triton(_[0-9]{1,9})+", p.name))
    found = [(tuple(map(int, p.name.split("_")[1:])), p) for p in folders]
    return [p for _, p in sorted(found, key=lambda f: (f[0] == _installed_triton(), f[0]), reverse=True)]


def _shown(path: Path) -> str:
    """The file's name, with its folder if that is a version of Triton's."""
    return f"{path.parent.name}/{path.name}" if path.parent.name.startswith("triton_") else path.name


def _installed_triton() -> tuple[int, ...] | None:
    try:
        return tuple(map(int, re.findall(r"[0-9]+", metadata.version("triton").split("+")[0])))
    except metadata.PackageNotFoundError:
        return None


# --- judged on what was recorded --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A table's entries as recorded candidates. `picks` has the candidate's index by pair of entries."""

    table: VllmTable
    kernel: str
    picks: Mapping[Pair, int]
    recorded: frozenset[Pair]
    """Pairs that were recorded exactly."""
    unjudged: tuple[str, ...]
    """Parameters that the picked configurations do not have, USE_TMA for one."""

    def choices(self, labels: Labels) -> IndexArray:
        return np.array([self.picks[self.table.pair(tokens)] for tokens, _ in labels], np.intp)

    @property
    def exact(self) -> int:
        """Number of entries that were recorded exactly."""
        return sum(self.table.pair(size) in self.recorded for size in self.table.sizes)

    def note(self) -> str:
        table, sizes = self.table, len(self.table.sizes)
        down = ""
        if table.down:
            down = f" with {_shown(table.down.path)} for the down projection, at the token blocks of the first"
            if self.kernel == JUDGED_ON[0]:
                down += f" (which {self.kernel} cannot run apart)"
        whose = "" if self.kernel == JUDGED_ON[0] else ", which are not those of vLLM's kernel"
        mapped = "" if self.exact == sizes else ", the others mapped onto the nearest recorded one"
        unjudged = f"; nothing recorded has their {', '.join(self.unjudged)}" if self.unjudged else ""
        return (
            f"{POLICY}: {_shown(table.path)}{down}, judged on {self.kernel}'s recorded times{whose}; "
            f"{self.exact} of {sizes} entries were recorded as they are{mapped}{unjudged}"
        )

    def as_dict(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        entries = {}
        for size in self.table.sizes:
            up, down = pair = self.table.pair(size)
            own = {"down": dict(down.params)} if self.table.down else {}
            entries[str(size)] = {"entry": dict(up.params), **own, "config": candidates[self.picks[pair]].config.name}
        file = {"file": str(self.table.path), "down": self.table.down and str(self.table.down.path)}
        return file | {"kernel": self.kernel, "exact": self.exact, "entries": entries}


def judge(table: VllmTable, candidates: Sequence[Candidate]) -> Judged:
    """Find each pair of entries among the recorded configurations of the first of JUDGED_ON that has some.

    If the down projection has a table of its own, it is the last of JUDGED_ON, whose projections each have their own
    parameters.

    The nearest configuration has the token block nearest to the entry's. Among those it has the smallest sum of
    distances in the other parameters over its GEMMs, and among those it is the kernel's first. The other parameters are
    weight rows and depth of a tile, GROUP_M, warps, stages, and split-K, which vLLM does not have. All distances are in
    log2. Raises ProfileError if no such kernel was recorded.
    """
    preferred = JUDGED_ON if table.down is None else JUDGED_ON[::-1]
    kernel = next((k for k in preferred if any(c.kernel == k for c in candidates)), None)
    if kernel is None:
        there = ", ".join(dict.fromkeys(c.kernel for c in candidates))
        raise ProfileError(f"a table of vLLM's is judged on recorded times of {' or '.join(JUDGED_ON)}, not {there}")
    own = [(i, c.config) for i, c in enumerate(candidates) if c.kernel == kernel]
    picks: dict[Pair, int] = {}
    recorded, unjudged = set(), set()
    for pair in table.pairs():
        *distance, _, pick = min((*_distance(c, pair), c.name != pair[0].name, i) for i, c in own)
        picks[pair] = pick
        missing = {e for launch in pair for e in launch.extra} - set(candidates[pick].config.params)
        unjudged |= {name for name, _ in missing}
        if not any(distance) and not missing:
            recorded.add(pair)
    return Judged(table, kernel, picks, frozenset(recorded), tuple(sorted(unjudged)))


def _distance(config: KernelConfig, pair: Pair) -> tuple[float, float]:
    """Distances (of the token blocks, of everything else), in log2 and summed over the GEMMs."""
    block = other = 0.0
    per_gemm = zip(
        *(_values(config, ends) for ends in (("group_m", "group_size_m"), ("warps",), ("stages",))), strict=True
    )
    for grid, launch, values in zip(config.gemms, pair, per_gemm, strict=True):
        block += _log2(grid.block_m, launch.block_m)
        own = (grid.block_n, grid.block_k, grid.split_k, *values)
        wanted = (launch.block_n, launch.block_k, 1, launch.group_m, launch.warps, launch.stages)
        other += sum(_log2(a, b) for a, b in zip(own, wanted, strict=True))
    return block, other


def _log2(a: int, b: int) -> float:
    return abs(math.log2(a / b))


def _values(config: KernelConfig, ends: tuple[str, ...]) -> list[int]:
    """A parameter's value for each GEMM, whether both share one or each has its own."""
    found = [int(v) for k, v in config.params if k.lower().endswith(ends)]
    return found * (len(config.gemms) // len(found))
