"""Expert histograms, and seeded synthetic routings that distribute tokens over experts in known ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RoutingError, UnknownNameError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


MAX_COUNT = 2**40
"""Bound on one expert's tokens, so that sums over experts stay exact in 64 bits."""

MAX_CELLS = 2**26
"""Bound on tokens x experts of a synthetic routing: drawing this many takes some ten seconds."""

DRAWN_AT_ONCE = 2**22
"""Random keys held at a time: 32 MiB."""


def _on_host(values: Any, what: str) -> Any:
    """Copy a torch tensor to numpy, from whatever device; return anything else as it is."""
    if not hasattr(values, "detach"):
        return values
    try:
        return values.detach().cpu().numpy()
    except TypeError:  # numpy has no bfloat16
        raise RoutingError(f"{what} must be integers, not {values.dtype}") from None


def expert_histogram(topk_ids: Any, num_experts: int) -> IntArray:
    """Count tokens per expert, int64 `[num_experts]`, in top-k ids `[tokens, top_k]` (numpy, torch, or nested lists).

    Ids of -1 and `num_experts` mark padding, or an expert on another rank, and are not counted.
    Raises RoutingError for ids that are not integers or lie outside `[-1, num_experts]`.
    """
    try:
        ids = np.asarray(_on_host(topk_ids, "top-k ids"))
    except ValueError:
        raise RoutingError("top-k ids are ragged: every token needs the same number of experts") from None
    if ids.size == 0:
        return np.zeros(num_experts, np.int64)
    if ids.dtype.kind not in "iu":
        raise RoutingError(f"top-k ids must be integers, not {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high > num_experts:
        raise RoutingError(
            f"expert id {low if low < -1 else high} is outside [0, {num_experts}); "
            f"only -1 and {num_experts} mark padding"
        )
    flat = ids.ravel()
    return np.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts).astype(np.int64)


def check_histogram(histogram: Any, num_experts: int | None = None, max_ids: int | None = None) -> IntArray:
    """Convert a histogram to int64 `[..., num_experts]`; leading axes are batches.

    max_ids: tokens x top_k, which no sum of counts exceeds. A sum may be smaller: expert parallelism and padding drop
        ids.

    Raises RoutingError if the values are no counts of tokens, or do not fit `num_experts` or `max_ids`.
    """
    try:
        h = np.asarray(histogram if type(histogram) is np.ndarray else _on_host(histogram, "an expert histogram"))
    except ValueError:
        raise RoutingError("expert histograms in one batch differ in length") from None
    if h.ndim == 0 or h.shape[-1] == 0:
        raise RoutingError("an expert histogram needs one count per expert")
    if h.dtype.kind == "f" and np.all(np.abs(h) <= MAX_COUNT) and np.all(h == np.floor(h)):
        h = h.astype(np.int64)
    if h.dtype.kind not in "iu":
        raise RoutingError(f"an expert histogram holds whole token counts, not {h.dtype} values such as {h.flat[0]!s}")
    if num_experts is not None and h.shape[-1] != num_experts:
        raise RoutingError(f"expert histogram has {h.shape[-1]} entries, the shape has {num_experts} experts")
    if h.dtype != np.int64:
        if h.max(initial=0) > MAX_COUNT:
            raise RoutingError(f"expert histogram has a count of {h.max()}, more than any batch can have")
        h = h.astype(np.int64)
    # One pass for the hot path: a negative count makes the union of all bits negative, and a huge one makes it huge.
    if not 0 <= int(np.bitwise_or.reduce(h, axis=None)) < MAX_COUNT:
        if h.min() < 0:
            expert = int(np.argmin(h) % h.shape[-1])
            raise RoutingError(f"expert histogram has a negative count ({int(h.min())}) at expert {expert}")
        if h.max() > MAX_COUNT:
            raise RoutingError(f"expert histogram has a count of {h.max()}, more than any batch can have")
    if max_ids is not None and (total := int(h.sum(-1).max(initial=0))) > max_ids:
        raise RoutingError(f"expert histogram counts {total} ids, more than tokens x top_k = {max_ids}")
    return h


def active_experts(histogram: IntArray) -> IntArray:
    """Count the experts with at least one token, along the last axis."""
    return np.asarray(np.count_nonzero(histogram, axis=-1))


def _without_replacement(p: FloatArray, tokens: int, top_k: int, rng: np.random.Generator) -> IntArray:
    """Draw `top_k` distinct experts per token, one after the other, by `p` [E] or [tokens, E] (Gumbel top-k)."""
    with np.errstate(divide="ignore"):
        logits = np.log(p)
    ids = np.empty((tokens, top_k), np.int64)
    rows = max(1, DRAWN_AT_ONCE // p.shape[-1])
    for first in range(0, tokens, rows):
        part = slice(first, min(first + rows, tokens))
        keys = (logits if p.ndim == 1 else logits[part]) + rng.gumbel(size=(part.stop - first, p.shape[-1]))
        ids[part] = _largest(keys, top_k)
    return ids


def _largest(keys: FloatArray, count: int) -> IntArray:
    """Find the columns of each row's `count` largest keys, the largest first; of equal keys, the first comes first.

    Sorting stably takes three times as long, and matters for rows with equal keys alone.
    """
    order = np.argsort(-keys, axis=1)
    found = np.take_along_axis(keys, order[:, : count + 1], axis=1)
    tied = (found[:, 1:] == found[:, :-1]).any(1)
    if tied.any():
        order[tied] = np.argsort(-keys[tied], axis=1, kind="stable")
    return order[:, :count]


def uniform(tokens: int, num_experts: int, top_k: int, seed: int = 0) -> IntArray:
    """Draw every expert with equal probability, distinct for a token. Ids are int64 `[tokens, top_k]`."""
    return _without_replacement(np.full(num_experts, 1 / num_experts), tokens, top_k, np.random.default_rng(seed))


def zipf(tokens: int, num_experts: int, top_k: int, exponent: float, seed: int = 0) -> IntArray:
    """Draw the expert of rank r with weight r**-exponent, distinct for a token. Ranks are shuffled over experts."""
    if not exponent >= 0:
        raise RoutingError(f"zipf exponent must be at least 0, not {exponent}")
    rng = np.random.default_rng(seed)
    p = rng.permutation(np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent)
    return _without_replacement(p / p.sum(), tokens, top_k, rng)


def dirichlet(tokens: int, num_experts: int, top_k: int, concentration: float, seed: int = 0) -> IntArray:
    """Draw by probabilities from a symmetric Dirichlet, distinct for a token. A smaller concentration skews more."""
    if not concentration > 0:
        raise RoutingError(f"dirichlet concentration must be positive, not {concentration}")
    rng = np.random.default_rng(seed)
    # A floor keeps top_k experts reachable where the draw underflows to zero.
    p = rng.dirichlet(np.full(num_experts, float(concentration))) + 1e-12
    return _without_replacement(p, tokens, top_k, rng)


def balancedness(
    tokens: int, num_experts: int, top_k: int, beta: float, distinct: bool = False, seed: int = 0
) -> IntArray:
    """Draw by Alpha-MoE's balancedness: probabilities are beta * uniform + (1 - beta) * one hot expert.

    As in Alpha-MoE, ids are drawn with replacement, so a token may name an expert twice. `distinct=True` forbids that.
    """
    _check_fraction("balancedness", beta)
    rng = np.random.default_rng(seed)
    p = np.full(num_experts, beta / num_experts)
    p[rng.integers(num_experts)] += 1 - beta
    if distinct:
        # With beta = 0 only one expert has a probability: the floor spreads the other ids over the rest.
        return _without_replacement(p + 1e-12, tokens, top_k, rng)
    return rng.choice(num_experts, size=(tokens, top_k), p=p / p.sum()).astype(np.int64)


def few_active(tokens: int, num_experts: int, top_k: int, fraction: float, seed: int = 0) -> IntArray:
    """Draw uniformly among a `fraction` of the experts, at least top_k of them. The others receive no token."""
    _check_fraction("active fraction", fraction)
    rng = np.random.default_rng(seed)
    count = min(num_experts, max(top_k, round(fraction * num_experts)))
    chosen = rng.permutation(num_experts)[:count]
    return chosen[_without_replacement(np.full(count, 1 / count), tokens, top_k, rng)].astype(np.int64)


def one_hot(tokens: int, num_experts: int, top_k: int, seed: int = 0) -> IntArray:
    """Name the same expert in every id: the worst skew that a kernel can meet. A token names it top_k times."""
    return np.full((tokens, top_k), np.random.default_rng(seed).integers(num_experts), np.int64)


def repeats_experts(topk_ids: IntArray) -> bool:
    """Whether any token of ids int `[tokens, top_k]` names an expert twice."""
    ordered = np.sort(topk_ids, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _check_fraction(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RoutingError(f"{what} must lie in [0, 1], not {value}")


_WITH_VALUE: Mapping[str, Callable[[int, int, int, float, int], IntArray]] = {
    "zipf": lambda t, e, k, v, seed: zipf(t, e, k, v, seed),
    "dirichlet": lambda t, e, k, v, seed: dirichlet(t, e, k, v, seed),
    "balancedness": lambda t, e, k, v, seed: balancedness(t, e, k, v, False, seed),
    "distinct": lambda t, e, k, v, seed: balancedness(t, e, k, v, True, seed),
    "active": lambda t, e, k, v, seed: few_active(t, e, k, v, seed),
}
_PLAIN: Mapping[str, Callable[[int, int, int, int], IntArray]] = {"uniform": uniform, "one-hot": one_hot}
KINDS = (*_PLAIN, *(f"{name}V" for name in _WITH_VALUE))
"""Routing kinds by name; V is a number, as in zipf1.2."""
TUNE_KINDS = ("uniform", "zipf1.2", "zipf0.6", "balancedness0.5", "active0.125", "active0.3")
"""Kinds of routing that profiles are measured and tuned on."""


def generate(kind: str, tokens: int, num_experts: int, top_k: int, seed: int = 0) -> IntArray:
    """Draw top-k ids, int64 `[tokens, top_k]`, of a routing named as in KINDS; equal arguments give equal ids.

    Raises UnknownNameError for an unknown kind, RoutingError for sizes or a value that it does not take.
    """
    if tokens < 0:
        raise RoutingError(f"the number of tokens must be at least 0, not {tokens}")
    if not 1 <= top_k <= num_experts:
        raise RoutingError(f"top_k must lie in [1, {num_experts}], not {top_k}")
    if tokens * num_experts > MAX_CELLS:
        raise RoutingError(f"{tokens} tokens over {num_experts} experts are too many to draw; give a histogram instead")
    if seed < 0:
        raise RoutingError(f"the seed must be at least 0, not {seed}")
    if kind in _PLAIN:
        return _PLAIN[kind](tokens, num_experts, top_k, seed)
    match = re.fullmatch(r"([a-z-]+?)(\d+(?:\.\d*)?|\.\d+)", kind)
    if match is None or match[1] not in _WITH_VALUE:
        raise UnknownNameError("routing kind", kind, KINDS)
    return _WITH_VALUE[match[1]](tokens, num_experts, top_k, float(match[2]), seed)
