"""Hardware constants that the geometry and the performance regions need, and finding out which GPU this is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import HardwareError


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU model. Peaks are dense (no sparsity), from the vendor's data sheet named in `source`.

    `num_sms` counts streaming multiprocessors (compute units on AMD); `l2_bytes` the L2 that all of them share a view
    of; `smem_per_sm_bytes` shared memory (LDS) a multiprocessor; `fp8_flops` is None where the GPU has no fp8 units.
    `device_names` are the names that the driver reports, or whole words of them in a row: "NVIDIA H20" is the name of
    an "NVIDIA H20", but not of an "NVIDIA H20-3e".
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

    def __post_init__(self) -> None:
        for what in ("num_sms", "l2_bytes", "smem_per_sm_bytes", "hbm_bytes_per_s", "bf16_flops"):
            if getattr(self, what) <= 0:
                raise HardwareError(f"hardware {self.name!r}: {what} must be positive, not {getattr(self, what)!r}")

    @property
    def vendor(self) -> str:
        return "AMD" if self.arch.startswith("gfx") else "NVIDIA"

    def peak_flops(self, dtype: str) -> float | None:
        """Dense peak in FLOP/s for a weight dtype (fp16 runs at the bf16 rate)."""
        return self.fp8_flops if dtype == "fp8" else self.bf16_flops


def identify(known: Iterable[Hardware], device_name: str, num_sms: int | None = None) -> Hardware:
    """The constants of a GPU that reports `device_name` and `num_sms` (None if who asked could not tell).

    The longest matching entry of `device_names` wins. Raises HardwareError for an unknown GPU, and for one whose SM
    count differs (a MIG slice: costs measured on the whole GPU do not hold there).
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


def confirm(
    hardware: Hardware, known: Iterable[Hardware], device_name: str, num_sms: int | None = None, arch: str | None = None
) -> Hardware:
    """`hardware`, which somebody named for the GPU that reports these (None if who asked could not tell).

    Raises HardwareError if it cannot be that: the name is another's in `known`, or `num_sms` or `arch` differ.
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
    """Those with the longest name that the reported one contains in whole words."""
    words = f" {' '.join(device_name.lower().split())} "
    found = [(len(n), h) for h in known for n in h.device_names if f" {n.lower()} " in words]
    longest = max((length for length, _ in found), default=0)
    return [h for length, h in found if length == longest]


def _related(known: Iterable[Hardware], device_name: str) -> list[Hardware]:
    """Those that share the model's designation ("H100", "A100"), a word of letters and digits that is no size."""
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
