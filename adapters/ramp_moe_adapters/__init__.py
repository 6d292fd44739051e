"""Third-party MoE kernels, each described by its grid in a file of its own, and launched as they are installed; and the
frameworks whose MoE layers can be wrapped."""

from __future__ import annotations

from collections.abc import Iterable

from ramp_moe import ExpertsAdapter, Kernel, hookimpl

from .alpha_moe import AlphaMoE
from .deep_gemm import DeepGEMM
from .flashinfer_cutlass import FlashInferCutlass
from .transformers_experts import TransformersExperts
from .vllm_triton import VllmTriton


@hookimpl
def ramp_moe_kernels() -> Iterable[Kernel]:
    yield AlphaMoE()
    yield DeepGEMM()
    yield FlashInferCutlass()
    yield VllmTriton()


@hookimpl
def ramp_moe_experts() -> Iterable[ExpertsAdapter]:
    yield TransformersExperts()
