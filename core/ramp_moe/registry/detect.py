"""Finding out which GPU this is."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import HardwareError
from ..spec.hardware import Hardware, confirm, identify


def detect(known: Iterable[Hardware] | None = None, index: int = 0, named: Hardware | None = None) -> Hardware:
    """Find the constants of CUDA (or ROCm) device `index`, read through torch, in `known` (the registry if None).

    `named` is what the user says that the GPU is. It is returned unless the GPU contradicts (see `confirm`). Raises
    HardwareError if there is no such GPU, no constants for it, or it is not the one named.
    """
    if known is None:
        from .registry import get_registry

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
    if named is None:
        return identify(known, properties.name, properties.multi_processor_count)
    # On NVIDIA's GPUs gcnArchName is the device's name.
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return confirm(named, known, properties.name, properties.multi_processor_count, arch)
