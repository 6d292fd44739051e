"""The options by which a layer finds and chooses its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost_model.model import CostModel
from ..errors import KernelError, UnknownNameError
from ..spec.formats import ENDINGS

if TYPE_CHECKING:
    from ..spec.launchable import LaunchableKernel

MODES = ("nodes", "switch", "inline", "gated", "single")
"""Ways in which a CUDA graph dispatches (see `graphs.capture`), the cheapest for two bodies first."""


@dataclass(frozen=True, kw_only=True)
class DispatchOptions:
    """How a `MoELayer` finds its kernels and chooses among them. The defaults suit most layers.

    kernels: launchable kernels, or names of registered ones, by preference. None: all that run here.
    cost_model: predicts their times. None: it is fitted to the profiles of the shape and the GPU.
    profiles: files and folders of profiles. They come before the user's own and those that ship.
    copies: most layouts in which the weights may be held. A second one serves kernels that the first does not.
    mode: how CUDA graphs dispatch, one of MODES. None: the cheapest that runs here.
    host_sync_us: microseconds that it costs to read a batch's histogram back. If that is predicted to gain less at a
        batch size, one kernel computes that size. 0: always read; math.inf: never. None: 300 on a GPU, 0 elsewhere.
    ep_size: ranks that share the experts, of which the layer has one rank's.
    activations: what kernels may at most round activations of quantised weights to, "bf16" (16 bits: nothing) or "fp8".
        It changes the accuracy. None: what the weights say, which by default is what the engines that serve them do.
    checked: read the ids of every batch back, and raise RoutingError for one out of range instead of skipping it.

    Raises KernelError for a value that cannot be, UnknownNameError for a mode or a rounding that does not exist.
    """

    kernels: Sequence[LaunchableKernel | str] | None = None
    cost_model: CostModel | None = None
    profiles: Sequence[str | Path] = ()
    copies: int = 1
    mode: str | None = None
    host_sync_us: float | None = None
    ep_size: int = 1
    activations: str | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        for name in ("kernels", "profiles"):
            value = getattr(self, name)
            if isinstance(value, str | bytes | Path) or not (value is None or isinstance(value, Sequence)):
                raise KernelError(f"{name} must be a list, not {value!r:.60}; write {name}=[...]")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if strays := [path for path in self.profiles if not isinstance(path, str | Path)]:
            raise KernelError(f"profiles must be names of files and folders, not {strays[0]!r:.60}")
        for name in ("copies", "ep_size"):
            value = getattr(self, name)
            if not _is(value, int) or value < 1:
                raise KernelError(f"{name} must be a whole number of at least 1, not {value!r:.60}")
        wait = self.host_sync_us
        if wait is not None and not (_is(wait, int | float) and wait >= 0 and not math.isnan(wait)):
            raise KernelError(f"host_sync_us must be microseconds of at least 0, or None, not {wait!r:.60}")
        if not (self.cost_model is None or isinstance(self.cost_model, CostModel)):
            raise KernelError(f"cost_model must be a CostModel or None, not {self.cost_model!r:.60}")
        if self.activations is not None and self.activations not in ENDINGS:
            raise UnknownNameError("rounding of activations", str(self.activations), ENDINGS)
        if self.mode is not None and self.mode not in MODES:
            raise UnknownNameError("mode of dispatch in graphs", str(self.mode), MODES)
        if not isinstance(self.checked, bool):
            raise KernelError(f"checked must be True or False, not {self.checked!r:.60}")


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
