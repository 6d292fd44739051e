"""Why a candidate is chosen for a batch: what each is predicted to cost, and what the weights' layout rules out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ..cost_model.model import CostModel
from ..spec.kernel import Kernel, KernelConfig, most_tokens
from ..spec.routing import FloatArray, IntArray
from .weight_layouts import choose_layouts, kernel_times, weighed_batches


def grid_figures(config: KernelConfig, histogram: IntArray, num_sms: int) -> list[dict[str, Any]]:
    """What each GEMM of a configuration launches for a batch."""
    return [
        {
            "token_block": g.block_m,
            "m_tiles": int(g.m_tiles(histogram)),
            "ctas": int(g.logical(histogram)),
            "waves": int(g.waves(histogram, num_sms)),
            "tail_utilisation": float(g.tail_utilisation(histogram, num_sms)),
            "padding_waste": float(g.padding_waste(histogram)),
        }
        for g in config.gemms
    ]


def rank(kernels: Mapping[str, Kernel], model: CostModel, histogram: IntArray) -> list[dict[str, Any]]:
    """Every candidate with its prediction and what the model sees of it, the fastest first. `launches`: in how many a
    layer computes the batch, since one takes no more tokens than `max_tokens`; None if any number."""
    prediction, tokens = model.predict(histogram), -(-int(histogram.sum()) // model.shape.top_k)
    rows = []
    for i in np.argsort(prediction.us, kind="stable").tolist():
        candidate = model.candidates[i]
        most = most_tokens(kernels[candidate.kernel], candidate.config, model.shape)
        rows.append(
            {
                "kernel": candidate.kernel,
                "config": candidate.config.name,
                "predicted_us": float(prediction.us[i]),
                "extrapolated": bool(prediction.extrapolated[i]),
                "gemms": grid_figures(candidate.config, histogram, model.hardware.num_sms),
                "max_tokens": most,
                "launches": 1 if most is None else max(1, -(-tokens // most)),
            }
        )
    return rows


def in_parts(candidates: list[dict[str, Any]]) -> list[str]:
    """What is to be said of kernels that take the batch in several launches."""
    most: dict[str, int] = {}
    for c in candidates:
        if c["launches"] > 1:
            most[c["kernel"]] = max(c["max_tokens"], most.get(c["kernel"], 0))
    return [f"{kernel} takes up to {n:,} tokens in one launch; the batch runs in parts" for kernel, n in most.items()]


def weigh_layouts(kernels: Mapping[str, Kernel], model: CostModel, histogram: IntArray) -> dict[str, Any]:
    """What one copy of the weights serves, what two serve, and the predicted gain of the second copy.

    The gain is a fraction of the time with two copies: for this batch, and the mean over `weighed_batches`.
    """
    names = sorted({c.kernel for c in model.candidates})
    described, batches = [kernels[name] for name in names], weighed_batches(model)
    weighed, here = (kernel_times(model, names, h) for h in (batches, histogram[None]))
    one, two = (choose_layouts(model.shape, described, copies, weighed) for copies in (1, 2))

    def gain(us: FloatArray) -> float:
        with_one, with_two = (us[:, [names.index(k) for k in c.kernels]].min(1) for c in (one, two))
        return float((with_one / with_two).mean() - 1)

    return {
        "one_copy": asdict(one),
        "two_copies": asdict(two),
        "gain_of_second": {"this_batch": gain(here), "weighed": gain(weighed)},
        "weighed": {"batches": len(batches), "profiled": model.histograms is not None},
    }
