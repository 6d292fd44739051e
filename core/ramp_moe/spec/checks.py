"""Checks of a launch's arguments. Each error names the kernel, the argument and what it must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import KernelError, ShapeError
from .dense import check_dense
from .launchable import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 16
"""Bytes to which tensor maps, 16-byte copies and bulk additions need an address aligned."""


def check_bf16(kernel: str, batch: Batch, out: Tensor) -> None:
    """Raises KernelError unless hidden states and `out` are bf16, the only dtype that the calling kernel knows."""
    import torch

    x = batch.hidden_states
    if x.dtype != torch.bfloat16 or out.dtype != torch.bfloat16:
        raise KernelError(f"{kernel} takes and writes bf16 only: hidden_states are {x.dtype}, out is {out.dtype}")


def check_batch(kernel: str, batch: Batch, out: Tensor, hidden_size: int, device: torch.device) -> None:
    """Raises KernelError unless hidden states and `out` are both `[T, hidden_size]`, of one dtype and on `device`, and
    `out` is contiguous.

    device: where the weights are.
    """
    x = batch.hidden_states
    if x.shape[1] != hidden_size or out.shape != x.shape or out.dtype != x.dtype:
        raise KernelError(
            f"{kernel}: hidden_states {x.dtype} {list(x.shape)} and out {out.dtype} {list(out.shape)} must be "
            f"[T, {hidden_size}], of one dtype"
        )
    if not out.is_contiguous():
        raise KernelError(f"{kernel}: out must be contiguous, its strides are {out.stride()}; give a contiguous one")
    if not x.device == out.device == device:
        raise KernelError(
            f"{kernel}: hidden_states are on {x.device}, out on {out.device}, weights on {device}; move them together"
        )


def check_dtype(what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises KernelError for a tensor of none of the dtypes."""
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(f"{what} must be {names}, not {str(tensor.dtype).removeprefix('torch.')}; convert it")


def check_device(what: str, tensor: Tensor, device: torch.device) -> None:
    """Raises KernelError for a tensor that is not on `device`."""
    if tensor.device != device:
        raise KernelError(f"{what} must be on {device}, not on {tensor.device}; move it there")


def check_gpu(what: str, tensor: Tensor) -> None:
    """Raises KernelError for a tensor that is on no GPU."""
    if not tensor.is_cuda:
        raise KernelError(f"{what} must be on a GPU, not on {tensor.device}; move it there")


def check_tensor(
    what: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raises ShapeError for another shape, KernelError for no dense tensor, another dtype or device, and for strides.

    what: names the tensor and whose it is, as in "the schedule's slots".
    """
    check_dense(KernelError, **{what: tensor})
    if tensor.shape != shape:
        raise ShapeError(f"{what} must be {list(shape)}, not {list(tensor.shape)}")
    check_dtype(what, tensor, dtypes)
    check_device(what, tensor, device)
    if not tensor.is_contiguous():
        raise KernelError(f"{what} must be contiguous; its strides are {tensor.stride()}: call .contiguous() on it")


def check_aligned(kernel: str, name: str, tensor: Tensor) -> None:
    """Raises KernelError unless the tensor is contiguous and starts at a multiple of ALIGNMENT bytes."""
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise KernelError(f"{kernel}: {name} must be contiguous and start at a multiple of {ALIGNMENT} bytes; copy it")


def check_hopper(kernel: str, device: torch.device) -> None:
    """Raises KernelError unless the weights' device is a Hopper GPU (sm_90)."""
    import torch

    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise KernelError(f"{kernel} runs on Hopper (sm_90) only; the weights are on {device}, which is not Hopper")
