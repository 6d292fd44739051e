"""The routings of the study: batches that no profile has drawn, some of kinds that no profile knows.

uniform, zipf1.2   kinds that profiles are fitted to, by seeds that none draws from
sticky0.9          of no profile: a prompt whose tokens keep each of the experts of the token before with probability
                   0.9, and draw the others uniformly. Which experts are hot changes along the prompt: a large batch is
                   skewed in blocks, a small one wakes few experts
trace              recorded from a real model, for models of as many experts: windows of consecutive tokens, as in a
                   prefill, and in turn tokens evenly apart, as in a decoding step of many requests
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
"""Draws of a group (a number of tokens and a kind): the first to tune static dispatch on, the others to judge."""
FIRST_SEED = 20_000
"""Every draw has a seed of its own, so that no batch is the beginning of another."""


@dataclass(frozen=True)
class Draw:
    """A batch: top-k ids int64 `[tokens, top_k]`; of a trace, `seed` counts the draws."""

    split: str
    seed: int
    topk_ids: IntArray


def sticky(tokens: int, num_experts: int, top_k: int, stay: float, seed: int) -> IntArray:
    """Ids int64 `[tokens, top_k]`, distinct in a token: each of the token before stays with probability `stay`."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, top_k), np.int64)
    kept = ids[:0, 0]
    for token in ids:
        others = np.setdiff1d(np.arange(num_experts), kept)
        token[:] = [*kept, *rng.permutation(others)[: top_k - len(kept)]]
        kept = token[rng.random(top_k) < stay]
    return ids


def cut(topk_ids: IntArray, tokens: int, draws: int) -> list[IntArray]:
    """Batches `[tokens, top_k]` of a trace's ids: windows, which overlap where there are too few ids, and tokens evenly
    apart, in turn. Raises RoutingError where the trace is too short."""
    if tokens > len(topk_ids):
        raise RoutingError(f"a batch of {tokens} tokens cannot be cut from half a trace of {len(topk_ids)}")
    apart = len(topk_ids) // tokens
    starts = np.linspace(0, len(topk_ids) - tokens, draws).astype(int)
    return [
        topk_ids[start : start + tokens] if i % 2 == 0 else topk_ids[i % apart :: apart][:tokens]
        for i, start in enumerate(starts.tolist())
    ]


def kinds(tokens: int, shape: MoEShape, trace: Trace | None) -> tuple[str, ...]:
    """A single token wakes top_k experts whatever the routing. A trace of batches says of no token what it named."""
    if tokens == 1:
        return KINDS[:1]
    of_tokens = trace is not None and len(trace.topk_ids)
    fits = of_tokens and (trace.num_experts, trace.top_k) == (shape.num_experts, shape.top_k)
    return (*KINDS, TRACE) if fits else KINDS


def draws(kind: str, tokens: int, shape: MoEShape, trace: Trace | None) -> list[Draw]:
    """One group's. Of a trace, the first half is tuned on and the second judged."""
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
