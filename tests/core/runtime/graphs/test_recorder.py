"""What a layer routed and chose, from the device to `ramp-moe compare --trace`; interpreted where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from ramp_moe import Hardware, ProfileStore, Registry, load_trace
from ramp_moe.cli import main
from ramp_moe.errors import KernelError, ProfileError, RoutingError
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.runtime.graphs.cost_table import CostTable
from ramp_moe.runtime.graphs.recorder import Recorder
from ramp_moe.runtime.graphs.selector_triton import TritonSelector
from ramp_moe.spec.routing import expert_histogram
from select_cases import counted, routed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def put(recorder: Recorder, *entries: tuple[int, ...]) -> None:
    """As a kernel does."""
    for entry in entries:
        slot = int(recorder.counter) % recorder.slots
        recorder.ring[slot] = torch.tensor(entry, dtype=torch.int32)
        recorder.counter += 1


def test_read_in_order() -> None:
    recorder = Recorder(3, 2, 1, DEVICE)
    entries = [(i, i % 2, i, 0) for i in range(8)]
    for count in range(8):
        found = recorder.read()
        kept = entries[max(0, count - 3) : count]
        assert found.lost == max(0, count - 3)
        assert found.tokens.tolist() == [e[0] for e in kept]
        assert found.choices.tolist() == [e[1] for e in kept]
        assert found.histograms.tolist() == [list(e[2:]) for e in kept]
        put(recorder, entries[count])
    assert found.counts(["a", "b"]) == {"a": 2, "b": 1}


def test_reading_does_not_change() -> None:
    recorder = Recorder(2, 2, 1, DEVICE)
    put(recorder, (1, 0, 1, 0))
    before = recorder.read()
    put(recorder, (2, 1, 1, 1), (1, 1, 0, 1))
    assert before.tokens.tolist() == [1]
    assert before.histograms.tolist() == [[1, 0]]


def test_nothing_to_write(tmp_path: Path) -> None:
    recorder = Recorder(2, 2, 1, DEVICE)
    put(recorder, (0, 0, 0, 0))
    with pytest.raises(RoutingError, match="no batch with a token was recorded; run the layer first"):
        recorder.write(tmp_path / "t.jsonl", ["a"])
    put(recorder, (1, 0, 1, 0))
    with pytest.raises(ProfileError, match="cannot write"):
        recorder.write(tmp_path, ["a"])
    recorder.write(tmp_path / "t.jsonl", ["a"])
    (batch,) = load_trace(tmp_path / "t.jsonl").batches
    assert batch.topk_ids(1).tolist() == [[0]]
    with pytest.raises(KernelError, match="at least one slot, expert and id a token, not 0, 2 and 1"):
        Recorder(0, 2, 1, DEVICE)


def test_from_a_layer_to_compare(registry: Registry, shipped: ProfileStore, h200: Hardware, tmp_path: Path) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    model = load_replay(registry, shipped, shape, h200, ("alpha_moe", "triton")).fit(form="smooth")
    recorder = Recorder(6, 64, 8, DEVICE)
    contenders = model.contenders.tolist()
    selector = TritonSelector(CostTable.of(model, contenders), 64, DEVICE)
    batches = [routed("uniform" if n % 2 else "padded", n, 64, 8, n) for n in (3, 5, 64, 300, 57, 64, 33)]
    choices = []
    for ids in batches:
        selector.launch(ids.to(DEVICE), recorder=recorder)
        choices.append(model.candidates[contenders[selector.choice.item()]].name)
    path = tmp_path / "deep" / "trace.jsonl"
    recorder.write(path, [c.name for c in model.candidates], "a test")

    header, *lines = (json.loads(line) for line in path.read_text().splitlines())
    assert header.pop("choices") == {name: choices[1:].count(name) for name in choices[1:]}
    assert header == {"num_experts": 64, "top_k": 8, "source": "a test", "lost": 1}
    assert [line["choice"] for line in lines] == choices[1:]
    small, middle, large = load_trace(path).recorded()
    assert [batch.tokens for batch in (*small, *middle, *large)] == [5, 64, 57, 64, 33, 300]
    for found, ids in zip(middle, (batches[i] for i in (2, 4, 5, 6)), strict=True):
        assert expert_histogram(found.topk_ids(8), 64).tolist() == found.histogram.tolist() == counted(ids, 64).tolist()

    arguments = ["compare", "--model", "olmoe-1b-7b", "--trace", str(path), "--html", str(tmp_path / "r.html")]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "PREDICTED by the cost model" in shown.output
    found = json.loads(CliRunner().invoke(main, [*arguments[:5], "--json"]).stdout)
    rows = [(b["routing"], b["tokens"], b["steps"]) for b in found["batches"]]
    assert rows == [("trace recorded", 5, 1), ("trace recorded", 64, 4), ("trace recorded", 300, 1)]
    assert all(b["speedup"] >= 1 for b in found["batches"])
    other = CliRunner().invoke(main, ["compare", "--model", "mixtral-8x7b-tp4", "--trace", str(path)])
    assert other.exit_code == 2
    assert "the trace names 8 of 64 experts a token" in other.output
