"""Launches of kernels that follow each other: on the right device, and with programmatic dependent launch."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

_HERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which the tensor's device is the current one, on which Triton launches."""
    index = tensor.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments for launching a kernel that begins with `gdc_wait` if PDL is set (programmatic dependent launch).

    The kernel's CTAs are set up while the kernel before it drains, which hides most of the launch latency. Only
    NVIDIA GPUs from sm_90 on have it. Elsewhere, and in the interpreter, launches wait for each other as usual. The
    result is shared: do not change it.
    """
    has = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if has else {"PDL": False}
