"""Sweeps: measured times of a kernel's stages and whole paths over routings, and the file that holds them.

A sweep file (format "ramp-moe/sweep", version 3) is one JSON object:

    device, kernel, kernel_version   hardware name in this library; which kernel, and the version or commit that ran
    shape                            num_experts, top_k, hidden_size, intermediate_size, dtype, name
    runs                             each time that the batches were measured: {"measured" (ISO 8601), "device_name",
                                     "gpu" (start of its UUID), "driver", "software" (versions), "method",
                                     "seconds" (of the run, all its kernels together), "notes"}
    columns                          what was timed: {"stage": kind or "path", "key": stage key, "params": {...}}
    left_out                         configurations without a column, by reason: {"reason", "configs"}
    batches                          what it was timed on: {"num_tokens", "routing" (a label), "histogram" [E],
                                     "seed" (of the label's generator), "split", "runs_us" [runs][columns]}

Times are microseconds, the median over launches. null marks a cell, or a whole run of a batch, that was not measured or
failed. A negative time is a bound: the configuration takes at least its absolute value. It was not measured, since it
was far behind on smaller batches already.

A column's `key` is that of the kernel's `Stage`, or `path_key` of a configuration for "path": the whole of it, from
top-k ids to output. A stage without a column (quantisation, for one) is not in the sweep's times; `stages` tells.

`split` is "tune" for batches to fit and to tune static tables on, "test" for those that are kept for judging.

Version 2 called the batches rows, and the kernels' parameters and shared stages by other names. Version 1 had one run,
its fields beside the others, and no splits. Version 0 is the headerless form of the first measurements.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError, RampMoEError
from ..spec.kernel import STAGE_KINDS, ParamValue
from ..spec.routing import MAX_COUNT, FloatArray, IntArray, check_histogram
from ..spec.shapes import MoEShape
from .json_file import read_json, write_json

FORMAT = "ramp-moe/sweep"
VERSION = 3
PATH = "path"
COLUMN_KINDS = (PATH, *STAGE_KINDS)
Split = Literal["tune", "test"]
MIN_US, MAX_US = 1e-3, 1e9
"""Times outside are mistakes of unit; squares of what is inside stay finite in a fit."""
MAX_CELLS = 2**24
"""Most runs x batches x columns: a hundred times what the largest sweep has. A batch that lacks a run holds one null
for it."""
SPOILT = 1.25
"""Ratio to the shortest run from which on a time counts as disturbed. Disturbances only lengthen a measurement, and
seldom hit twice; undisturbed runs repeat to a few per cent."""


class ShapeRecord(msgspec.Struct, forbid_unknown_fields=True):
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    name: str | None = None

    @classmethod
    def of(cls, shape: MoEShape) -> ShapeRecord:
        return cls(shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size, shape.dtype, shape.name)

    def shape(self) -> MoEShape:
        return MoEShape(self.num_experts, self.top_k, self.hidden_size, self.intermediate_size, self.dtype, self.name)


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    stage: str
    key: str
    params: dict[str, ParamValue] = {}


class MeasuredBatch(msgspec.Struct, forbid_unknown_fields=True):
    num_tokens: int
    routing: str
    histogram: list[int]
    runs_us: list[list[float | None] | None]
    seed: int | None = None
    split: Split = "tune"


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    measured: str
    device_name: str
    driver: str
    software: dict[str, str]
    method: str
    gpu: str = ""
    seconds: float | None = None
    notes: list[str] = []


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: str
    configs: list[str]


class SweepRecord(msgspec.Struct, forbid_unknown_fields=True):
    """The file, field by field."""

    format: str
    version: int
    device: str
    kernel: str
    kernel_version: str
    shape: ShapeRecord
    runs: list[Run]
    columns: list[Column]
    left_out: list[LeftOut]
    batches: list[MeasuredBatch]


def path_key(kernel: str, config: str) -> str:
    """Key of the column that holds a configuration's whole path."""
    return f"{PATH}/{kernel}/{config}"


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: `record` as in the file, `shape`, and arrays made from its batches."""

    record: SweepRecord
    shape: MoEShape
    histograms: IntArray
    """int64 `[batches, num_experts]`"""
    runs_us: FloatArray
    """float64 `[runs, batches, columns]`: the time or its bound in microseconds, NaN if neither is known"""

    @property
    def kernel(self) -> str:
        return self.record.kernel

    @property
    def device(self) -> str:
        return self.record.device

    @property
    def labels(self) -> list[tuple[int, str]]:
        """Pairs (tokens, routing label), one for each batch."""
        return [(r.num_tokens, r.routing) for r in self.record.batches]

    @cached_property
    def times_us(self) -> FloatArray:
        """Times float64 `[batches, columns]` in microseconds: the geometric mean over the runs that measured a cell.

        Times longer than SPOILT times the shortest do not count. A cell that has only bounds gets their mean (see
        `only_bounded`). It is NaN if there is neither.
        """
        measured = np.isfinite(self.runs_us) & (~self.bounded | self.only_bounded)
        shortest = np.where(measured, self.runs_us, np.inf).min(0)
        measured &= self.runs_us <= SPOILT * shortest
        logs = np.where(measured, np.log(np.where(measured, self.runs_us, 1.0)), 0.0).sum(0)
        count = measured.sum(0)
        # A cell that was measured once keeps the exact value of the file.
        once = np.where(count == 1, np.where(measured, self.runs_us, 0.0).sum(0), np.nan)
        return np.where(count > 1, np.exp(logs / np.maximum(count, 1)), once)

    @cached_property
    def bounded(self) -> NDArray[np.bool_]:
        """Mask `[runs, batches, columns]` of the `runs_us` that are bounds."""
        columns = len(self.record.columns)
        masks = [
            [[t is not None and t < 0 for t in u or [None] * columns] for u in b.runs_us] for b in self.record.batches
        ]
        return np.array(masks, bool).swapaxes(0, 1)

    @cached_property
    def only_bounded(self) -> NDArray[np.bool_]:
        """Mask `[batches, columns]` of the `times_us` that are bounds, since no run measured the cell."""
        measured = np.isfinite(self.runs_us) & ~self.bounded
        return np.asarray(self.bounded.any(0) & ~measured.any(0))

    @property
    def column_of(self) -> dict[str, int]:
        """Column index by stage key."""
        return {c.key: i for i, c in enumerate(self.record.columns)}

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Kinds of columns in the order in which a path runs them, "path" first."""
        kinds = {c.stage for c in self.record.columns}
        return tuple(k for k in COLUMN_KINDS if k in kinds)

    def batches_of(self, split: Split) -> list[int]:
        """Indices of the batches to fit on ("tune"), or of those kept for judging ("test")."""
        return [i for i, r in enumerate(self.record.batches) if r.split == split]

    def select(self, batches: Sequence[int]) -> Sweep:
        """Keep the batches of these indices, in this order."""
        record = msgspec.structs.replace(self.record, batches=[self.record.batches[i] for i in batches])
        index = np.asarray(batches, np.intp)
        return Sweep(record, self.shape, self.histograms[index], self.runs_us[:, index])

    def only(self, stages: Sequence[str]) -> Sweep:
        """Keep the columns of these kinds. Raises ProfileError if one of the kinds has no column."""
        if missing := [k for k in stages if k not in self.stages]:
            raise ProfileError(
                f"the sweep of {self.kernel} for {self.shape.label} on {self.device} has no times of "
                f"{', '.join(missing)}; it has {', '.join(self.stages)}"
            )
        return self._columns([i for i, c in enumerate(self.record.columns) if c.stage in stages])

    def without(self, keys: Collection[str]) -> Sweep:
        """Drop the columns of these keys."""
        return self._columns([i for i, c in enumerate(self.record.columns) if c.key not in keys])

    def _columns(self, index: Sequence[int]) -> Sweep:
        batches = [
            msgspec.structs.replace(r, runs_us=[u and [u[i] for i in index] for u in r.runs_us])
            for r in self.record.batches
        ]
        record = msgspec.structs.replace(self.record, columns=[self.record.columns[i] for i in index], batches=batches)
        return Sweep(record, self.shape, self.histograms, self.runs_us[:, :, index])

    def extended(self, other: Sweep) -> Sweep:
        """Append the batches of `other`, over the columns that both have. The runs of both stand side by side."""
        keys = [c.key for c in self.record.columns if c.key in other.column_of]
        mine, theirs = ([s.column_of[k] for k in keys] for s in (self, other))

        def spread(sweep: Sweep, columns: list[int], before: int, after: int) -> list[MeasuredBatch]:
            empty: list[list[float | None] | None] = [None]
            return [
                msgspec.structs.replace(
                    r,
                    runs_us=[*empty * before, *(u and [u[i] for i in columns] for u in r.runs_us), *empty * after],
                )
                for r in sweep.record.batches
            ]

        record = msgspec.structs.replace(
            self.record,
            runs=[*self.record.runs, *other.record.runs],
            columns=[self.record.columns[i] for i in mine],
            batches=[
                *spread(self, mine, 0, len(other.record.runs)),
                *spread(other, theirs, len(self.record.runs), 0),
            ],
        )
        return make_sweep(record)

    def save(self, path: Path) -> None:
        """Write the current version of the format, atomically."""
        write_json(path, self.record)


def make_sweep(record: SweepRecord, source: str = "sweep") -> Sweep:
    """Check a record's meaning (lengths, counts, signs) and make its arrays.

    Raises ProfileError, which names `source` and the field.
    """

    def wrong(field: str, message: str) -> ProfileError:
        return ProfileError(f"{source}: {message} - at `$.{field}`")

    try:
        shape = record.shape.shape()
    except RampMoEError as e:
        raise wrong("shape", str(e)) from None
    if not record.columns:
        raise wrong("columns", "a sweep needs at least one column")
    if not record.runs:
        raise wrong("runs", "a sweep needs at least one run")
    for i, column in enumerate(record.columns):
        if column.stage not in COLUMN_KINDS:
            raise wrong(f"columns[{i}].stage", f"{column.stage!r} is not one of {', '.join(COLUMN_KINDS)}")
    keys = [c.key for c in record.columns]
    if len(set(keys)) != len(keys):
        i = next(i for i, k in enumerate(keys) if k in keys[:i])
        raise wrong(f"columns[{i}].key", f"{keys[i]!r} appears twice")
    if not record.batches:
        raise wrong("batches", "a sweep needs at least one batch")
    if (cells := len(record.runs) * len(record.batches) * len(keys)) > MAX_CELLS:
        raise wrong("batches", f"runs, batches and columns make {cells} times, at most {MAX_CELLS} can be")
    for i, batch in enumerate(record.batches):
        if not 1 <= batch.num_tokens <= MAX_COUNT:
            raise wrong(f"batches[{i}].num_tokens", f"{batch.num_tokens} is not a number of tokens")
        try:
            check_histogram(batch.histogram, shape.num_experts, batch.num_tokens * shape.top_k)
        except RampMoEError as e:
            raise wrong(f"batches[{i}].histogram", str(e)) from None
        if len(batch.runs_us) != len(record.runs):
            raise wrong(f"batches[{i}].runs_us", f"{len(batch.runs_us)} runs, the sweep has {len(record.runs)}")
        for r, times in enumerate(batch.runs_us):
            if times is not None and len(times) != len(keys):
                raise wrong(f"batches[{i}].runs_us[{r}]", f"{len(times)} times for {len(keys)} columns")
            for j, t in enumerate(times or ()):
                if t is not None and not MIN_US <= abs(t) <= MAX_US:
                    raise wrong(
                        f"batches[{i}].runs_us[{r}][{j}]", f"{t} is no time in microseconds ({MIN_US:g} to {MAX_US:g})"
                    )
    if not any(t is not None for batch in record.batches for times in batch.runs_us for t in times or ()):
        raise wrong("batches", "no time was measured; measure again")
    absent = [None] * len(keys)
    return Sweep(
        record,
        shape,
        np.array([r.histogram for r in record.batches], np.int64),
        abs(np.array([[absent if u is None else u for u in r.runs_us] for r in record.batches], np.float64)).swapaxes(
            0, 1
        ),
    )


def load_sweep(path: str | Path) -> Sweep:
    """Read and validate a sweep file of any version. Raises ProfileError naming the file and the field."""
    path = Path(path)
    record = read_json(
        path,
        SweepRecord,
        FORMAT,
        VERSION,
        {0: _from_version_0, 1: _from_version_1, 2: _from_version_2},
        _recognise_version_0,
    )
    return make_sweep(record, str(path))


def _recognise_version_0(raw: dict[str, Any]) -> int | None:
    fields = {"kernel", "kernel_version", "configs", "rows", "noop_us", "measured", "method"}
    return 0 if "format" not in raw and fields <= raw.keys() else None


def _from_version_0(raw: dict[str, Any]) -> dict[str, Any]:
    """Migrate the first Alpha-MoE measurements: flat fields, four numbers a configuration, routing apart from its
    argument."""
    if not str(raw["dtype"]).startswith("fp8_w8a8"):
        raise ValueError(f"dtype {raw['dtype']!r}")

    def column(c: dict[str, int]) -> dict[str, Any]:
        key = f"{raw['kernel']}/bm{c['block_m']}-bn{c['block_n']}-wn{c['warp_n']}-st{c['stages']}"
        return {"stage": "gemm", "key": key, "params": c}

    def row(r: dict[str, Any]) -> dict[str, Any]:
        label = r["routing"] if r["routing"] == "uniform" else f"{r['routing']}{r['routing_arg']}"
        return {
            "num_tokens": r["num_tokens"],
            "routing": label,
            "histogram": r["histogram"],
            "median_us": r["median_us"],
        }

    shape = {k: raw[k] for k in ("num_experts", "top_k", "hidden_size", "intermediate_size")}
    return {
        "format": FORMAT,
        "version": 1,
        "device": str(raw["device"]).removeprefix("NVIDIA ").lower(),
        "device_name": raw["device"],
        "driver": raw["driver"],
        "software": {"cuda": raw["cuda"], "torch": raw["torch"]},
        "kernel": raw["kernel"],
        "kernel_version": raw["kernel_version"],
        "shape": shape | {"dtype": "fp8", "name": raw["model"]},
        "method": raw["method"],
        "measured": raw["measured"],
        "columns": [column(c) for c in raw["configs"]],
        "rows": [row(r) for r in raw["rows"]],
    }


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Migrate a file of one run, all of whose batches were fitted on."""
    run = {k: raw.pop(k) for k in ("measured", "device_name", "driver", "software", "method")}
    rows = [{**row, "runs_us": [row["median_us"]]} for row in raw.pop("rows")]
    for row in rows:
        del row["median_us"]
    return {**raw, "version": 2, "runs": [run], "left_out": [], "rows": rows}


def _from_version_2(raw: dict[str, Any]) -> dict[str, Any]:
    """Migrate a file whose batches were called rows."""
    batches = raw.pop("rows")
    columns = [
        {
            **column,
            "key": key_of_today(column["key"]),
            "params": {param_of_today(raw["kernel"], k): v for k, v in column.get("params", {}).items()},
        }
        for column in raw["columns"]
    ]
    return {**raw, "version": 3, "columns": columns, "batches": batches}


def key_of_today(key: str) -> str:
    """The key of a stage that older files may call otherwise."""
    for old, new in (("rows/dispatch/", "permute/"), ("rows/activate/", "permute/activate/")):
        if key.startswith(old):
            return new + key.removeprefix(old)
    return "permute/unpermute" if key == "rows/combine" else key


OLD_PARAMS = {
    "cute": {"block": "block_m"},
    "triton": {
        f"{gemm}_{old}": f"{gemm}_{new}"
        for gemm in ("up", "down")
        for old, new in (("block", "block_m"), ("rows", "block_n"), ("step", "block_k"))
    },
}


def param_of_today(kernel: str, param: str) -> str:
    """The name of a kernel's parameter that older files may call otherwise."""
    return OLD_PARAMS.get(kernel, {}).get(param, param)
