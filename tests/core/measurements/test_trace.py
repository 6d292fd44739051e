from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from ramp_moe import RoutingError, load_trace
from ramp_moe.spec.routing import expert_histogram

IDS = [[t % 4, (t + 1) % 4] for t in range(10)]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_json_object(tmp_path: Path) -> None:
    text = json.dumps({"num_experts": 4, "top_k": 2, "topk_ids": IDS, "source": "a test"})
    trace = load_trace(write(tmp_path / "t.json", text))
    assert (trace.num_tokens, trace.top_k, trace.num_experts, trace.source) == (10, 2, 4, "a test")
    assert trace.topk_ids.tolist() == IDS


@pytest.mark.parametrize("as_object", [False, True])
def test_json_lines_with_and_without_header(tmp_path: Path, as_object: bool) -> None:
    lines = [json.dumps({"topk_ids": i} if as_object else i) for i in IDS]
    plain = load_trace(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert plain.topk_ids.tolist() == IDS
    # ids do not tell of experts that were never chosen
    assert plain.num_experts is None
    headed = load_trace(write(tmp_path / "b.jsonl", "\n".join([json.dumps({"num_experts": 9}), *lines]) + "\n"))
    assert headed.topk_ids.tolist() == IDS
    assert headed.num_experts == 9


def test_one_line_file(tmp_path: Path) -> None:
    assert load_trace(write(tmp_path / "t.jsonl", '{"topk_ids": [3, 1]}\n')).topk_ids.tolist() == [[3, 1]]


def test_prefill_takes_consecutive_tokens(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "t.json", json.dumps(IDS)))
    assert [b.tolist() for b in trace.prefill(4)] == [IDS[:4], IDS[4:8]]


def test_decode_without_requests_cuts_equal_runs(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "t.json", json.dumps(IDS)))
    assert [b.tolist() for b in trace.decode(2)] == [[IDS[i], IDS[5 + i]] for i in range(5)]


def test_decode_follows_recorded_requests(tmp_path: Path) -> None:
    # requests a (3 tokens), b (1), c (2): c takes b's place once b has ended
    request = ["a", "a", "a", "b", "c", "c"]
    trace = load_trace(write(tmp_path / "t.json", json.dumps({"topk_ids": IDS[:6], "request": request})))
    assert [b.tolist() for b in trace.decode(2)] == [[IDS[0], IDS[3]], [IDS[1], IDS[4]], [IDS[2], IDS[5]]]
    with pytest.raises(RoutingError, match="a decode batch of 4 cannot be cut from a trace of 3 requests"):
        list(trace.decode(4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON or JSON lines"),
        ("hello", "not JSON or JSON lines"),
        ('{"topk_ids": []}', "holds no token"),
        ("[]", "holds no token"),
        ("[[0, 1], [2]]", "differ in the number of experts"),
        ("[[0, 1.5]]", "token 0 is not a list of integer expert ids"),
        ('[[0, 1], ["x", 2]]', "token 1 is not a list of integer"),
        ('{"topk_ids": [[0, 7]], "num_experts": 4}', r"t\.json: expert id 7 is outside \[0, 4\)"),
        ('{"topk_ids": [[0, 1]], "top_k": 8}', "top_k is 8, its tokens name 2"),
        ('{"topk_ids": [[0, 1]], "num_experts": "many"}', "num_experts must be an integer up to 65536, not 'many'"),
        ('{"topk_ids": [[0, 1], [1, 2]], "request": [1]}', "for every token or for none"),
        ("[[], []]", "name no expert"),
        ('{"topk_ids": [[0, 1]], "request": 5}', "not JSON or JSON lines"),
        ('{"topk_ids": [[0, 1]], "num_experts": 1099511627776}', "an integer up to 65536"),
        (f"[[{2**70}, 1]]", r"expert id 1180591620717411303424 is outside"),
        ("[" * 100_000, "not JSON or JSON lines"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        load_trace(write(tmp_path / "t.json", text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b'["\\ud800", "\xff"]')
    with pytest.raises(RoutingError, match="not JSON or JSON lines"):
        load_trace(tmp_path / "t.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match=r"cannot read trace .*nowhere\.json: No such file"):
        load_trace(tmp_path / "nowhere.json")


def test_batches_longer_than_the_trace(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path / "t.json", json.dumps(IDS)))
    with pytest.raises(RoutingError, match="a prefill batch of 11 cannot be cut from a trace of 10 tokens"):
        list(trace.prefill(11))


BATCHES = [(5, [5, 4, 1, 0]), (1, [0, 1, 0, 1]), (6, [0, 0, 0, 3]), (8, [8, 0, 8, 0])]


def test_recorded_batches(tmp_path: Path) -> None:
    lines = [{"num_experts": 4, "top_k": 2, "source": "a layer"}, *({"tokens": t, "histogram": h} for t, h in BATCHES)]
    trace = load_trace(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines))))
    assert (trace.num_tokens, trace.top_k, trace.num_experts, trace.source) == (20, 2, 4, "a layer")
    assert trace.topk_ids.shape == (0, 2)
    assert [b.tokens for b in trace.batches] == [5, 1, 6, 8]
    found = list(trace.recorded())
    assert [[batch.tokens for batch in batches] for batches in found] == [[1], [5, 6, 8]]
    for batch, (_, histogram) in zip([*found[1], found[0][0]], [BATCHES[0], *BATCHES[2:], BATCHES[1]], strict=True):
        assert batch.histogram.tolist() == histogram
        assert expert_histogram(batch.topk_ids(2), 4).tolist() == histogram
    assert all(a != b for a, b in found[1][0].topk_ids(2)), "no token names an expert twice"
    assert list(load_trace(write(tmp_path / "ids.json", json.dumps(IDS))).recorded()) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"tokens": 1, "histogram": [1, 1]}], "needs a header with top_k, not None"),
        ([{"top_k": 2}, {"tokens": 1, "histogram": [1, 2]}], "batch 0 has no .* counts 3 ids, more than"),
        (
            [{"top_k": 2}, {"tokens": 1, "histogram": [1, 1]}, {"tokens": 1, "histogram": [2]}],
            "batch 1 .* has 1 entries",
        ),
        ([{"top_k": 2, "num_experts": 3}, {"tokens": 1, "histogram": [1, 1]}], "has 2 entries, the shape has 3"),
        ([{"top_k": 2}, {"tokens": 0, "histogram": [0, 0]}], "0 is not a number of tokens"),
        ([{"top_k": 2}, {"tokens": 2**40, "histogram": [0, 0]}], "1099511627776 is not a number of tokens"),
        ([{"top_k": 2}, {"tokens": 2, "histogram": [[1], [1]]}], "batch 0 has no tokens and histogram"),
        ([{"top_k": 2}, {"tokens": 2, "histogram": ["a", 1]}], "batch 0 has no tokens and histogram"),
        ([{"top_k": 2}, {"tokens": 2, "histogram": 1}], "batch 0 has no tokens and histogram"),
        ([{"top_k": 2}, {"histogram": [1, 1]}], "batch 0 has no tokens and histogram .* 'tokens'"),
        ([{"top_k": 2}, {"tokens": 2, "histogram": [1, 1]}, [0, 1]], "batch 1 has no tokens and histogram"),
    ],
)
def test_bad_recorded_batches(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        load_trace(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines))))


def peak(path: Path) -> int:
    """Bytes that reading a trace needs at most."""
    tracemalloc.start()
    try:
        load_trace(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ({"top_k": 8}, {"tokens": 2**22, "histogram": [2**18] * 64}),
        ({"top_k": 1}, {"tokens": 2**25, "histogram": [0]}),
        ({"num_experts": 64}, [*range(8)]),
        ({"num_experts": 64}, {"topk_ids": [*range(8)], "request": "a"}),
        ({"num_experts": 64}, [0]),
    ],
)
def test_memory_is_that_of_the_file_not_of_its_numbers(header: dict[str, int], line: object, tmp_path: Path) -> None:
    text = json.dumps(line)
    path = write(tmp_path / "t.jsonl", "\n".join([json.dumps(header), *[text] * (200_000 // len(text))]))
    assert peak(path) < 16 * path.stat().st_size


def test_requests_of_a_token_each(tmp_path: Path) -> None:
    """Finding them takes no time that grows with their square."""
    lines = [json.dumps({"topk_ids": [i % 4], "request": 100_000 - i}) for i in range(100_000)]
    trace = load_trace(write(tmp_path / "t.jsonl", "\n".join(lines)))
    assert sum(1 for _ in trace.decode(64)) == 100_000 // 64
    assert next(iter(trace.decode(3))).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("text", ["[[0, 1]]\n[0, 1]", '{"topk_ids": [[0]]}\n{"topk_ids": [0]}'])
def test_lines_behind_a_whole_value(tmp_path: Path, text: str) -> None:
    with pytest.raises(RoutingError, match="follows it"):
        load_trace(write(tmp_path / "t.json", text))


def test_a_value_over_several_lines(tmp_path: Path) -> None:
    assert load_trace(write(tmp_path / "t.json", json.dumps({"topk_ids": IDS}, indent=1))).topk_ids.tolist() == IDS
    assert load_trace(write(tmp_path / "t.json", f"\n\n{IDS[3]}\n\n")).topk_ids.tolist() == [IDS[3]]


def test_too_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramp_moe.measurements.trace.MAX_LINE", 2**20)
    for text in ("[" + "0, " * 2**19 + "0]", '{"topk_ids": [\n' + "[0, 1],\n" * 2**18 + "[0, 1]]}"):
        with pytest.raises(RoutingError, match="over 1 MiB; write JSON lines"):
            load_trace(write(tmp_path / "t.json", text))
