"""Recorded routing: the top-k ids that a real model produced, cut into the batches that a server would see.

A trace file is either one JSON object

    {"num_experts": 64, "top_k": 8, "topk_ids": [[...], ...], "request": [...], "model": "...", "source": "..."}

or JSON lines, one token a line. A line is a list of ids or `{"topk_ids": [...], "request": ...}`. A first line without
`topk_ids` may carry the header fields. `request` is optional and names the sequence that a token belongs to.

A third form holds the batches that a layer saw. The recorder of a layer's routing writes it as JSON lines: first a
header with top_k, then a batch a line, `{"tokens": 17, "histogram": [...]}`. It does not say which token chose which
experts. A sample of many batches has `"runs": 2.5` besides: how many batches that ran this one stands for.

JSON lines are read one by one, and a batch keeps its histogram alone. So a trace takes about the memory of its ids or
histograms, however many tokens its batches have.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from ..errors import RoutingError
from ..spec.routing import MAX_CELLS, IntArray, check_histogram
from ..spec.shapes import MoEShape
from .json_file import MAX_BYTES, open_file, write_atomically

MAX_EXPERTS = 65_536
MAX_LINE = MAX_BYTES // 4
"""Longest line, or longest file that is one JSON value. Decoded numbers take many times the memory of their digits."""


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """A batch as a layer saw it: number of tokens, and the histogram int64 `[num_experts]` of the chosen experts.

    runs: how many batches that ran it stands for.
    """

    tokens: int
    histogram: IntArray
    runs: float = 1.0

    def topk_ids(self, top_k: int) -> IntArray:
        """Make up ids int64 `[tokens, top_k]` that have this histogram; -1 fills what it does not count.

        The recorded assignment of experts to tokens is unknown. Experts are dealt to the tokens in turn, so that a
        token gets an expert twice only if the counts force it.
        """
        dealt = np.full(self.tokens * top_k, -1, np.int64)
        dealt[: self.histogram.sum()] = np.repeat(np.arange(len(self.histogram)), self.histogram)
        return dealt.reshape(top_k, self.tokens).T


@dataclass(frozen=True)
class Trace:
    """Top-k ids int64 `[tokens, top_k]` in the order they were produced; `requests` is int64 `[tokens]` or None.

    `num_experts` is None if the file does not say: ids alone do not tell of experts that were never chosen. A trace of
    `batches` has no ids.
    """

    topk_ids: IntArray
    num_experts: int | None
    requests: IntArray | None = None
    source: str = ""
    batches: Sequence[RecordedBatch] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.topk_ids) + sum(batch.tokens for batch in self.batches)

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[1])

    def require(self, shape: MoEShape) -> None:
        """Raise RoutingError if the trace is of another shape."""
        if (self.num_experts or shape.num_experts, self.top_k) != (shape.num_experts, shape.top_k):
            raise RoutingError(
                f"the trace names {self.top_k} of {self.num_experts or 'so many'} experts a token, "
                f"{shape.label} {shape.top_k} of {shape.num_experts}"
            )

    def prefill(self, tokens: int) -> Iterator[IntArray]:
        """Yield batches of `tokens` consecutive tokens, as a prefill chunk holds them. A shorter rest is left out."""
        _check_size("prefill", tokens, len(self.topk_ids), "tokens")
        for start in range(0, len(self.topk_ids) - tokens + 1, tokens):
            yield self.topk_ids[start : start + tokens]

    def decode(self, requests: int) -> Iterator[IntArray]:
        """Yield batches of one token of each of `requests` sequences, as a decode step holds them.

        With recorded requests, `requests` sequences run side by side, and the next recorded one takes the place of one
        that ended. Steps with a free place are left out. Without recorded requests, the trace is cut into `requests`
        equal consecutive runs.
        """
        if self.requests is None:
            _check_size("decode", requests, len(self.topk_ids), "tokens")
            steps = len(self.topk_ids) // requests
            runs = self.topk_ids[: requests * steps].reshape(requests, steps, self.top_k)
            for step in range(steps):
                yield runs[:, step]
            return
        order = np.argsort(self.requests, kind="stable")
        sequences = np.split(order, np.flatnonzero(np.diff(self.requests[order])) + 1)
        _check_size("decode", requests, len(sequences), "requests")
        waiting = iter(sequences)
        running = [iter(next(waiting)) for _ in range(requests)]
        while True:
            tokens: list[int] = []
            for place, sequence in enumerate(running):
                token = next(sequence, None)
                while token is None:
                    following = next(waiting, None)
                    if following is None:
                        return
                    running[place] = iter(following)
                    token = next(running[place], None)
                tokens.append(int(token))
            yield self.topk_ids[tokens]

    def cut(self, decode: Iterable[int], prefill: Iterable[int]) -> Iterator[tuple[str, list[IntArray]]]:
        """Yield "decode" or "prefill" with all batches of one size, for each size that the trace is long enough for."""
        for kind, cut, sizes in (("decode", self.decode, decode), ("prefill", self.prefill, prefill)):
            for size in sizes:
                try:
                    batches = list(cut(size))
                except RoutingError:  # longer than the trace
                    continue
                if batches:
                    yield kind, batches

    def recorded(self) -> Iterator[list[RecordedBatch]]:
        """Yield the batches of a trace of batches, the small ones first. Those whose numbers of tokens have the same
        next power of two come together. Any other trace yields nothing."""
        of_size: dict[int, list[RecordedBatch]] = {}
        for batch in self.batches:
            of_size.setdefault((batch.tokens - 1).bit_length(), []).append(batch)
        for _, batches in sorted(of_size.items()):
            yield batches


def spread_out(count: int, most: int) -> list[int]:
    """Pick at most `most` of range(count), evenly spread, the first and the last among them."""
    index: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
    return index


def _check_size(kind: str, size: int, available: int, unit: str) -> None:
    if not 1 <= size <= available:
        raise RoutingError(f"a {kind} batch of {size} cannot be cut from a trace of {available} {unit}")


def load_trace(path: str | Path) -> Trace:
    """Read a trace file in one of the formats of this module's docstring. Raises RoutingError naming file and place."""
    path = Path(path)
    try:
        with open_file(path) as file:
            header, items = _parse(path, file)
            first = next(items, None)
            rest = items if first is None else itertools.chain([first], items)
            if isinstance(first, dict) and "histogram" in first:
                return _of_batches(path, header, rest)
            return _of_tokens(path, header, rest)
    except OSError as e:
        raise RoutingError(f"cannot read trace {path}: {e.strerror or e}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise RoutingError(f"trace {path} is not JSON or JSON lines of top-k ids: {e}") from None


def write_batches(
    path: str | Path, num_experts: int, top_k: int, batches: Iterable[tuple[int, list[int]]], source: str = ""
) -> None:
    """Write a trace of batches, each its tokens and its histogram `[num_experts]`, whole or not at all.

    Raises ProfileError if the file cannot be written.
    """
    header = {"num_experts": num_experts, "top_k": top_k, "source": source}
    lines = [{"tokens": tokens, "histogram": histogram} for tokens, histogram in batches]
    write_atomically(Path(path), msgspec.json.Encoder().encode_lines([header, *lines]))


def _parse(path: Path, file: BinaryIO) -> tuple[dict[str, Any], Iterator[Any]]:
    """Parse the header's fields, and iterate over the tokens or batches as they are read."""
    first = _line(path, file)
    while first and not first.strip():
        first = _line(path, file)
    try:
        value = msgspec.json.decode(first)
    except msgspec.DecodeError:
        # One value over several lines, or no JSON at all.
        value = msgspec.json.decode(first + _rest(path, file, MAX_LINE - len(first)))
        lines: Iterator[Any] = iter(())
    else:
        lines = _lines(path, file)
    tokens = value.get("topk_ids") if isinstance(value, dict) else value
    if isinstance(tokens, list) and (not tokens or isinstance(tokens[0], list)):
        for following in lines:
            raise RoutingError(f"trace {path} is not JSON or JSON lines of top-k ids: {str(following)[:40]} follows it")
        header = {k: v for k, v in value.items() if k != "topk_ids"} if isinstance(value, dict) else {}
        return header, iter(tokens)
    if isinstance(value, dict) and "topk_ids" not in value and "histogram" not in value:
        return value, lines
    return {}, itertools.chain([value], lines)


def _line(path: Path, file: BinaryIO) -> bytes:
    line = file.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise RoutingError(f"trace {path} has a line of over {MAX_LINE >> 20} MiB; write JSON lines, a token each")
    return line


def _rest(path: Path, file: BinaryIO, limit: int) -> bytes:
    rest = file.read(limit + 1)
    if len(rest) > limit:
        raise RoutingError(f"trace {path} is one JSON value of over {MAX_LINE >> 20} MiB; write JSON lines instead")
    return rest


def _lines(path: Path, file: BinaryIO) -> Iterator[Any]:
    decode = msgspec.json.Decoder().decode
    while line := _line(path, file):
        if line.strip():
            yield decode(line)


def _of_tokens(path: Path, header: dict[str, Any], tokens: Iterable[Any]) -> Trace:
    num_experts = header.get("num_experts")
    if num_experts is not None and (type(num_experts) is not int or not 1 <= num_experts <= MAX_EXPERTS):
        raise RoutingError(f"trace {path}: num_experts must be an integer up to {MAX_EXPERTS}, not {num_experts!r}")
    last = MAX_EXPERTS if num_experts is None else num_experts
    ids, labels, order, top_k = array("q"), array("q"), dict[str, int](), None
    for i, token in enumerate(tokens):
        row = token["topk_ids"] if isinstance(token, dict) else token
        if not isinstance(row, list) or any(type(x) is not int for x in row):
            raise RoutingError(f"trace {path}: token {i} is not a list of integer expert ids")
        if top_k is None:
            top_k = len(row)
        if len(row) != top_k:
            raise RoutingError(f"trace {path}: tokens differ in the number of experts they name")
        if row and not -1 <= min(row) <= max(row) <= last:
            bad = next(x for x in row if not -1 <= x <= last)
            raise RoutingError(f"trace {path}: expert id {bad} is outside [0, {last}); only -1 and {last} mark padding")
        ids.extend(row)
        label = token.get("request") if isinstance(token, dict) else None
        if label is not None:
            labels.append(order.setdefault(str(label), len(order)))
    if top_k is None:
        raise RoutingError(f"trace {path} holds no token")
    if top_k == 0:
        raise RoutingError(f"trace {path}: its tokens name no expert")
    if header.get("top_k", top_k) != top_k:
        raise RoutingError(f"trace {path}: top_k is {header['top_k']!r}, its tokens name {top_k} experts")
    topk_ids = np.frombuffer(ids, np.int64).reshape(-1, top_k)
    if listed := header.get("request"):
        labels = array("q", (order.setdefault(str(label), len(order)) for label in listed if label is not None))
    if len(labels) not in (0, len(topk_ids)):
        raise RoutingError(f"trace {path}: `request` must be given for every token or for none")
    requests = np.frombuffer(labels, np.int64) if labels else None
    return Trace(topk_ids, num_experts, requests, str(header.get("source", "")))


def _of_batches(path: Path, header: dict[str, Any], batches: Iterable[Any]) -> Trace:
    top_k = header.get("top_k")
    if type(top_k) is not int or not 1 <= top_k <= MAX_EXPERTS:
        raise RoutingError(f"trace {path}: a trace of batches needs a header with top_k, not {top_k!r}")
    num_experts = header.get("num_experts")
    found = []
    for i, batch in enumerate(batches):
        try:
            tokens, histogram = batch["tokens"], batch["histogram"]
            if type(tokens) is not int or not 1 <= tokens <= MAX_CELLS // top_k:
                raise RoutingError(f"{tokens!r} is not a number of tokens")
            counts = check_histogram(histogram, num_experts, tokens * top_k)
            (num_experts,) = counts.shape
            runs = batch.get("runs", 1.0)
            if isinstance(runs, bool) or not isinstance(runs, int | float) or not 0 < runs < math.inf:
                raise RoutingError(f"{runs!r} is not a number of runs")
        except (RoutingError, KeyError, TypeError, ValueError) as e:
            raise RoutingError(f"trace {path}: batch {i} has no tokens and histogram that fit together: {e}") from None
        found.append(RecordedBatch(tokens, counts, float(runs)))
    no_ids = np.empty((0, top_k), np.int64)
    return Trace(no_ids, num_experts, None, str(header.get("source", "")), found)
