"""Third-party kernels as they are described here, and on a GPU as they run, keep the library's contract."""

from __future__ import annotations

import pytest
from ramp_moe.testing import KernelConformance
from ramp_moe_adapters.alpha_moe import AlphaMoE
from ramp_moe_adapters.vllm_triton import VllmTriton


class TestAlphaMoE(KernelConformance):
    """Without the package, and without Hopper, only its description."""

    kernel = AlphaMoE()


@pytest.mark.gpu
class TestAlphaMoEOnGpu(KernelConformance):
    kernel = AlphaMoE()
    configs = 0


class TestVllmTriton(KernelConformance):
    kernel = VllmTriton()
