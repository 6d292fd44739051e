"""Computes the table of the README beside this from the shipped profiles.

`python profiles/pages.py --write compiling` fills the page.
"""

from __future__ import annotations

from pages import table
from ramp_moe import CostModel
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.worth import MOST, SIZES, Worth, worth_compiling
from studies.shipped import MODELS, h200, registry, store

AHEAD = "cute"
UNMEASURED = ("glm-4.5-air", "qwen3-235b-a22b-tp4")
SHOWN = (0, 1, 4, 8, 16)
"""Numbers of compiled configurations whose loss is shown."""


def loss() -> str:
    """Predicted mean loss by the number of compiled configurations."""
    head = ["model", "configurations", *(f"loss with {n}" for n in SHOWN), "worth compiling", "loss with these"]
    return table(head, [_row(name, dtype) for name in (*MODELS, *UNMEASURED) for dtype in ("fp8", "bf16")])


def _row(name: str, dtype: str) -> list[object]:
    model, _ = load_model(registry, store, registry.shape(name, dtype), h200, ["triton", AHEAD])
    others = {c.name for c in model.candidates if c.kernel != AHEAD}
    order = [c.name for c in worth_compiling(model, others)]
    losses = [f"{_loss(model, {*others, *order[:n]}):.1%}" for n in SHOWN]
    by = " (guessed)" if model.guessed else ""
    every = len(model.candidates) - len(others)
    count = f"{len(order)}{' (the most)' if len(order) == MOST else ''}"
    return [f"{name} {dtype}{by}", every, *losses, count, f"{_loss(model, {*others, *order}):.1%}"]


def _loss(model: CostModel, ready: set[str]) -> float:
    return Worth(model, ready).loss(SIZES)


TABLES = {"loss": loss}
