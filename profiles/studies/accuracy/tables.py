"""Computes the errors of formats in the README beside this, with the reference in float32.

`python profiles/pages.py --write accuracy` fills the page. No GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from pages import over, table
from ramp_moe import generate
from ramp_moe.runtime.formats import quantise
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.formats import FORMATS
from ramp_moe.spec.launchable import Batch, MoEWeights
from torch import Tensor

EXPERTS, TOP_K, HIDDEN, INTER, TOKENS = 8, 2, 1024, 512, 256
NAMES = tuple(name for name, stored in FORMATS.items() if name == stored.weights and stored.scale is not None)
KINDS: Mapping[str, float] = {"normal": 0.0, "outliers": 0.01}
"""Kinds of hidden states: the share of columns that are multiplied by OUTLIER."""
OUTLIER = 20.0


@dataclass(frozen=True)
class Layer:
    """A layer in float32 and a batch for it, both drawn from a seed."""

    gate_up: Tensor
    down: Tensor
    batch: Batch

    def stored(self, name: str) -> MoEWeights:
        """The weights rounded to a format."""
        halves = [quantise(half, name) for half in self.gate_up.chunk(2, 1)]
        gate_up, scale = (torch.cat(parts, 1) for parts in zip(*halves, strict=True))
        down, down_scale = quantise(self.down, name)
        return MoEWeights(gate_up, down, scale, down_scale, format=name)

    def exact(self) -> Tensor:
        """The output float32 `[TOKENS, HIDDEN]` of the original weights. They are bf16 values, and taken as exact."""
        return reference(MoEWeights(self.gate_up.bfloat16(), self.down.bfloat16()), self.batch)


@cache
def layer(kind: str) -> Layer:
    """A layer with weights of a trained layer's size, exact in bf16. Hidden states are normal, with outlier columns if
    the kind has any."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16().float()

    gate_up, down = drawn(EXPERTS, 2 * INTER, HIDDEN), drawn(EXPERTS, HIDDEN, INTER)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    x[:, torch.rand(HIDDEN, generator=generator) < KINDS[kind]] *= OUTLIER
    ids = torch.from_numpy(generate("uniform", TOKENS, EXPERTS, TOP_K, seed=0)).int()
    weights = torch.randn(TOKENS, TOP_K, generator=generator).softmax(-1)
    return Layer(gate_up, down, Batch(x.bfloat16(), ids, weights))


def error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def errors(kind: str) -> Iterator[tuple[str, float, float, float]]:
    """(format, error of its weights, error of rounding activations, error of both) for each format, relative."""
    of = layer(kind)
    exact = of.exact()
    for name in NAMES:
        weights = of.stored(name)
        plain, rounded = (reference(weights, of.batch, activations) for activations in ("bf16", "fp8"))
        yield name, error(plain, exact), error(rounded, plain), error(rounded, exact)


def accuracy() -> str:
    of = {kind: list(errors(kind)) for kind in KINDS}
    rows = []
    for normal, outliers in zip(*of.values(), strict=True):
        stored = FORMATS[normal[0]]
        group = stored.activation_group
        figures = [f"{value:.4f}" for row in (normal, outliers) for value in row[1:]]
        rows.append((normal[0], "fp8" if stored.rounds else "none", "token" if group is None else group, *figures))
    head = ["format", "its engine rounds activations to", "columns per scale of activations"]
    columns = ("weights", "activations", "both")
    return table(head + [f"{kind}: {column}" for kind in KINDS for column in columns], rows)


TABLES = over(lambda: None, {"accuracy": lambda _: accuracy()})
