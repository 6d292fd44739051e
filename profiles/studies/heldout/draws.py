"""The routings of the study: batches that no profile has drawn, some of kinds that no profile contains.

uniform, zipf1.2   kinds that profiles are fitted to, with seeds that no profile draws from
sticky0.9          in no profile: a token keeps each expert of the token before it with probability 0.9, and draws the
                   others uniformly. The hot experts change along the prompt. A large batch is therefore skewed in
                   blocks, and a small one activates few experts
trace              recorded from a real model, for models with as many experts. Half of the batches are windows of
                   consecutive tokens, as in a prefill. The others take tokens at even distances, as in a decoding step
                   of many requests
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ramp_moe import MoEShape, RoutingError, Trace, generate
from ramp_moe.spec.routing import IntArray

TOKENS = (1, 4, 16, 64, 256, 1024)
KINDS = ("uniform", "zipf1.2", "sticky0.9")
TRACE = "trace"
TUNED = JUDGED = 5
"""Draws per group (a number of tokens and a kind): the first tune static dispatch, the others judge."""
FIRST_SEED = 20_000
"""The lowest seed. Every draw has its own, so that no batch is the beginning of another."""


@dataclass(frozen=True)
class Draw:
    """A batch: top-k ids int64 `[tokens, top_k]`. For a trace, `seed` is the number of the draw."""

    split: str
    seed: int
    topk_ids: IntArray


def sticky(tokens: int, num_experts: int, top_k: int, stay: float, seed: int) -> IntArray:
    """Ids int64 `[tokens, top_k]`, distinct within a token. An expert of a token is kept for the next one with
    probability `stay`."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, top_k), np.int64)
    kept = ids[:0, 0]
    for token in ids:
        others = np.setdiff1d(np.arange(num_experts), kept)
        token[:] = [*kept, *rng.permutation(others)[: top_k - len(kept)]]
        kept = token[rng.random(top_k) < stay]
    return ids


def cut(topk_ids: IntArray, tokens: int, draws: int) -> list[IntArray]:
    """Batches `[tokens, top_k]` of a trace's ids, alternately windows and tokens at even distances. Windows overlap if
    there are too few ids. Raises RoutingError if the trace is too short."""
    if tokens > len(topk_ids):
        raise RoutingError(f"a batch of {tokens} tokens cannot be cut from half a trace of {len(topk_ids)}")
    apart = len(topk_ids) // tokens
    starts = np.linspace(0, len(topk_ids) - tokens, draws).astype(int)
    return [
        topk_ids[start : start + tokens] if i % 2 == 0 else topk_ids[i % apart :: apart][:tokens]
        for i, start in enumerate(starts.tolist())
    ]


def kinds(tokens: int, shape: MoEShape, trace: Trace | None) -> tuple[str, ...]:
    """The kinds of routing that a number of tokens is measured with. One token activates top_k experts under any
    routing, so it needs one kind. A trace takes part if it has ids of tokens, and the experts and top_k of the
    shape."""
    if tokens == 1:
        return KINDS[:1]
    of_tokens = trace is not None and len(trace.topk_ids)
    fits = of_tokens and (trace.num_experts, trace.top_k) == (shape.num_experts, shape.top_k)
    return (*KINDS, TRACE) if fits else KINDS


def draws(kind: str, tokens: int, shape: MoEShape, trace: Trace | None) -> list[Draw]:
    """The draws of one group. For a trace, its first half tunes and its second half judges."""
    splits = ["tune"] * TUNED + ["judge"] * JUDGED
    if kind == TRACE:
        assert trace is not None
        tune, judge = np.array_split(trace.topk_ids, 2)
        batches: Sequence[IntArray] = cut(tune, tokens, TUNED) + cut(judge, tokens, JUDGED)
        return [Draw(split, i, ids) for i, (split, ids) in enumerate(zip(splits, batches, strict=True))]
    found = []
    for i, split in enumerate(splits):
        seed = FIRST_SEED + 100 * tokens.bit_length() + i
        size = tokens, shape.num_experts, shape.top_k
        name, _, stay = kind.partition("sticky")
        found.append(Draw(split, seed, generate(name, *size, seed) if name else sticky(*size, float(stay), seed)))
    return found
