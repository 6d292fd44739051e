"""Measuring SGLang's layers when a model is loaded: which sizes its own runner keeps, what is said, and what is shared.

The code is that of vLLM's plugin, whose tests are in test_vllm_calibrate.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.layers.moe.moe_runner")

import torch
from moe_cases import batch, error, expected, weights
from ramp_moe.measurements.calibration_file import records
from ramp_moe.runtime.calibration import ENGINE
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe.spec.routing import IntArray
from ramp_moe_adapters.frameworks import engine_calibration as engine
from ramp_moe_adapters.frameworks import engine_timer
from ramp_moe_adapters.frameworks.engine_timer import TIMERS
from ramp_moe_adapters.frameworks.sglang import calibrate
from ramp_moe_adapters.frameworks.sglang import model as whole
from ramp_moe_adapters.frameworks.sglang import runner as plugin
from ramp_moe_kernels.triton.kernel import TritonMoE
from sglang.srt.layers.moe.moe_runner.base import FusedOpPool
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang_cases import Experts, selected

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with made-up times; others are measured there")
E, K, H, I = 8, 2, 128, 128  # noqa: E741
CHUNK = 64
HALF = torch.float16
Us = Callable[[str, int], float]


class Times:
    """A timer: `us` says what a name takes at a number of tokens."""

    def __init__(self, us: Us) -> None:
        self.us, self.asked = us, list[tuple[str, int]]()

    def time(self, candidate: Any, topk_ids: IntArray) -> float:
        name = ENGINE if candidate is None else candidate.name
        self.asked.append((name, len(topk_ids)))
        return self.us(name, len(topk_ids))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Us], Times]]:
    """As in a process that has just started; call it with the times that are measured."""
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "usable_kernels", lambda shape, hardware: [TritonMoE()])
    monkeypatch.setattr(engine, "warm", lambda layer, candidates, *_: {})
    monkeypatch.setattr(plugin, "_builder", Builder("h200"))
    monkeypatch.setattr(plugin, "_said", set())

    def start(us: Us) -> Times:
        timer = Times(us)
        monkeypatch.setitem(TIMERS, "cpu", lambda *_: timer)
        return timer

    with selected(chunked_prefill_size=CHUNK):
        yield start


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that SGLang's own runner computes, with the reference."""
    calls: list[int] = []

    def fused(dispatched: Any, info: Any, config: Any) -> standard.StandardCombineInput:
        x, topk = dispatched.hidden_states, dispatched.topk_output
        calls.append(len(x))
        of = MoEWeights(gate_up=info.w13_weight.detach(), down=info.w2_weight.detach())
        here = Batch(x, topk.topk_ids.int(), topk.topk_weights.float())
        return standard.StandardCombineInput(expected(of, here, quantise=False).to(x.dtype))

    monkeypatch.setitem(FusedOpPool._fused_funcs, ("none", "triton"), fused)
    return calls


def layer() -> MoEWeights:
    return weights(E, H, I, "fp16", "cpu")


def loaded(*experts: Experts) -> Any:
    """A model runner of SGLang's that has loaded a model of these layers."""
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_experts_per_tok=K), dtype=HALF)
    modules = torch.nn.ModuleList([e.layer for e in experts])
    runner = SimpleNamespace(model=modules, model_config=config, decode_num_tokens_per_req=lambda: 1)
    whole.loaded(None, runner)
    return runner


def core(experts: Experts) -> Any:
    return experts.runner.runner_core


def large_are_sglangs(name: str, tokens: int) -> float:
    """Its own runner is faster from 16 tokens on."""
    return 10.0 if name != ENGINE else 20.0 if tokens < 16 else 5.0


def test_sglang_keeps_the_sizes_at_which_nothing_is_faster(
    server: Any, stock: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    timer, of = server(large_are_sglangs), layer()
    experts = [Experts(of, K) for _ in range(2)]
    with caplog.at_level(logging.INFO, "ramp_moe"):
        runner = loaded(*experts)
        whole.captured(None, runner)
    assert {n for _, n in timer.asked} == {1, 2, 4, 8, 16, 32, 64}
    for one in experts:
        stock.clear()
        for tokens in (1, 8, 16, 64):
            given = batch(tokens, K, E, H, "skewed", "cpu", HALF)
            assert error(one(given), expected(of, given, quantise=False)) < 2e-2
        assert stock == [16, 64]
    (table,) = [line for line in caplog.messages if "what computes batches" in line]
    rows = [row.split() for row in table.splitlines()[1:]]
    assert rows[0] == ["tokens", "kernel", "mode", "bodies", "predicted", "measured", "SGLang", "histogram"]
    assert [row[0] for row in rows[1:]] == ["1-8", "16-64"], table
    assert any("SGLang's own path keeps " in line and "nothing is 2% faster" in line for line in caplog.messages)
    (record,) = records()
    assert record.complete
    assert record.key["engine"] == "SGLang"
    assert record.plan


def test_a_later_server_reads_what_was_measured(server: Any) -> None:
    server(large_are_sglangs)
    loaded(Experts(layer(), K))
    again, experts = server(lambda *_: 1.0), Experts(layer(), K)
    loaded(experts)
    assert not again.asked
    assert core(experts)._keeps(64)
    assert not core(experts)._keeps(1)


def test_new_weights_count_on_both_paths(server: Any, stock: list[int]) -> None:
    """Sizes that SGLang's runner keeps, and ours."""
    server(large_are_sglangs)
    of = layer()
    experts, new = (
        Experts(of, K),
        replace(of, gate_up=of.gate_up.flip(0).contiguous(), down=of.down.flip(0).contiguous()),
    )
    loaded(experts)
    experts.layer.w13_weight.data.copy_(new.gate_up)
    experts.layer.w2_weight.data.copy_(new.down)
    for tokens, theirs in ((4, []), (32, [32])):
        stock.clear()
        given = batch(tokens, K, E, H, "uniform", "cpu", HALF)
        assert error(experts(given), expected(new, given, quantise=False)) < 2e-2
        assert stock == theirs


def test_a_batch_of_ours_that_fails_is_sglangs(server: Any, stock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    server(large_are_sglangs)
    of = layer()
    experts, given = Experts(of, K), batch(4, K, E, H, "uniform", "cpu", HALF)
    loaded(experts)
    monkeypatch.setattr(core(experts).layer, "forward", lambda *_, **__: 1 / 0)
    assert error(experts(given), expected(of, given, quantise=False)) < 2e-2
    assert stock == [4]


def test_if_nothing_can_be_timed_sglang_has_the_layer(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    def us(name: str, tokens: int) -> float:
        if name == ENGINE:
            return 10.0
        raise RuntimeError("planted")

    server(us)
    experts = [Experts(layer(), K) for _ in range(2)]
    loaded(*experts)
    assert not any(core(one).made for one in experts)
    assert len([line for line in caplog.messages if line.startswith("nothing could be timed (")]) == 1


def test_it_can_be_turned_off(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", "0")
    timer, experts = server(large_are_sglangs), Experts(layer(), K)
    loaded(experts)
    assert core(experts).made
    assert core(experts)._keeps is None
    assert not timer.asked


class HostTimer:
    """Runs what a GPU would time, and compares it with the reference."""

    def __init__(self, launch: Any, of: MoEWeights, dtype: Any, local: Any, safe: Any) -> None:
        self._launch, self._of, self._local, self._safe = launch, of, local, safe

    def time(self, candidate: Any, topk_ids: IntArray) -> float:
        assert self._safe(candidate)
        x = torch.randn(len(topk_ids), H, dtype=torch.float32).to(HALF)
        ids = torch.tensor(topk_ids, dtype=torch.int32)
        out, given = torch.full_like(x, float("nan")), Batch(x, ids, torch.full(ids.shape, 0.5, dtype=torch.float32))
        self._launch(candidate, given, out)
        if candidate is not None:
            here = Batch(x, self._local(ids).int().contiguous(), given.topk_weights)
            assert error(out, expected(self._of, here, quantise=False)) < 2e-2
        return 10.0


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_timed_is_what_computes(
    server: Any, monkeypatch: pytest.MonkeyPatch, stock: list[int], rank: int
) -> None:
    """Ids of all experts become the rank's own, for ours and for SGLang's."""
    server(large_are_sglangs)
    monkeypatch.setattr(calibrate, "_group", lambda: None)
    monkeypatch.setattr(engine_timer, "GraphTimer", HostTimer)
    monkeypatch.setitem(TIMERS, "cpu", engine_timer._gpu_timer)
    with selected(ranks=2, rank=rank, chunked_prefill_size=1):
        loaded(Experts(layer(), K))
    (record,) = records()
    assert record.key["ep_size"] == "2"
    assert not record.dropped
    assert set(stock) == {1}


def test_the_sizes_of_graphs_are_those_of_sglang(server: Any) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    def phase(backend: str, bs: list[int]) -> Any:
        return SimpleNamespace(backend=backend, bs=bs)

    runner = SimpleNamespace(decode_num_tokens_per_req=lambda: 3)
    for off, found in ((Backend.BREAKABLE, (3, 6, 100)), (Backend.DISABLED, (3, 6))):
        graphs = SimpleNamespace(decode=phase(Backend.FULL, [1, 2]), prefill=phase(off, [100]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibrate, "get_exec", lambda graphs=graphs: SimpleNamespace(
                graph=SimpleNamespace(cuda_graph_config=graphs)))  # fmt: skip
            assert calibrate._captured(runner) == found
