"""Fitted coefficients on disk: format "ramp-moe/fit", version 3, one JSON object:

    device, kernel, shape         what the fit is for
    form, terms                   the cost model form, and the order of its coefficients
    sweep, measured               digest of the sweep it was fitted on; what that measured, where and when
    stages                        kinds of stages that the predicted times contain ("path": all of them)
    quality                       regret {mean, median, p95, max} of choosing by this form: on the sweep's test batches,
                                  or cross-validated if it has none
    fits                          one for each stage or path: key, coefficients (us a unit), rms_error and max_error
                                  (relative), the fitted rows, the ranges of CTAs and active experts they cover,
                                  floor_us, below which no prediction goes, and each grid's CTAs on an SM at a time
    residual                      corrects the sums (see `residual`); null if the form has none. For the fitted batches:
                                  routed ids, active experts and, by token block, M-tiles. For each configuration: its
                                  token block, the spline's constant, and a weight for each batch. A configuration that
                                  it does not name is never chosen

A fit is out of date, and not used, if its digest is not that of the sweep found beside it. Version 2 called
stages that kernels share by other keys. Version 1 had other coefficients, which must be fitted again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import ProfileError, RampMoEError
from ..measurements.json_file import read_json, write_json
from ..measurements.sweep import COLUMN_KINDS, MAX_US, MIN_US, ShapeRecord, Sweep, key_of_today
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape
from .model import FORMS, Candidate, CostModel, PartFit, parts_of, provenance
from .residual import Residual

FORMAT = "ramp-moe/fit"
VERSION = 3


class PartRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `PartFit` under its part's key, with CTAs an SM by grid. The other fields are the same."""

    key: str
    coefficients: tuple[float, ...]
    rows: int
    rms_error: float
    max_error: float
    ctas_range: tuple[float, float]
    active_range: tuple[int, int]
    floor_us: float
    ctas_per_sm: tuple[int, ...]


class ResidualRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `Residual`, whose token blocks are strings, since they are keys of a JSON object."""

    ids: list[int]
    active: list[int]
    tiles: dict[str, list[int]]
    weights: dict[str, tuple[int, float, list[float]]]

    @classmethod
    def of(cls, residual: Residual, kernel: str) -> ResidualRecord:
        plain = {str(b): t.tolist() for b, t in residual.tiles.items()}
        weights = {n.removeprefix(f"{kernel}/"): (b, c, w.tolist()) for n, (b, c, w) in residual.weights.items()}
        return cls(residual.ids.tolist(), residual.active.tolist(), plain, weights)

    def residual(self, kernel: str) -> Residual:
        tiles = {int(b): np.array(t) for b, t in self.tiles.items()}
        weights = {f"{kernel}/{n}": (b, c, np.array(w)) for n, (b, c, w) in self.weights.items()}
        return Residual(np.array(self.ids), np.array(self.active), tiles, weights)

    def flaw(self) -> str | None:
        """Describe what is wrong with the record; None if nothing is."""
        rows, columns = len(self.ids), [self.ids, self.active, *self.tiles.values()]
        if rows == 0 or any(len(column) != rows or min(column) < 1 for column in columns):
            return "the batches' numbers are not positive, or not as many as the batches"
        if not all(b.isdecimal() for b in self.tiles):
            return "token blocks that are no numbers"
        for name, (block, constant, weights) in self.weights.items():
            if str(block) not in self.tiles or len(weights) != rows or not np.isfinite([constant, *weights]).all():
                return f"the weights of {name} do not fit the batches"
        return None


class FitRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file, field by field."""

    format: str
    version: int
    device: str
    kernel: str
    shape: ShapeRecord
    form: str
    terms: list[str]
    sweep: str
    measured: str
    stages: list[str]
    quality: dict[str, float]
    fits: list[PartRecord]
    residual: ResidualRecord | None = None


def digest(sweep: Sweep) -> str:
    """SHA-256 of a sweep's content, the same however its file is laid out."""
    return hashlib.sha256(msgspec.json.encode(sweep.record)).hexdigest()


def make_record(model: CostModel, sweep: Sweep, quality: Mapping[str, float]) -> FitRecord:
    fits = []
    for key, f in model.fits.items():
        same = {field: getattr(f, field) for field in PartRecord.__struct_fields__ if hasattr(f, field)}
        fits.append(PartRecord(key=key, ctas_per_sm=tuple(g.ctas_per_sm for g in f.part.grids), **same))
    return FitRecord(
        format=FORMAT,
        version=VERSION,
        device=sweep.device,
        kernel=sweep.kernel,
        shape=ShapeRecord.of(sweep.shape),
        form=model.form,
        terms=list(FORMS[model.form].terms),
        sweep=digest(sweep),
        measured=provenance(sweep),
        stages=list(model.stages),
        quality=dict(quality),
        fits=fits,
        residual=ResidualRecord.of(model.residuals[0], sweep.kernel) if model.residuals else None,
    )


def save_fit(path: Path, record: FitRecord) -> None:
    """Write the file, atomically."""
    write_json(path, record)


def load_fit(path: Path) -> FitRecord:
    """Read and validate a fit file. Raises ProfileError naming the file and the field."""
    record = read_json(path, FitRecord, FORMAT, VERSION, {1: _from_version_1, 2: _from_version_2})
    try:
        record.shape.shape()
    except RampMoEError as e:
        raise ProfileError(f"{path}: {e} - at `$.shape`") from None
    if record.form not in FORMS or list(FORMS[record.form].terms) != record.terms:
        raise ProfileError(f"{path}: form {record.form!r} of terms {record.terms} is not known here; fit again")
    if not record.stages or not set(record.stages) <= set(COLUMN_KINDS):
        raise ProfileError(f"{path}: {record.stages} are not kinds of stages - at `$.stages`")
    for i, fit in enumerate(record.fits):
        if len(fit.coefficients) != len(record.terms):
            raise ProfileError(
                f"{path}: {len(fit.coefficients)} coefficients for {len(record.terms)} terms "
                f"- at `$.fits[{i}].coefficients`"
            )
        if not all(n >= 1 for n in fit.ctas_per_sm):
            raise ProfileError(f"{path}: no CTA on an SM - at `$.fits[{i}].ctas_per_sm`; fit again")
        if not all(abs(c) <= MAX_US for c in fit.coefficients) or not MIN_US / 2 <= fit.floor_us <= MAX_US:
            raise ProfileError(f"{path}: not finite, or no time in microseconds - at `$.fits[{i}]`; fit again")
    if record.residual and (flaw := record.residual.flaw()):
        raise ProfileError(f"{path}: {flaw} - at `$.residual`; fit again")
    return record


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("fits: they had other coefficients then; fit again")


def _from_version_2(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "version": 3, "fits": [{**fit, "key": key_of_today(fit["key"])} for fit in raw["fits"]]}


def model_from_fit(
    record: FitRecord,
    shape: MoEShape,
    hardware: Hardware,
    configs: Sequence[KernelConfig],
    histograms: IntArray | None = None,
) -> CostModel:
    """Make the cost model of a fit, over those of the kernel's configurations that it covers.

    histograms: the batches that were fitted to, int64 `[batches, num_experts]`, which the file does not have. Raises
    ProfileError if the fit covers none of the configurations: they have changed since.
    """
    by_key = {f.key: f for f in record.fits}
    candidates, fits = [], {}
    for config in configs:
        candidate = Candidate(record.kernel, config)
        parts = parts_of(candidate, record.stages)
        if parts and all(p.key in by_key and len(by_key[p.key].ctas_per_sm) == len(p.grids) for p in parts):
            candidates.append(candidate)
            for part in parts:
                numbers = msgspec.structs.asdict(by_key[part.key])
                del numbers["key"]
                fits[part.key] = PartFit(part.with_residents(numbers.pop("ctas_per_sm")), **numbers)
    if not candidates:
        raise ProfileError(
            f"the fit of {record.kernel} for {shape.label} on {record.device} covers no configuration of the kernel "
            "registered under that name; fit again"
        )
    residuals = [record.residual.residual(record.kernel)] if record.residual else []
    return CostModel(
        shape, hardware, record.form, candidates, fits, record.stages, [record.measured], histograms, residuals
    )
