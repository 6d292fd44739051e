"""Third-party kernels as they are described here, and on a GPU as they run, keep the library's contract."""

from __future__ import annotations

import pytest
from ramp_moe import MoEShape
from ramp_moe.testing import KernelConformance
from ramp_moe_adapters.kernels.alpha_moe.kernel import AlphaMoE
from ramp_moe_adapters.kernels.deep_gemm.kernel import DeepGEMM
from ramp_moe_adapters.kernels.flashinfer_cutlass.kernel import FlashInferCutlass
from ramp_moe_adapters.kernels.humming.kernel import Humming
from ramp_moe_adapters.kernels.marlin.kernel import Marlin
from ramp_moe_adapters.kernels.vllm_triton.kernel import VllmTriton


class TestAlphaMoE(KernelConformance):
    """Without the package, and without Hopper, only its description; so below."""

    kernel = AlphaMoE()


@pytest.mark.gpu
class TestAlphaMoEOnGpu(KernelConformance):
    kernel = AlphaMoE()
    configs = 0


class TestDeepGEMM(KernelConformance):
    kernel = DeepGEMM()


class TestFlashInferCutlass(KernelConformance):
    kernel = FlashInferCutlass()
    shapes = (MoEShape(64, 8, 2048, 1024, "bf16"), MoEShape(64, 8, 2048, 1024, "fp8"))


@pytest.mark.gpu
class TestFlashInferCutlassOnGpu(TestFlashInferCutlass):
    configs = 0


class TestHumming(KernelConformance):
    kernel = Humming()
    shapes = tuple(MoEShape(64, 8, 2048, 1024, name) for name in ("int4-g32", "mxfp4-a8", "fp8"))


class TestMarlin(KernelConformance):
    kernel = Marlin()
    shapes = tuple(MoEShape(64, 8, 2048, 1024, name) for name in ("int4-g32", "mxfp4"))


class TestVllmTriton(KernelConformance):
    kernel = VllmTriton()
