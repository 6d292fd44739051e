"""Choosing the layouts in which to hold the weights, if kernels read different ones and memory allows few copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..cost_model.model import CostModel
from ..errors import KernelError
from ..spec.kernel import LAYOUTS, Kernel, layouts_of
from ..spec.routing import FloatArray, IntArray, expert_histogram, generate
from ..spec.shapes import MoEShape

UNIFORM_TOKENS = tuple(2**i for i in range(13))
"""Batch sizes, 1 to 4096, on which layouts are weighed if the batches of a profile are not at hand."""


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """Layouts in which to hold the weights, a copy each, and the kernels that read one of them.

    `bytes` counts all copies; those in LAYOUTS share the down projection. `loss` is the mean of the time of the best of
    these kernels relative to that of the best of all, less one. It is 0 if there are no times.
    """

    layouts: tuple[str, ...]
    kernels: tuple[str, ...]
    bytes: int
    loss: float


def choose_layouts(
    shape: MoEShape,
    kernels: Sequence[Kernel],
    copies: int = 1,
    times_us: FloatArray | None = None,
    given: str = "gate-first",
) -> LayoutChoice:
    """Choose the best set of at most `copies` layouts for these kernels, which are listed by preference.

    `times_us [batches, kernels]` holds the microseconds of each kernel's best configuration, infinite if unknown. With
    it, the set that loses least is chosen. Among equals, the fewest copies win, then the set that serves the first
    kernel, then the second, and so on. Without it, serving the kernels in their order comes first. If all else is
    equal, the layout in which the weights are `given` is preferred. Raises KernelError without kernels or copies, or
    for a kernel that does not name its layouts.
    """
    if not kernels:
        raise KernelError("there is no kernel to choose weight layouts for")
    if copies < 1:
        raise KernelError(f"the weights need at least one copy, not {copies}")
    read = [set(layouts_of(k, shape)) for k in kernels]
    wanted = dict.fromkeys(key for k in kernels for key in layouts_of(k, shape))
    known = sorted(wanted, key=lambda key: key != given)  # stable: the order of the kernels otherwise

    def judged(layouts: tuple[str, ...]) -> tuple[tuple[object, ...], LayoutChoice]:
        served = [not keys.isdisjoint(layouts) for keys in read]
        loss = 0.0 if times_us is None else _loss(times_us, served)
        names = tuple(k.name for k, ok in zip(kernels, served, strict=True) if ok)
        choice = LayoutChoice(layouts, names, _bytes(shape, kernels, layouts), loss)
        missed = tuple(not ok for ok in served)
        order = (missed, len(layouts)) if times_us is None else (loss, len(layouts), missed)
        return (*order, choice.bytes), choice

    sizes = range(1, min(copies, len(known)) + 1)
    sets = itertools.chain.from_iterable(itertools.combinations(known, size) for size in sizes)
    return min(map(judged, sets), key=lambda found: found[0])[1]


def why_not_served(
    shape: MoEShape,
    kernels: Sequence[Kernel],
    kernel: Kernel,
    copies: int,
    times_us: FloatArray | None,
    given: str,
) -> str:
    """Explain why `choose_layouts`, given the same arguments, does not serve `kernel`, and how many copies would."""
    held = choose_layouts(shape, kernels, copies, times_us, given).layouts
    layouts = layouts_of(kernel, shape)
    most = len({key for k in kernels for key in layouts_of(k, shape)})
    enough = next(
        (
            more
            for more in range(copies + 1, most + 1)
            if kernel.name in choose_layouts(shape, kernels, more, times_us, given).kernels
        ),
        None,
    )
    remedy = (
        "a copy for it would gain nothing by the cost model" if enough is None else f"copies={enough} would keep it"
    )
    return f"reads weights in {' or '.join(layouts)}, which are held in {' and '.join(held)} alone; {remedy}"


def weighed_batches(model: CostModel) -> IntArray:
    """Histograms int64 `[batches, num_experts]` on which layouts are weighed.

    They are the batches that the model was fitted to, or evenly drawn batches of UNIFORM_TOKENS if those are not at
    hand.
    """
    if model.histograms is not None:
        return model.histograms
    shape = model.shape
    drawn = (generate("uniform", tokens, shape.num_experts, shape.top_k) for tokens in UNIFORM_TOKENS)
    return np.stack([expert_histogram(ids, shape.num_experts) for ids in drawn])


def kernel_times(model: CostModel, kernels: Iterable[str], histograms: IntArray) -> FloatArray:
    """Predicted microseconds `[batches, kernels]` of each kernel's best candidate; infinite if the model does not have
    the kernel.

    histograms: checked, int64 `[batches, num_experts]`.
    """
    us = model.cost(histograms)
    of = np.array([c.kernel for c in model.candidates])
    return np.stack([us[:, of == kernel].min(1, initial=np.inf) for kernel in kernels], axis=1)


def _loss(times_us: FloatArray, served: Sequence[bool]) -> float:
    best = times_us[:, np.asarray(served)].min(1, initial=np.inf)
    return float((best / times_us.min(1)).mean() - 1)


def _bytes(shape: MoEShape, kernels: Sequence[Kernel], layouts: Sequence[str]) -> int:
    own = {layout.key: layout.bytes for layout in (k.weight_layout(shape) for k in kernels)}
    plain = sum(key in LAYOUTS for key in layouts)
    shared = shape.num_experts * (plain * shape.gate_up_bytes + (shape.down_bytes if plain else 0))
    experts = shape.num_experts * shape.expert_bytes
    return shared + sum(own.get(key, experts) for key in layouts if key not in LAYOUTS)
