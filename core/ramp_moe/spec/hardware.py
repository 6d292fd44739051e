"""Constants of a GPU, which the geometry and the performance regions need, and how a GPU is identified."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import HardwareError
from .formats import FORMATS

READ_SHARE = 0.9
"""Share of the data sheet's bandwidth at which weights are read at best, as on an H200; used for every GPU that nobody
measured."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU model. Peaks are dense (no sparsity), from the vendor's data sheet named in `source`.

    num_sms: streaming multiprocessors (compute units on AMD).
    l2_bytes: L2 cache of the whole GPU, summed over its dies.
    smem_per_sm_bytes: shared memory of one multiprocessor (LDS on AMD).
    hbm_bytes_per_s: bandwidth of the memory.
    measured_bytes_per_s: the rate at which kernels read weights from memory at best; None if nobody measured it.
    fp8_flops, bf16_flops: peaks in FLOP/s; fp8_flops is None if the GPU has no fp8 units.
    device_names: names that the driver reports, or consecutive whole words of them. "NVIDIA H20" matches "NVIDIA H20",
        but not "NVIDIA H20-3e".

    Raises HardwareError for a size or rate that is not positive.
    """

    name: str
    device_names: tuple[str, ...]
    arch: str
    num_sms: int
    l2_bytes: int
    smem_per_sm_bytes: int
    hbm_bytes_per_s: float
    fp8_flops: float | None
    bf16_flops: float
    source: str
    measured_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for what in ("num_sms", "l2_bytes", "smem_per_sm_bytes", "hbm_bytes_per_s", "bf16_flops"):
            if getattr(self, what) <= 0:
                raise HardwareError(f"hardware {self.name!r}: {what} must be positive, not {getattr(self, what)!r}")
        if self.measured_bytes_per_s is not None and not 0 < self.measured_bytes_per_s <= self.hbm_bytes_per_s:
            raise HardwareError(
                f"hardware {self.name!r}: measured_bytes_per_s must lie between 0 and hbm_bytes_per_s, "
                f"not {self.measured_bytes_per_s!r}"
            )

    @property
    def read_bytes_per_s(self) -> float:
        """The rate at which weights are read from memory at best: measured, or READ_SHARE of the data sheet's."""
        return self.measured_bytes_per_s or READ_SHARE * self.hbm_bytes_per_s

    @property
    def vendor(self) -> str:
        return "AMD" if self.arch.startswith("gfx") else "NVIDIA"

    def peak_flops(self, dtype: str) -> float | None:
        """Dense peak in FLOP/s for weights of a format; None if there is none. fp16 runs at the bf16 rate.

        It is that of the activations: kernels multiply 4-bit weights as bf16 unless activations may be rounded.
        """
        return self.fp8_flops if FORMATS[dtype].rounds else self.bf16_flops


def identify(known: Iterable[Hardware], device_name: str, num_sms: int | None = None) -> Hardware:
    """The constants of the GPU that reports `device_name` and `num_sms` (None if unknown).

    The longest matching entry of `device_names` wins. Raises HardwareError for an unknown GPU, and if the number of SMs
    differs: costs measured on a whole GPU do not hold on a MIG slice.
    """
    known = list(known)
    found = _matches(known, device_name)
    if not found:
        related = ", ".join(h.name for h in _related(known, device_name))
        raise HardwareError(
            f"no constants for GPU {device_name!r}; register them with the ramp_moe_hardware hook, "
            f"or name the nearest device with --device{f', such as {related}' if related else ''}"
        )
    _check_sms(found[0], device_name, num_sms)
    return found[0]


def reported_as(known: Iterable[Hardware], device_name: str) -> Hardware | None:
    """The known GPU that reports `device_name`; None if there is none, or several."""
    found = _matches(known, device_name)
    return found[0] if len(found) == 1 else None


def confirm(
    hardware: Hardware, known: Iterable[Hardware], device_name: str, num_sms: int | None = None, arch: str | None = None
) -> Hardware:
    """Check `hardware`, which the user named, against what the GPU reports (None if unknown), and return it.

    Raises HardwareError if the reported name belongs to another GPU in `known`, or if `num_sms` or `arch` differ.
    """
    found = _matches(known, device_name)
    if found and hardware not in found:
        raise HardwareError(
            f"this machine's GPU is {found[0].name} ({device_name}), not {hardware.name}; "
            f"name --device {found[0].name}, or choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    _check_sms(hardware, device_name, num_sms)
    if arch not in (None, hardware.arch):
        raise HardwareError(
            f"GPU {device_name!r} is {arch}, {hardware.name} is {hardware.arch}; "
            "register it under its own name with the ramp_moe_hardware hook"
        )
    return hardware


def _matches(known: Iterable[Hardware], device_name: str) -> list[Hardware]:
    """The known GPUs with the longest name that the reported one contains in whole words."""
    words = f" {' '.join(device_name.lower().split())} "
    found = [(len(n), h) for h in known for n in h.device_names if f" {n.lower()} " in words]
    longest = max((length for length, _ in found), default=0)
    return [h for length, h in found if length == longest]


def _related(known: Iterable[Hardware], device_name: str) -> list[Hardware]:
    """The known GPUs that share the model's designation ("H100", "A100"): a word of letters and then digits."""
    model = _designations(device_name)
    return [h for h in known if any(model & _designations(n) for n in h.device_names)]


def _designations(device_name: str) -> set[str]:
    words = re.split(r"[\s-]+", device_name.upper())
    return {w for w in words if re.fullmatch(r"[A-Z]+[0-9]+[A-Z]*", w) and not re.match(r"HBM|GDDR|SXM", w)}


def _check_sms(hardware: Hardware, device_name: str, num_sms: int | None) -> None:
    if num_sms not in (None, hardware.num_sms):
        raise HardwareError(
            f"GPU {device_name!r} reports {num_sms} SMs where {hardware.name} has {hardware.num_sms} "
            "(a MIG slice?); register it under its own name with the ramp_moe_hardware hook"
        )
