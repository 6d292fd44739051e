"""Which configurations a short run measures, by what profiles of other shapes say. Nothing is compiled to know it.

A configuration that other shapes timed, and did not prune, is likely to be near the best on this shape, too; one that
all of them pruned is not. Among those that are left, the predicted order matters for a short run. Predictions of single
times are poor. But the fastest by measurement is nearly always among the few that are predicted to be fastest on some
batch (`profiles/studies/profiling`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from ..cost_model.model import CostModel
from ..cost_model.transfer import transfer
from ..dispatch.profile_store import ProfileStore
from ..dispatch.shortlist import met_at
from ..errors import KernelError, ProfileError
from ..spec.hardware import Hardware
from ..spec.kernel import Kernel, KernelConfig, usable_configs
from ..spec.shapes import MoEShape
from .plan import TUNE_SIZES

MOST = ((1.0, 40), (2.0, 64), (4.0, 96))
"""Pairs of minutes and the most configurations of a kernel that a run of at most these minutes measures. A longer one
measures all, and prunes by its own times."""

WITHOUT_STAGES = 2.0
"""Most minutes of a run that times whole paths alone. Stages cost as much as the paths, by which dispatch goes."""


def promising(
    shape: MoEShape, hardware: Hardware, kernels: Sequence[Kernel], store: ProfileStore, minutes: float
) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the configurations to measure in a run of these minutes, by kernel; and notes on what is left out.

    Of a kernel that no other shape was profiled with, all are measured.
    """
    most = next((n for limit, n in MOST if minutes <= limit), math.inf)
    found, notes = dict[str, list[str]](), list[str]()
    for kernel in kernels:
        configs = usable_configs(kernel, shape, hardware)
        names = [c.name for c in configs]
        kept = names if len(names) <= most else _kept(kernel, configs, shape, hardware, store, int(most))
        found[kernel.name] = kept
        if len(kept) < len(names):
            notes.append(
                f"{kernel.name}: {len(kept)} of {len(names)} configurations are measured, the most promising by other "
                f"shapes' profiles; over {MOST[-1][0]:g} minutes all are"
            )
    return found, notes


def _kept(
    kernel: Kernel,
    configs: Sequence[KernelConfig],
    shape: MoEShape,
    hardware: Hardware,
    store: ProfileStore,
    most: int,
) -> list[str]:
    """At most `most` names of configurations, in the kernel's order; all if no other shape tells anything."""
    names = [c.name for c in configs]
    sweeps = store.of_other_shapes(kernel.name, shape, hardware)
    try:
        if not sweeps:
            return names
        model = transfer(sweeps, partial(usable_configs, kernel, hardware=hardware), shape, hardware)
    except (KernelError, ProfileError):
        return names
    first = {*ranked(model)[:most]}
    return [name for name in names if name in first]


def ranked(model: CostModel) -> list[str]:
    """Names of a model's configurations, the most promising first: by the best place that each is predicted to have on
    any batch, and among equal ones by how near it is to the fastest there."""
    shape = model.shape
    us = np.concatenate([model.cost(met_at(n, shape.num_experts, shape.top_k)) for n in TUNE_SIZES])
    place = us.argsort(1, kind="stable").argsort(1, kind="stable").min(0)
    nearest = (us / us.min(1, keepdims=True)).min(0)
    return [model.candidates[i].config.name for i in np.lexsort((nearest, place))]
