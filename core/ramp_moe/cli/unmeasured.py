"""`ramp-moe explain` without measurements: what follows from grids and the hardware's constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from ..cost_model.regions import analyse
from ..dispatch.explanation import grid_figures
from ..errors import KernelError, describe
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.kernel import Kernel, KernelConfig
from ..spec.launchable import LaunchableKernel
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape
from . import tables
from .listing import describe_kernel


def explain_unmeasured(
    registry: Registry, kernels: Sequence[str], shape: MoEShape, hardware: Hardware, histogram: IntArray
) -> dict[str, Any]:
    """Every kernel's own choice for the batch, which is what runs without a profile.

    A choice comes with its grids, but without a time. The result also has the token block that the regions advise, and
    notes on kernels without a choice. Raises KernelError if no kernel has one.
    """
    tokens = max(1, -(-int(histogram.sum()) // shape.top_k))
    candidates: list[dict[str, Any]] = []
    left_out: dict[str, list[str]] = {}
    for name in kernels or registry.kernels:
        config, reason = _own_choice(registry.kernel(name), shape, hardware, tokens)
        if config is None:
            left_out.setdefault(reason, []).append(name)
        else:
            figures = grid_figures(config, histogram, hardware.num_sms)
            candidates.append({"kernel": name, "config": config.name, "predicted_us": None, "gemms": figures})
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in left_out.items()]
    if not candidates:
        raise KernelError(f"no kernel can run {shape.label} ({shape.dtype}) on {hardware.name}; {'; '.join(reasons)}")
    remedy = f"measure on it with `ramp-moe profile --model {shape.label} --dtype {shape.dtype}`"
    if hardware.vendor != "NVIDIA":
        remedy = "`ramp-moe profile` measures only on NVIDIA's GPUs so far; name a sweep with --profile"
    missing = f"no profile for {hardware.name}, hence no times and no fastest kernel: {remedy}"
    advised = analyse(shape, hardware, histogram).token_block if histogram.any() else None
    notes = [missing, *(f"left out: {reason}" for reason in reasons)]
    return {"candidates": candidates, "token_block": advised, "notes": notes}


def _own_choice(kernel: Kernel, shape: MoEShape, hardware: Hardware, tokens: int) -> tuple[KernelConfig | None, str]:
    """The configuration that a kernel chooses for a batch size without a profile, or None and why there is none."""
    if reason := describe_kernel(kernel, shape, hardware)[2]:
        return None, reason
    if not isinstance(kernel, LaunchableKernel):
        return None, "it is only described and makes no choice"
    try:
        return kernel.default_config(shape, hardware, tokens), ""
    except Exception as e:
        return None, f"broken: {type(e).__name__}: {describe(e)}"


def render(
    shape: MoEShape, hardware: Hardware, batch: str, histogram: IntArray, found: dict[str, Any]
) -> list[RenderableType]:
    table = tables.grid_table()
    for c in found["candidates"]:
        table.add_row(escape(f"{c['kernel']}/{c['config']}"), "?", *tables.grid_cells(c["gemms"]), "")
    block = found["token_block"]
    advice = "" if block is None else f"; token block advised by `ramp-moe regions`: {block}"
    return [
        tables.batch_title(shape, hardware, batch, histogram),
        table,
        f"each kernel's own choice, without a profile, from its grids and the hardware's constants alone{advice}",
        *(f"[dim]note: {escape(n)}" for n in found["notes"]),
    ]
