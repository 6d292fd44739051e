"""Adapters for third-party MoE kernels, and for frameworks whose MoE layers can be replaced.

A kernel's adapter describes its grids and launches the installed package.
"""

from __future__ import annotations

from collections.abc import Iterable

from ramp_moe import Diagnostic
from ramp_moe.plugin import ExpertsAdapter, Kernel, hookimpl

from .frameworks import sglang, vllm
from .frameworks.transformers.experts import TransformersExperts
from .kernels.alpha_moe.kernel import AlphaMoE
from .kernels.deep_gemm.kernel import DeepGEMM
from .kernels.flashinfer_cutlass.build import cache
from .kernels.flashinfer_cutlass.kernel import FlashInferCutlass
from .kernels.humming import package as humming
from .kernels.humming.kernel import Humming
from .kernels.marlin.kernel import Marlin
from .kernels.vllm_triton.kernel import VllmTriton


@hookimpl
def ramp_moe_kernels() -> Iterable[Kernel]:
    yield AlphaMoE()
    yield DeepGEMM()
    yield FlashInferCutlass()
    yield Humming()
    yield Marlin()
    yield VllmTriton()


@hookimpl
def ramp_moe_experts() -> Iterable[ExpertsAdapter]:
    yield TransformersExperts()


@hookimpl
def ramp_moe_diagnostics() -> Iterable[Diagnostic]:
    yield from vllm.diagnostics()
    yield from sglang.diagnostics()
    yield Diagnostic("cache", "what FlashInfer compiled", str(cache()))
    yield Diagnostic("cache", "what Humming compiled", str(humming.cache()))
