"""Hardware constants that the geometry and the performance regions need, and finding out which GPU this is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import HardwareError


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU model. Peaks are dense (no sparsity), from the vendor's data sheet named in `source`.

    `num_sms` counts streaming multiprocessors (compute units on AMD); `l2_bytes` the L2 that all of them share a view
    of; `smem_per_sm_bytes` shared memory (LDS) a multiprocessor; `fp8_flops` is None where the GPU has no fp8 units.
    `device_names` are the names that the driver reports, matched as substrings.
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

    def peak_flops(self, dtype: str) -> float | None:
        """Dense peak in FLOP/s for a weight dtype (fp16 runs at the bf16 rate)."""
        return self.fp8_flops if dtype == "fp8" else self.bf16_flops


def identify(known: Iterable[Hardware], device_name: str, num_sms: int | None = None) -> Hardware:
    """The constants of a GPU that reports `device_name` and `num_sms` (None: who asked could not tell).

    The longest matching entry of `device_names` wins. Raises HardwareError for an unknown GPU, and for one whose SM
    count differs (a MIG slice: costs measured on the whole GPU do not hold there).
    """
    matches = [(len(n), h) for h in known for n in h.device_names if n.lower() in device_name.lower()]
    if not matches:
        raise HardwareError(
            f"no constants for GPU {device_name!r}; register them with the ramp_moe_hardware hook, "
            "or name the nearest device with --device"
        )
    hardware = max(matches, key=lambda m: m[0])[1]
    if num_sms is not None and hardware.num_sms != num_sms:
        raise HardwareError(
            f"GPU {device_name!r} reports {num_sms} SMs where {hardware.name} has {hardware.num_sms} "
            "(a MIG slice?); register it under its own name with the ramp_moe_hardware hook"
        )
    return hardware


def detect(known: Iterable[Hardware] | None = None, index: int = 0) -> Hardware:
    """The constants of CUDA (or ROCm) device `index`, read through torch, out of `known` (the registry, where None).

    Raises HardwareError where there is no such GPU, or no constants for it.
    """
    if known is None:
        from .plugins import get_registry

        known = get_registry().hardware.values()
    try:
        import torch
    except ImportError:
        raise HardwareError(
            "detecting the GPU needs torch: pip install 'ramp-moe[torch]', or name it with --device"
        ) from None
    if not torch.cuda.is_available():
        raise HardwareError("torch sees no GPU on this machine; name the device with --device")
    if index >= torch.cuda.device_count():
        raise HardwareError(f"there is no GPU {index}: torch sees {torch.cuda.device_count()}")
    properties = torch.cuda.get_device_properties(index)
    return identify(known, properties.name, properties.multi_processor_count)
