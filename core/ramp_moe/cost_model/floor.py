"""The least time that a whole layer can take: that of reading the weights of its active experts from memory once.

Profiles are measured with a cold L2, so that every active expert's weights come from memory. The fastest of all
recorded times reads them within 2% of this rate; `tests/core/cost_model/test_floor.py` compares each of them.
"""

from __future__ import annotations

from ..spec.hardware import Hardware
from ..spec.shapes import MoEShape


def expert_read_us(shape: MoEShape, hardware: Hardware) -> float:
    """Microseconds in which one active expert's weights are read at the device's `read_bytes_per_s`."""
    return shape.expert_bytes / hardware.read_bytes_per_s * 1e6
