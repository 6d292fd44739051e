"""Reports what computes batches of each size."""

from __future__ import annotations

from collections.abc import Sequence

from ..cost_model.model import CostModel
from ..dispatch.shortlist import MOST, met_at, shortlist
from ..measurements.calibration_file import PlanRow
from ..measurements.plan_table import table
from .calibrated_plan import Calibrated
from .calibration import ENGINE, MARGIN
from .graphs.capture import GraphDispatch

__all__ = ["left", "plan_rows", "table"]

EAGER = "eager"
ALONE: dict[int, float] = {1: 0.0}
FREE: dict[int, float] = {1: 0.0, MOST: 0.0}


def plan_rows(
    made: Calibrated, graphs: GraphDispatch | None, captured: Sequence[int], eager: Sequence[int], ep_size: int
) -> list[PlanRow]:
    """One row for each captured size, then one for each eager size.

    graphs: of one of the shape's layers; None if none dispatches in graphs.
    """
    model = made.plan.model
    assert model is not None
    sizes = [(n, graphs) for n in sorted(captured)] + [(n, None) for n in sorted(eager)]
    return [_row(made, model, in_graph, n, ep_size) for n, in_graph in sizes]


def _row(made: Calibrated, model: CostModel, graphs: GraphDispatch | None, n: int, ep_size: int) -> PlanRow:
    found = made.found
    mode = EAGER if graphs is None else "single"
    if made.keeps(n):
        return PlanRow(n, ENGINE, mode, 1, None, None, found.us(ENGINE, n))
    part, met = model.at(n), met_at(n, model.num_experts, model.shape.top_k, ep_size)
    free_us = None
    if n in found.tokens:  # at other sizes it is not worth its time
        free_us = shortlist(part, n, FREE, MOST, 0.0, met).gain_us
    if graphs is None:
        short = shortlist(part, n, ALONE, 1, 0.0, met)
    else:
        mode, part, short = graphs.outlook(n)
    first = part.candidates[short.columns[0]].name
    predicted = made.predicted.get(n) if made.chosen.get(n) == first else None
    if not made.found.tokens:  # nothing was measured: the model's times are those that it predicts
        predicted = short.expected_us
    return PlanRow(n, first, mode, len(short.columns), predicted, found.us(first, n), found.us(ENGINE, n), free_us)


def left(made: Calibrated, rows: Sequence[PlanRow], engine: str) -> str:
    """One line on the sizes that the engine keeps, and on what was left out and why; empty if there is neither."""
    kept = [str(r.tokens) for r in rows if r.choice == ENGINE]
    faults = sorted(made.found.dropped.items())
    dropped = "; ".join(f"{name or engine}: {reason}" for name, reason in faults)
    parts = [f"{engine}'s own path keeps {', '.join(kept)} tokens: nothing is {MARGIN - 1:.0%} faster" if kept else ""]
    if not made.engine:
        parts.append(f"{engine}'s own path keeps nothing: the weights are held in an order that it does not read")
    parts.append(f"left out: {dropped}" if dropped else "")
    return ". ".join(part for part in parts if part)
