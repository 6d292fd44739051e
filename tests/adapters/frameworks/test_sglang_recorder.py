"""Recording what SGLang's layers route: by a variable or at run time, and by one of the ranks that route alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.layers.moe.moe_runner")

import torch
from moe_cases import batch, weights
from ramp_moe import expert_histogram, load_trace
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.spec.launchable import Batch
from ramp_moe_adapters.frameworks import sglang
from ramp_moe_adapters.frameworks.sglang import model as whole
from ramp_moe_adapters.frameworks.sglang import recorder
from ramp_moe_adapters.frameworks.sglang import runner as plugin
from ramp_moe_adapters.frameworks.switches import RECORD
from sglang_cases import Experts, selected

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the sampling itself is tested with vLLM's layers")
E, K, H, I = 8, 2, 128, 128  # noqa: E741


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plugin, "_builder", Builder("h200"))
    monkeypatch.setattr(plugin, "_said", set())
    monkeypatch.setattr(recorder.recording, "current", None)
    monkeypatch.setattr(recorder, "captured", True)
    monkeypatch.setattr(recorder, "sglangs_rank", recorder._rank, raising=False)
    monkeypatch.setattr(recorder, "_rank", lambda: "")
    with selected(chunked_prefill_size=4):
        yield
    if recorder.recording.current is not None:
        recorder.recording.current.close()


def made() -> Experts:
    return Experts(weights(E, H, I, "fp16", "cpu"), K)


def loaded(experts: Experts) -> None:
    text = SimpleNamespace(hf_text_config=SimpleNamespace(num_experts_per_tok=K), dtype=torch.float16)
    module = torch.nn.ModuleList([experts.layer])
    whole.loaded(None, SimpleNamespace(model=module, model_config=text, decode_num_tokens_per_req=lambda: 1))


def given(tokens: int = 3) -> Batch:
    return batch(tokens, K, E, H, "uniform", "cpu", torch.float16)


def batches(path: Path) -> list[tuple[int, list[int]]]:
    return [(b.tokens, b.histogram.tolist()) for b in load_trace(path).batches]


def wanted(b: Batch) -> tuple[int, list[int]]:
    return b.num_tokens, expert_histogram(b.topk_ids.numpy(), E).tolist()


def current() -> Any:
    return recorder.recording.current


def test_a_variable_turns_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(RECORD, str(tmp_path / "trace.jsonl"))
    experts, b = made(), given()
    loaded(experts)
    experts(b)
    current().close()
    assert batches(tmp_path / "trace.jsonl") == [wanted(b)]


def test_it_is_off_by_default_and_turned_on_at_run_time(tmp_path: Path) -> None:
    experts, b = made(), given()
    loaded(experts)
    experts(b)
    assert current() is None
    sglang.record(tmp_path / "trace.jsonl")
    experts(b)
    current().flush()
    assert batches(tmp_path / "trace.jsonl") == [wanted(b)]


def test_nothing_is_read_before_graphs_are_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorder, "captured", False)
    experts = made()
    sglang.record(tmp_path / "trace.jsonl")
    experts(given())
    current().flush()
    assert not (tmp_path / "trace.jsonl").exists()
    whole.captured(None, SimpleNamespace(model=torch.nn.ModuleList([experts.layer])))
    current().flush()
    assert (tmp_path / "trace.jsonl").exists()


@pytest.mark.parametrize(
    ("places", "suffix"),
    [
        ({}, ""),
        ({"tp_rank": 1}, None),
        ({"pp_rank": 2}, ".stage2"),
        ({"dp_rank": 1, "pp_rank": 2}, ".replica1.stage2"),
        ({"moe_ep_size": 2}, None),
    ],
)
def test_which_ranks_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, places: dict[str, int], suffix: str | None
) -> None:
    here = {"tp_rank": 0, "pp_rank": 0, "dp_rank": None, "moe_ep_size": 1} | places
    monkeypatch.setattr(recorder, "get_parallel", lambda: SimpleNamespace(**here))
    assert recorder.sglangs_rank() == suffix  # type: ignore[attr-defined]
    assert ("nothing is recorded under expert parallelism" in caplog.text) is ("moe_ep_size" in places)


def test_ranks_that_are_not_known_cost_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def fails() -> Any:
        raise AttributeError("no such place")

    monkeypatch.setattr(recorder, "_rank", fails)
    with caplog.at_level("INFO", "ramp_moe"):
        sglang.record(tmp_path / "trace.jsonl")
    assert caplog.messages == [f"{RECORD}: nothing is sampled: AttributeError: no such place"]
    assert current() is None
