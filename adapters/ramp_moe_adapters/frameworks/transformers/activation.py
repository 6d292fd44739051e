"""Finds out which of ramp_moe's activations a module of Transformers' experts interface computes, by running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ramp_moe.plugin import ACTIVATIONS, KernelError

if TYPE_CHECKING:
    from torch import Tensor

PROBE_ROWS, PROBE_SCALE = 64, 4000.0
"""Probe values for gate and up, which tell activations apart: dense around zero, and far beyond any usual clamp."""
CLAMPED = ("swiglu_oai", "swiglu_clamped")
"""Those of ACTIVATIONS that clamp `up`."""
TINY, HUGE = 2.0**-10, 2.0**20
"""Values of `up` that every limit lets pass, and that no limit lets pass."""


@dataclass(frozen=True)
class Activation:
    """One of ACTIVATIONS, with its limit if it takes one. alternating: True if gate and up columns alternate."""

    name: str
    limit: float | None
    alternating: bool


def activation_of(module: Any, rows: int, device: Any) -> Activation:
    """Find the activation that the module's `_apply_gate` computes of `rows` gate and up columns.

    Raises KernelError if it is none of ACTIVATIONS.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(0)
    spread = torch.logspace(-4, 0, PROBE_ROWS, dtype=torch.float32, device="cpu")[:, None] * PROBE_SCALE
    drawn = torch.randn(PROBE_ROWS, rows, dtype=torch.float32, device="cpu", generator=generator)
    probe = (drawn * spread).to(device)
    with torch.no_grad():
        found = module._apply_gate(probe)
    for alternating in (False, True):
        gate, up = (probe[:, 0::2], probe[:, 1::2]) if alternating else probe.chunk(2, 1)
        limit = _limit(module, rows, alternating, device)
        for name in (a for a in ACTIVATIONS if (a in CLAMPED) == (limit is not None)):
            candidate = Activation(name, limit if name == "swiglu_clamped" else None, alternating)
            if torch.allclose(found, _activated(gate, up, candidate), rtol=1e-4, atol=1e-5):
                return candidate
    raise KernelError(f"its activation is none of {', '.join(ACTIVATIONS)} ({_described(module)})")


def _limit(module: Any, rows: int, alternating: bool, device: Any) -> float | None:
    """The limit at which the activation clamps `up`; None if it does not.

    The limit is the output for a huge `up` / the output for a tiny one * the tiny one.
    """
    import torch

    ups = torch.full((2, rows // 2), TINY, dtype=torch.float32, device=device)
    ups[1] = HUGE
    gate = torch.ones_like(ups)
    probe = torch.stack((gate, ups), -1).flatten(1) if alternating else torch.cat((gate, ups), 1)
    with torch.no_grad():
        of_tiny, of_huge = module._apply_gate(probe)[:, 0].tolist()
    limit = of_huge / of_tiny * TINY if of_tiny else HUGE
    return float(f"{limit:.6g}") if 0 < limit < HUGE / 2 else None


def _activated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    from ramp_moe.runtime.reference import activate

    return activate(gate, up, activation.name, activation.limit)


def _described(module: Any) -> str:
    """The module's activation, for a person to read."""
    function = getattr(module, "act_fn", None)
    if function is None:
        return f"{type(module).__name__}._apply_gate"
    return getattr(function, "__name__", type(function).__name__)
