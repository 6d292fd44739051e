"""Choosing the few candidates to capture in a CUDA graph, among which the device then chooses.

A graph is captured for a number of tokens. How they spread over the experts is known only when it runs. Every candidate
in the graph (a body) takes memory and delays the launch. So a graph gets only candidates that win for some spread of
its tokens, and a single one if choosing would gain less than the switch costs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..cost_model.model import Candidate, CostModel
from ..errors import KernelError, RoutingError
from ..spec.routing import TUNE_KINDS, FloatArray, IntArray, check_histogram, expert_histogram, generate

MOST = 8
"""Most bodies in a graph."""

MARGIN = 0.01
"""What choosing must save beyond its overhead, as a share of the best single candidate's time. The fastest of several
predictions flatters: measured savings are well below predicted ones (`profiles/studies/shortlists` has both). With this
margin choices gain most, or nearly, by cross-validation on the batches that shipped profiles were fitted to."""

VALID = (1.0, 0.875, 0.75, 0.625)
"""Shares of a graph's tokens that are valid; the rest is padding. A batch runs in the smallest graph that holds it.
Engines at most double the size from one graph to the next, so half of the tokens or fewer go to a smaller graph."""

DRAWN = 1024
"""Most tokens for which `choice_by_batch_size` draws batches. A larger batch is a multiple of the experts' tokens in
one of these.
"""

MOST_DRAWN = 8192
"""Most tokens for which `representative` draws batches."""

SEEDS = 8
CELLS = 2**20
"""Bounds the number of draws, in tokens x experts over all kinds, to a twentieth of a second. There are at least one
and at most SEEDS of a kind. Large batches need few, since theirs are alike."""

_choices: WeakKeyDictionary[CostModel, dict[tuple[int, float, int], Candidate | None]] = WeakKeyDictionary()
"""Keyed by model, then size, microseconds and ep_size: the layers of a network share their entries."""


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Candidates to capture for one number of tokens, and what the cost model expects of them. All figures are means
    over routings.

    `columns` are indices into the model's candidates: the best single one, then each that gains most beside those
    before it. `loss` is the time of the fastest of them over that of the fastest of all candidates, less one.
    `single_loss` is the same of the first alone. Three figures are microseconds a launch: `gain_us` is what choosing
    among them saves over the first, `overhead_us` what the further bodies add, and `expected_us` the whole launch.
    """

    columns: tuple[int, ...]
    loss: float
    single_loss: float
    gain_us: float
    overhead_us: float
    expected_us: float

    @property
    def pays(self) -> bool:
        """True if the device should choose. Otherwise the graph holds the best single candidate and no switch."""
        return len(self.columns) > 1


def shortlist(
    model: CostModel,
    num_tokens: int,
    overhead_us: Mapping[int, float],
    most: int = MOST,
    margin: float = MARGIN,
    histograms: Any = None,
    groups: Sequence[Hashable | None] | None = None,
) -> Shortlist:
    """Choose at most `most` of the model's candidates for a graph of `num_tokens`.

    Their number is the one with the least expected time, overhead and margin included. Among equals it takes the
    fewest, and those of the lowest index.

    model: has only candidates that a graph can hold (see `CostModel.restrict`).

    overhead_us: microseconds beyond its candidate's that a graph takes, by its number of bodies. Numbers in between are
    interpolated. It must reach from one body to the most that there may be.

    margin: see MARGIN.

    histograms: recorded batches that the graph would hold, integers `[batches, num_experts]`. They replace the
    `representative` ones for weighing the candidates.

    groups: one for each of the model's candidates, if not all can be in a graph together. Candidates of equal groups
    can; one of None can be with no other. The first column is then the best of its group.

    Raises KernelError for a number of bodies or an overhead that cannot be. Raises RoutingError for a number of tokens
    below one, or histograms that do not fit it or the shape.
    """
    if most < 1:
        raise KernelError(f"a graph needs at least one body, not {most}")
    bodies = min(most, len(model.contenders))
    overheads = _overheads(overhead_us, bodies)
    us = model.cost(_batches(model, num_tokens, histograms))[:, model.contenders]
    found: dict[float, Shortlist] = {}
    for together in _together(model, groups):
        order, fastest = _greedy(us[:, together], min(bodies, len(together)))
        expected = fastest.mean(1)
        price = overheads[: len(order)] + np.where(np.arange(len(order)) > 0, margin * expected[0], 0.0)
        last = int((expected + price).argmin())
        loss = (fastest / us.min(1)).mean(1) - 1
        gain_us = float(expected[0] - expected[last])
        columns = tuple(model.contenders[together[order[: last + 1]]].tolist())
        expected_us = float(expected[last] + overheads[last])
        short = Shortlist(columns, float(loss[last]), float(loss[0]), gain_us, float(overheads[last]), expected_us)
        found.setdefault(float((expected + price)[last]), short)
    return found[min(found)]


def choice_by_batch_size(model: CostModel, num_tokens: int, host_sync_us: float, ep_size: int = 1) -> Candidate | None:
    """The best single candidate for about `num_tokens`, if the histogram is not worth reading back. None if it is.

    Reading it back takes the host `host_sync_us`. It is worth that if knowing the histogram is predicted to gain more
    than `host_sync_us` and MARGIN. ep_size: as in `representative`. Sizes are rounded up by less than a quarter. Each
    size takes a few hundredths of a second, once for a model.
    """
    step = 1 << max(0, num_tokens.bit_length() - 3)
    size = -(-num_tokens // step) * step
    known = _choices.setdefault(model, {})
    key = size, host_sync_us, ep_size
    if key not in known:
        met = met_at(size, model.shape.num_experts, model.shape.top_k, ep_size)
        prices = {1: 0.0, 2: host_sync_us, MOST: host_sync_us} if host_sync_us < math.inf else {1: 0.0}
        short = shortlist(model.at(size), size, prices, max(prices), histograms=met)
        known[key] = None if short.pays else model.candidates[short.columns[0]]
    return known[key]


def met_at(num_tokens: int, num_experts: int, top_k: int, ep_size: int = 1) -> IntArray:
    """The `representative` histograms; those of fewer tokens, scaled, for more than DRAWN tokens. It then takes
    hundredths of a second, as large batches spread alike."""
    doublings = max(0, (num_tokens - 1).bit_length() - DRAWN.bit_length() + 1)
    return representative(num_tokens >> doublings, num_experts, top_k, ep_size) << doublings


@lru_cache(maxsize=128)
def representative(num_tokens: int, num_experts: int, top_k: int, ep_size: int = 1) -> IntArray:
    """Histograms int64 `[batches, num_experts]`, read-only, that a graph of `num_tokens` may meet; always the same
    ones.

    They cover every kind of routing that profiles are fitted to, full and padded. ep_size: how many ranks share the
    experts, of which these are one rank's. Each token's top_k are spread over all of them. For more than MOST_DRAWN
    tokens a smaller batch is drawn and scaled: larger ones take minutes to draw, and spread no further.
    """
    if doublings := max(0, (num_tokens - 1).bit_length() - MOST_DRAWN.bit_length() + 1):
        scaled = representative(num_tokens >> doublings, num_experts, top_k, ep_size) << doublings
        scaled.flags.writeable = False
        return scaled
    # Tokens are drawn one after the other, so that the first rows of a draw are a draw of fewer. All sizes between two
    # powers of two share one draw.
    drawn = _drawn(1 << (num_tokens - 1).bit_length(), num_experts * ep_size, top_k)
    valid = [math.ceil(share * num_tokens) for share in VALID]
    of_all = (expert_histogram(ids[:n], num_experts * ep_size) for ids in drawn for n in valid)
    histograms = np.stack([histogram[:num_experts] for histogram in of_all])
    histograms.flags.writeable = False
    return histograms


@lru_cache(maxsize=16)
def _drawn(num_tokens: int, num_experts: int, top_k: int) -> list[IntArray]:
    """Top-k ids `[num_tokens, top_k]`, one array for each draw."""
    seeds = max(1, min(SEEDS, CELLS // (len(TUNE_KINDS) * num_tokens * num_experts)))
    return [generate(kind, num_tokens, num_experts, top_k, seed) for kind in TUNE_KINDS for seed in range(seeds)]


def _together(model: CostModel, groups: Sequence[Hashable | None] | None) -> list[IntArray]:
    """Indices into the contenders, one array for each set that can be in a graph together."""
    if groups is None:
        return [np.arange(len(model.contenders))]
    of_group: dict[Hashable, list[int]] = {}
    for i, contender in enumerate(model.contenders.tolist()):
        alone = groups[contender] is None
        of_group.setdefault((alone, contender if alone else groups[contender]), []).append(i)
    return [np.array(together) for together in of_group.values()]


def _batches(model: CostModel, num_tokens: int, histograms: Any) -> IntArray:
    """The checked histograms on which candidates are weighed."""
    shape = model.shape
    if num_tokens < 1:
        raise RoutingError(f"a graph is captured for at least one token, not {num_tokens}")
    if histograms is None:
        return representative(num_tokens, shape.num_experts, shape.top_k)
    batches = check_histogram(histograms, shape.num_experts, num_tokens * shape.top_k)
    if batches.ndim != 2 or not len(batches):
        raise RoutingError(f"recorded histograms must be [batches, {shape.num_experts}], not {list(batches.shape)}")
    return batches


def _overheads(overhead_us: Mapping[int, float], bodies: int) -> FloatArray:
    """Microseconds of overhead for 1, 2, ... `bodies` bodies."""
    known = sorted(overhead_us)
    if not known or known[0] > 1 or known[-1] < bodies:
        raise KernelError(f"the overhead of 1 to {bodies} bodies is needed, it is given for {known or 'none'}")
    us = np.array([overhead_us[n] for n in known], np.float64)
    if not (np.isfinite(us).all() and (us >= 0).all()):
        raise KernelError(f"overheads are microseconds of at least 0, not {us.tolist()}")
    return np.interp(np.arange(1, bodies + 1), known, us)


def _greedy(us: FloatArray, bodies: int) -> tuple[list[int], FloatArray]:
    """Choose greedily from `us [batches, candidates]` in microseconds: at most `bodies` candidates, while each lowers
    the mean of the fastest time.

    Returns their indices in that order, and the fastest time with the first of them, the first two and so on, `[bodies,
    batches]`.
    """
    order: list[int] = []
    fastest, mean = [np.full(len(us), np.inf)], np.inf
    while len(order) < bodies:
        means = np.minimum(us, fastest[-1][:, None]).mean(0)
        best = int(means.argmin())
        if means[best] >= mean:
            break
        mean = means[best]
        order.append(best)
        fastest.append(np.minimum(fastest[-1], us[:, best]))
    return order, np.stack(fastest[1:])
