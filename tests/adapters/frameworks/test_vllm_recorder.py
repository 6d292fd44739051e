"""What vLLM's layers route, as a trace: on for a variable or at run time, and never the server's end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, weights
from ramp_moe import expert_histogram
from ramp_moe.measurements.trace import load_trace
from ramp_moe.spec.launchable import Batch
from ramp_moe_adapters.frameworks import engine_recorder
from ramp_moe_adapters.frameworks import vllm as plugin
from vllm.model_executor.custom_op import op_registry_oot
from vllm_cases import DEVICE, experts_of, run, serve

EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 128, 128
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        patch.setenv("RAMP_MOE_CALIBRATE_S", "0")
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ramp_moe_adapters.frameworks.vllm import recorder

    serve(monkeypatch)
    monkeypatch.setattr(recorder.recording, "current", None)
    monkeypatch.setattr(recorder, "vllms_state", recorder._started, raising=False)
    monkeypatch.setattr(recorder, "_started", lambda: True)
    monkeypatch.setattr(recorder, "captures", False)
    yield recorder
    if recorder.recording.current is not None:
        recorder.recording.current.close()


def routed(ep: tuple[int, int] = (1, 0)) -> Any:
    kind = "bf16" if DEVICE == "cuda" else "fp16"
    return experts_of(weights(EXPERTS, HIDDEN, INTER, kind, DEVICE), TOP_K, dtype=HALF, ep=ep)


def given(tokens: int) -> Batch:
    found = batch(tokens, TOP_K, EXPERTS, HIDDEN, "skewed", DEVICE, HALF)
    return Batch(found.hidden_states, found.topk_ids.clamp(0, EXPERTS - 1), found.topk_weights)


def batches(path: Path) -> list[tuple[int, list[int], float]]:
    return [(b.tokens, b.histogram.tolist(), b.runs) for b in load_trace(path).batches]


def histogram(b: Batch) -> list[int]:
    found: list[int] = expert_histogram(b.topk_ids.cpu().numpy(), EXPERTS).tolist()
    return found


def test_a_variable_turns_it_on(recorder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of all layers, in the ids of all ranks' experts."""
    path = tmp_path / "trace.jsonl"
    monkeypatch.setenv(plugin.RECORD, str(path))
    layers, b = [routed(), routed(ep=(2, 1))], given(6)
    for layer in layers:
        run(layer, b)
    recorder.recording.current.close()
    assert batches(path) == [(6, histogram(b), 1.0)] * 2
    assert load_trace(path).num_experts == EXPERTS


def test_it_is_off_by_default(recorder: Any) -> None:
    run(routed(), given(3))
    assert recorder.recording.current is None


def test_it_is_turned_on_at_run_time(recorder: Any, tmp_path: Path) -> None:
    layer, b = routed(), given(3)
    run(layer, b)
    plugin.record(tmp_path / "trace.jsonl")
    for _ in range(2):
        run(layer, b)
    recorder.recording.current.flush()
    assert batches(tmp_path / "trace.jsonl") == [(3, histogram(b), 1.0)] * 2
    plugin.record(tmp_path / "another.jsonl")
    run(layer, b)
    recorder.recording.current.flush()
    assert len(batches(tmp_path / "another.jsonl")) == 1


def test_samples_outlive_the_recorder_that_they_were_made_for(recorder: Any, tmp_path: Path) -> None:
    """Graphs that were captured meanwhile write to them at every replay: other tensors must not get the memory."""
    layer, b = routed(), given(3)
    plugin.record(tmp_path / "trace.jsonl")
    run(layer, b)
    ring = weakref.ref(recorder.recording.current._traffic._rings[0])
    plugin.record(tmp_path / "another.jsonl")
    run(layer, b)
    gc.collect()
    assert ring() is not None


@pytest.mark.parametrize("captures", [True, False])
def test_nothing_is_read_before_graphs_are_captured(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, captures: bool
) -> None:
    """If any are: vLLM then locks its workspaces."""
    from vllm.v1.worker.workspace import current_workspace_manager

    monkeypatch.setattr(recorder, "_started", recorder.vllms_state)
    layer = routed()
    monkeypatch.setattr(recorder, "captures", captures)
    plugin.record(tmp_path / "trace.jsonl")
    run(layer, given(3))
    recorder.recording.current.flush()
    assert (tmp_path / "trace.jsonl").exists() is not captures
    monkeypatch.setattr(current_workspace_manager(), "_locked", True)
    recorder.recording.current.flush()
    assert (tmp_path / "trace.jsonl").exists()


def test_a_file_that_cannot_be_written_costs_one_line(recorder: Any, tmp_path: Path) -> None:
    said: list[str] = []
    made = engine_recorder.TrafficRecorder("vLLM", tmp_path, lambda: True, said.append)
    made.sample(1, given(3).topk_ids, EXPERTS)
    made.flush()
    made.flush()
    made.close()
    assert said[1:] == [f"RAMP_MOE_RECORD: cannot write {tmp_path}: it is a folder; name a file"]


@pytest.mark.parametrize("what", ["layer", "sample"])
def test_a_batch_that_cannot_be_sampled_ends_no_server(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """The batch is computed, and one line says why."""
    said: list[str] = []
    layer, b = routed(), given(3)
    recorder.recording.current = engine_recorder.TrafficRecorder(
        "vLLM", tmp_path / "trace.jsonl", lambda: True, said.append
    )
    wanted = run(layer, b)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorder.recording.current = engine_recorder.TrafficRecorder(
        "vLLM", tmp_path / "trace.jsonl", lambda: True, said.append
    )
    said.clear()
    monkeypatch.setattr(engine_recorder.Traffic, what, fails)
    for _ in range(2):
        assert torch.equal(run(layer, b), wanted)
    assert said[-1] == "RAMP_MOE_RECORD: nothing more is sampled: OutOfMemoryError: CUDA out of memory"
    assert len([line for line in said if "nothing more" in line]) == 1


def test_layers_of_another_shape_are_left_out(recorder: Any, tmp_path: Path) -> None:
    said: list[str] = []
    made = engine_recorder.TrafficRecorder("vLLM", tmp_path / "trace.jsonl", lambda: True, said.append)
    b = given(3)
    made.sample(1, b.topk_ids, EXPERTS)
    for _ in range(2):
        made.sample(2, b.topk_ids, 2 * EXPERTS)
    made.close()
    assert batches(tmp_path / "trace.jsonl") == [(3, histogram(b), 1.0)]
    assert said[1:] == ["RAMP_MOE_RECORD: a layer of 16 experts, 2 a token, is left out: others came first"]


@pytest.mark.gpu
def test_graphs_are_sampled_at_every_replay(recorder: Any, tmp_path: Path) -> None:
    plugin.record(tmp_path / "trace.jsonl")
    layer, b = routed(), given(4)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        run(layer, b)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run(layer, b)
    for expert in range(3):
        b.topk_ids.fill_(expert)
        graph.replay()
    torch.cuda.synchronize()
    recorder.recording.current.close()
    found = [h for _, h, _ in batches(tmp_path / "trace.jsonl")]
    assert found[1:] == [[8 if e == expert else 0 for e in range(EXPERTS)] for expert in range(3)]
