"""What constants say of a layer's time: its least, and how two GPUs compare (step 10 of `formula`).

No layer takes less time than reading its active experts' weights from memory once. Profiles are measured with a cold
L2, so that all of them come from memory. The fastest of all recorded times reads them within 2% of the GPU's rate;
`tests/core/cost_model/test_roofline.py` compares each of them.
"""

from __future__ import annotations

import numpy as np

from ..spec.hardware import Hardware
from ..spec.routing import FloatArray
from ..spec.shapes import MoEShape
from .regions import ACHIEVED_PEAK


def expert_read_us(shape: MoEShape, hardware: Hardware) -> float:
    """Microseconds in which one active expert's weights are read at the device's `read_bytes_per_s`."""
    return shape.expert_bytes / hardware.read_bytes_per_s * 1e6


def id_product_us(shape: MoEShape, hardware: Hardware) -> float:
    """Microseconds in which one routed id is multiplied with an expert's weights at ACHIEVED_PEAK."""
    peak = hardware.peak_flops(shape.dtype) or hardware.bf16_flops
    return 6 * shape.hidden_size * shape.intermediate_size / (ACHIEVED_PEAK * peak) * 1e6


def roofline_ratio(
    shape: MoEShape, measured_on: Hardware, hardware: Hardware, ids: FloatArray, active: FloatArray
) -> FloatArray:
    """How much longer batches take on `hardware` than on the GPU that was measured.

    It is the ratio of the times to read the active experts and then to multiply the routed ids. ids, active: of each
    batch; a batch without tokens counts as one of one id.
    """
    here, there = (
        np.maximum(active, 1) * expert_read_us(shape, gpu) + np.maximum(ids, 1) * id_product_us(shape, gpu)
        for gpu in (hardware, measured_on)
    )
    return np.asarray(here / there)
