"""The Triton path keeps the library's contract: a few configurations in the interpreter, many on a GPU."""

from __future__ import annotations

import pytest
from ramp_moe import MoEShape, get_registry
from ramp_moe.testing import KernelConformance
from ramp_moe_kernels.triton.kernel import TritonMoE

MODEL = "olmoe-1b-7b"


@pytest.mark.slow
class TestTriton(KernelConformance):
    kernel = TritonMoE()
    launch_shape = MoEShape(6, 2, 128, 128, "fp8")
    configs = 1


@pytest.mark.gpu
class TestTritonOnGpu(KernelConformance):
    kernel = TritonMoE()
    shapes = tuple(get_registry().shape(MODEL, dtype) for dtype in kernel.formats if not dtype.endswith("-a8"))
    configs = 12
