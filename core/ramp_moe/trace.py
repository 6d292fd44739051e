"""Recorded routing: the top-k ids that a real model produced, cut into the batches that a server would see.

A trace file is either one JSON object

    {"num_experts": 64, "top_k": 8, "topk_ids": [[...], ...], "request": [...], "model": "...", "source": "..."}

or JSON lines, one token a line, either a list of ids or `{"topk_ids": [...], "request": ...}`; a first line without
`topk_ids` may carry the header fields. `request` (optional) names the sequence that a token belongs to.

Or the batches as a layer saw them, which `device.recorder` writes: JSON lines, first a header with top_k, then a batch
a line, `{"tokens": 17, "histogram": [...]}`. Which token named which experts is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .errors import RoutingError
from .files import write_atomically
from .routing import MAX_CELLS, IntArray, check_histogram, expert_histogram
from .shapes import MoEShape

MAX_EXPERTS = 65_536


@dataclass(frozen=True)
class Trace:
    """Top-k ids int64 `[tokens, top_k]` in the order they were produced; `requests` int64 `[tokens]` or None.

    num_experts is None where the file does not say: ids alone do not tell of experts that were never chosen. `starts`
    int64 `[batches + 1]`, of a trace of batches: batch i is the tokens starts[i] : starts[i + 1]. Its histogram is the
    recorded one, the order of its ids is not.
    """

    topk_ids: IntArray
    num_experts: int | None
    requests: IntArray | None = None
    source: str = ""
    starts: IntArray | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.topk_ids.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[1])

    def require(self, shape: MoEShape) -> None:
        """Raises RoutingError where the trace is of another shape."""
        if (self.num_experts or shape.num_experts, self.top_k) != (shape.num_experts, shape.top_k):
            raise RoutingError(
                f"the trace names {self.top_k} of {self.num_experts or 'so many'} experts a token, "
                f"{shape.label} {shape.top_k} of {shape.num_experts}"
            )

    def prefill(self, tokens: int) -> Iterator[IntArray]:
        """Batches of `tokens` consecutive tokens, as a prefill chunk holds them; a shorter rest is left out."""
        _check_size("prefill", tokens, self.num_tokens, "tokens")
        for start in range(0, self.num_tokens - tokens + 1, tokens):
            yield self.topk_ids[start : start + tokens]

    def decode(self, requests: int) -> Iterator[IntArray]:
        """Batches of one token of each of `requests` sequences, as a decode step holds them.

        With recorded requests: as many sequences run side by side as asked for, and the next recorded one takes the
        place of one that ended; steps with a free place are left out. Without them, the trace is cut into that many
        equal consecutive runs.
        """
        if self.requests is None:
            _check_size("decode", requests, self.num_tokens, "tokens")
            steps = self.num_tokens // requests
            runs = self.topk_ids[: requests * steps].reshape(requests, steps, self.top_k)
            for step in range(steps):
                yield runs[:, step]
            return
        sequences = [np.flatnonzero(self.requests == r) for r in dict.fromkeys(self.requests.tolist())]
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

    def recorded(self) -> Iterator[list[IntArray]]:
        """The batches of a trace of batches, the small ones first: those together whose numbers of tokens have the same
        next power of two. Of another trace, nothing."""
        of_size: dict[int, list[IntArray]] = {}
        if self.starts is not None:
            for batch in np.split(self.topk_ids, self.starts[1:-1]):
                of_size.setdefault((len(batch) - 1).bit_length(), []).append(batch)
        for _, batches in sorted(of_size.items()):
            yield batches


def _check_size(kind: str, size: int, available: int, unit: str) -> None:
    if not 1 <= size <= available:
        raise RoutingError(f"a {kind} batch of {size} cannot be cut from a trace of {available} {unit}")


def load_trace(path: str | Path) -> Trace:
    """Read a trace file (the formats are in this module's docstring). Raises RoutingError naming file and place."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RoutingError(f"cannot read trace {path}: {e.strerror or e}") from None
    try:
        header, tokens = _parse(data)
        if any(isinstance(t, dict) and "histogram" in t for t in tokens):
            return _of_batches(path, header, tokens)
        ids = [t["topk_ids"] if isinstance(t, dict) else t for t in tokens]
        labels = header.get("request") or [t.get("request") if isinstance(t, dict) else None for t in tokens]
        labels = list(labels)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise RoutingError(f"trace {path} is not JSON or JSON lines of top-k ids: {e}") from None
    if not ids:
        raise RoutingError(f"trace {path} holds no token")
    if not all(isinstance(row, list) and all(type(i) is int for i in row) for row in ids):
        bad = next(i for i, row in enumerate(ids) if not isinstance(row, list) or any(type(x) is not int for x in row))
        raise RoutingError(f"trace {path}: token {bad} is not a list of integer expert ids")
    if len({len(row) for row in ids}) != 1:
        raise RoutingError(f"trace {path}: tokens differ in the number of experts they name")
    try:
        topk_ids = np.array(ids, np.int64).reshape(len(ids), -1)
    except OverflowError:
        raise RoutingError(f"trace {path}: an expert id does not fit into 64 bits") from None
    if topk_ids.shape[1] == 0:
        raise RoutingError(f"trace {path}: its tokens name no expert")
    num_experts = header.get("num_experts")
    if num_experts is not None and (type(num_experts) is not int or not 1 <= num_experts <= MAX_EXPERTS):
        raise RoutingError(f"trace {path}: num_experts must be an integer up to {MAX_EXPERTS}, not {num_experts!r}")
    if header.get("top_k", topk_ids.shape[1]) != topk_ids.shape[1]:
        raise RoutingError(f"trace {path}: top_k is {header['top_k']!r}, its tokens name {topk_ids.shape[1]} experts")
    try:
        expert_histogram(topk_ids, MAX_EXPERTS if num_experts is None else num_experts)
    except RoutingError as e:
        raise RoutingError(f"trace {path}: {e}") from None
    requests = None
    if any(label is not None for label in labels):
        if len(labels) != len(ids) or any(label is None for label in labels):
            raise RoutingError(f"trace {path}: `request` must be given for every token or for none")
        order: dict[Any, int] = {}
        requests = np.array([order.setdefault(str(label), len(order)) for label in labels], np.int64)
    return Trace(topk_ids, num_experts, requests, str(header.get("source", "")))


def write_batches(
    path: str | Path, num_experts: int, top_k: int, batches: Iterable[tuple[int, list[int]]], source: str = ""
) -> None:
    """Write a trace of batches, each its tokens and its histogram `[num_experts]`, whole or not at all. Raises
    ProfileError where the file cannot be written."""
    header = {"num_experts": num_experts, "top_k": top_k, "source": source}
    lines = [{"tokens": tokens, "histogram": histogram} for tokens, histogram in batches]
    write_atomically(Path(path), msgspec.json.Encoder().encode_lines([header, *lines]))


def _of_batches(path: Path, header: dict[str, Any], batches: list[Any]) -> Trace:
    top_k = header.get("top_k")
    if type(top_k) is not int or top_k < 1:
        raise RoutingError(f"trace {path}: a trace of batches needs a header with top_k, not {top_k!r}")
    num_experts = header.get("num_experts")
    ids: list[IntArray] = []
    for i, batch in enumerate(batches):
        try:
            tokens, histogram = batch["tokens"], batch["histogram"]
            if type(tokens) is not int or not 1 <= tokens <= MAX_CELLS // top_k:
                raise RoutingError(f"{tokens!r} is not a number of tokens")
            counts = check_histogram(histogram, num_experts, tokens * top_k)
            (num_experts,) = counts.shape
        except (RoutingError, KeyError, TypeError, ValueError) as e:
            raise RoutingError(f"trace {path}: batch {i} has no tokens and histogram that fit together: {e}") from None
        # Experts one after the other, dealt to the tokens in turn: none gets an expert twice that need not.
        dealt = np.full(tokens * top_k, -1, np.int64)
        dealt[: counts.sum()] = np.repeat(np.arange(len(counts)), counts)
        ids.append(dealt.reshape(top_k, tokens).T)
    starts = np.cumsum([0, *map(len, ids)])
    return Trace(np.concatenate(ids), num_experts, None, str(header.get("source", "")), starts)


def _parse(data: bytes) -> tuple[dict[str, Any], list[Any]]:
    try:
        whole = msgspec.json.decode(data)
    except msgspec.DecodeError:
        lines = [msgspec.json.decode(line) for line in data.splitlines() if line.strip()]
        if not lines:
            raise
    else:
        tokens = whole.get("topk_ids") if isinstance(whole, dict) else whole
        if isinstance(tokens, list) and (not tokens or isinstance(tokens[0], list)):
            return (whole if isinstance(whole, dict) else {}), tokens
        lines = [whole]  # a file of one line
    first = lines[0]
    if isinstance(first, dict) and "topk_ids" not in first and "histogram" not in first:
        return first, lines[1:]
    return {}, lines
