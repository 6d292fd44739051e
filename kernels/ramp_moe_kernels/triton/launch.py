"""How kernels are launched one after the other."""

from __future__ import annotations

import functools

import torch


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of a kernel that begins with `gdc_wait` where PDL is set: programmatic dependent launch.

    The kernel's CTAs are set up while the kernel before it drains, which hides most of the launch latency. Only
    NVIDIA GPUs from sm_90 on have it; elsewhere, and in the interpreter, launches wait for each other as usual.
    """
    return {"PDL": True, "launch_pdl": True} if _has_pdl(device.type, device.index) else {"PDL": False}


@functools.cache
def _has_pdl(kind: str, index: int | None) -> bool:
    return kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
