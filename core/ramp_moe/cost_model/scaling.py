"""What times that were measured on one GPU say of another, by the constants of both (`spec.hardware.Hardware`).

A wave has as many CTAs as the other GPU has SMs. Then all candidates' times for a batch are multiplied by one factor
(step 10 of `formula`). So what was measured keeps its order, but for the waves. L2 takes part in `nearness` alone:
its bandwidth is in no data sheet.

No second GPU was measured, so nobody knows how far off such a guess is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import ProfileError
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig
from .model import FORMS, Candidate, CostModel, Part, PartFit, parts_of

CONSTANTS = ("hbm_bytes_per_s", "bf16_flops", "num_sms", "l2_bytes")
"""Constants by which one GPU is near another."""


def nearness(hardware: Hardware, other: Hardware) -> tuple[bool, bool, float]:
    """A key by which other GPUs are sorted, the nearest to `hardware` first.

    The same architecture comes first, then the same vendor, then the least distance in the logarithms of CONSTANTS.
    """
    distance = math.hypot(*(math.log(getattr(other, c) / getattr(hardware, c)) for c in CONSTANTS))
    return other.arch != hardware.arch, other.vendor != hardware.vendor, distance


def scaled(model: CostModel, configs: Mapping[str, Sequence[KernelConfig]], hardware: Hardware) -> CostModel:
    """Make the model of another GPU, of those configurations that its kernels have there.

    configs: what may be chosen on `hardware`, by the kernel's name. One that was not measured is as the measured one
    with the nearest tiles. Every prediction extrapolates. Raises ProfileError if no candidate is left.
    """
    pairs = [
        (Candidate(kernel, config), like)
        for kernel, found in configs.items()
        for config in found
        if (like := _nearest(config, [c for c in model.candidates if c.kernel == kernel]))
    ]
    if not pairs:
        raise ProfileError(f"no configuration that was measured on {model.hardware.name} exists on {hardware.name}")
    terms, wave = FORMS[model.form].terms, hardware.num_sms / model.hardware.num_sms
    ratios = [wave if term in ("waves", "ceil_waves") else 1.0 for term in terms]
    fits = {
        part.key: _part(part, model.fits[known.key], ratios)
        for candidate, like in pairs
        for part, known in zip(parts_of(candidate, model.stages), parts_of(like, model.stages), strict=True)
    }
    residuals = [
        replace(r, weights={c.name: r.weights[like.name] for c, like in pairs if like.name in r.weights})
        for r in model.residuals
    ]
    return CostModel(
        model.shape,
        hardware,
        model.form,
        [candidate for candidate, _ in pairs],
        fits,
        model.stages,
        [f"{line}, scaled to {hardware.name}" for line in model.measured],
        model.histograms,
        residuals,
        measured_on=model.hardware,
    )


def _nearest(config: KernelConfig, measured: Sequence[Candidate]) -> Candidate | None:
    """Find the measured candidate of the same name, else the one with the nearest tiles; None if its stages differ."""
    kinds = [s.kind for s in config.stages]
    alike = [c for c in measured if c.config.name == config.name or [s.kind for s in c.config.stages] == kinds]
    return min(alike, key=lambda c: (c.config.name != config.name, _distance(c.config, config)), default=None)


def _distance(one: KernelConfig, other: KernelConfig) -> tuple[float, float, int]:
    """Distances in log2, summed over the GEMMs: of the token blocks, and of the tiles' other sizes. The last is the
    number of parameters that differ."""
    pairs = list(zip(one.gemms, other.gemms, strict=False))
    blocks, others = (
        sum(abs(math.log2(getattr(a, size) / getattr(b, size))) for a, b in pairs for size in sizes)
        for sizes in (("block_m",), ("block_n", "block_k", "split_k"))
    )
    return blocks, others, len({*one.params} ^ {*other.params})


def _part(part: Part, fit: PartFit, ratios: Sequence[float]) -> PartFit:
    """The fit of a part, with the grids that the part has on the other GPU."""
    residents = [g.ctas_per_sm for g in fit.part.grids]
    coefficients = tuple(c * ratio for c, ratio in zip(fit.coefficients, ratios, strict=True))
    return replace(
        fit,
        part=part.with_residents(residents),
        coefficients=coefficients,
        ctas_range=(math.inf, -math.inf),
        active_range=(1, 0),
    )
