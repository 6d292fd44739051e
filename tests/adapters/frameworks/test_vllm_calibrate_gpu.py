"""Measuring vLLM's layers on a GPU: times are times, faults are found, and vLLM's own path is computed as vLLM does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, error, expected, weights
from ramp_moe.measurements.calibration_file import records
from ramp_moe.runtime.calibration import ENGINE
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import engine_calibration
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_kernels.triton.kernel import TritonMoE
from vllm.model_executor.custom_op import op_registry_oot
from vllm_cases import experts_of, run, said_by_plugin, serve

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, HIDDEN, INTER = 16, 4, 512, 256
COMPUTED = {"bf16": 2e-2, "fp8": 0.07}
"""Errors of vLLM's own path against float32. In fp8 it rounds the intermediate to bf16 first, unlike the reference."""
SIZES = {"moe_options": {"max_num_tokens": 512}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a process that has just started, with an empty cache."""
    monkeypatch.setenv(plugin.SWITCH, "1")
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", "60")
    plugin.register()
    serve(monkeypatch)
    monkeypatch.setattr(engine_calibration, "usable_kernels", lambda *_: [TritonMoE()])
    yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture
def said() -> Iterator[list[str]]:
    with said_by_plugin() as found:
        yield found


def layer(dtype: str) -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, dtype, "cuda")


def given(tokens: int) -> Batch:
    found = batch(tokens, TOP_K, EXPERTS, HIDDEN, "skewed", "cuda", torch.bfloat16)
    return Batch(found.hidden_states, found.topk_ids.clamp(0, EXPERTS - 1), found.topk_weights)


def wanted(of: MoEWeights, b: Batch) -> torch.Tensor:
    return expected(of, b, quantise=of.gate_up_scale is not None)


def experts(routed: Any) -> Any:
    return routed.quant_method.moe_kernel.fused_experts


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_layer_is_measured(dtype: str, said: list[str]) -> None:
    of = layer(dtype)
    routed = experts_of(of, TOP_K, **SIZES)
    (record,) = records()
    assert record.complete
    assert not record.dropped
    assert {t.tokens for t in record.timings if t.candidate == ENGINE} == {2**i for i in range(10)}
    assert all(1 < t.us < 5000 for t in record.timings)
    assert any("what computes batches of how many tokens" in line for line in said)
    for tokens in (1, 33, 512):
        b = given(tokens)
        assert error(run(routed, b), wanted(of, b)) < 2e-2


@pytest.mark.parametrize("how", ["alone", "tp", "ep"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_sizes_that_vllm_keeps_are_computed_by_its_own_experts(
    dtype: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager and in a graph; the ranks add up."""
    from ramp_moe.runtime.calibration import Calibration

    monkeypatch.setattr(Calibration, "engine_keeps", lambda self, n, ours: True)
    of, b = layer(dtype), given(48)
    ranks = [{}] if how == "alone" else [{how: (2, rank)} for rank in range(2)]
    total = torch.zeros(b.hidden_states.shape, dtype=torch.float32, device="cuda")
    for rank in ranks:
        routed = experts_of(of, TOP_K, **SIZES, **rank)
        monkeypatch.setattr(experts(routed).layer, "forward", lambda *_, **__: 1 / 0)
        eager = run(routed, b)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            run(routed, b)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                out = run(routed, b)
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, eager.float()) < 1e-2
        total += eager.float()
    assert error(total, expected(of, b, quantise=False)) < COMPUTED[dtype]


class Planted(TritonMoE):
    """The first configuration that runs goes wrong, as `how` says."""

    name = "planted"

    def __init__(self, how: str) -> None:
        self.how, self.first = how, ""

    def run(self, config: Any, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Any) -> Any:
        self.first = self.first or config.name
        if config.name == self.first:
            if self.how == "raises":
                raise RuntimeError("planted")
            if self.how == "no memory":
                raise torch.OutOfMemoryError("planted")
            out.fill_(float("nan"))
            return None
        return super().run(config, prepared, batch, out, workspace)


@pytest.mark.parametrize("how", ["raises", "no memory", "returns NaN"])
def test_a_planted_kernel_is_dropped_with_its_name(how: str, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    planted = Planted(how)
    monkeypatch.setattr(engine_calibration, "usable_kernels", lambda *_: [TritonMoE(), planted])
    of, b = layer("bf16"), given(33)
    routed = experts_of(of, TOP_K, **SIZES)
    (record,) = records()
    assert list(record.dropped) == [f"planted/{planted.first}"]
    assert any(f"left out: planted/{planted.first}: " in line for line in said)
    assert error(run(routed, b), wanted(of, b)) < 2e-2


def test_memory_is_given_back() -> None:
    of = layer("bf16")
    routed = experts_of(of, TOP_K, **SIZES)
    torch.cuda.synchronize()
    size = sum(p.numel() * p.element_size() for p in routed.parameters())
    assert torch.cuda.memory_reserved() < torch.cuda.memory_allocated() + 64 * 2**20
    assert torch.cuda.memory_allocated() < 2 * size + 512 * 2**20
