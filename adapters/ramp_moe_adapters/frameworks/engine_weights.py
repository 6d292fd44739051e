"""An engine's parameters and the layer that is made of them.

Engines write into their parameters as long as they run: reloads, and the weight updates of reinforcement learning. What
the layer holds in another order of rows, or derives something from, is a placeholder in the engine. It has the engine's
order, reads what the layer holds, and writes through to it. Other parameters are the layer's own memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from ramp_moe.plugin import KernelError, MoEWeights, ShapeError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.placeholder import Placeholder, Source, become
from ramp_moe.runtime.relayout import ROWS, relayout
from ramp_moe.runtime.update import check_fits, put, storage, writing
from torch import Tensor

LAYOUT = "gate-first"
"""vLLM's and SGLang's order of rows."""


class Parameters:
    """The parameters that a layer was made of, by field of MoEWeights. From now on they follow what the layer holds.

    owner: what has them; anything that can be referred to weakly. Raises KernelError if one cannot be exchanged for a
    placeholder; all are then as they were.
    """

    def __init__(self, owner: Any, layer: LayerRuntime, tensors: Mapping[str, Tensor]) -> None:
        self.layer, self._owner = layer, weakref.ref(owner)
        self._follow(tensors)

    def meet(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the layer compute with the engine's parameters of now, if they have been exchanged or given other
        memory since. Captured CUDA graphs compute with them, too.

        Raises KernelError in a capture, and RampMoEError if the parameters do not fit the layer. It then computes no
        batch until some do.
        """
        known = self._tensors
        if tensors.keys() == known.keys() and all(
            t is known[field] and place(t) == self._places[field] for field, t in tensors.items()
        ):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise KernelError("weights were exchanged since the layer last ran; run it once before it is captured")
        self.load(tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the layer compute with these parameters, and derive again what kernels derived. Those that follow the
        layer have their values there already; others are read, and follow it from then on. Raises RampMoEError as
        `meet` does."""
        if missing := self._tensors.keys() - tensors.keys():
            raise ShapeError(f"the layer was made with {', '.join(sorted(missing))}, which the engine has no more")
        new: dict[str, Any] = {field: t.detach() for field, t in tensors.items() if not self._follows(t)}
        held = self.layer.held[0]
        with writing(self.layer):
            check_fits(held, replace(held, **new))
            for field, tensor in new.items():
                put(self.layer, field, tensor, LAYOUT)
        self._follow(tensors)

    def check(self) -> None:
        """Raises KernelError if the layer has no weights since an update failed."""
        if self.layer.stale is not None:
            raise KernelError(self.layer.stale)

    def values(self) -> MoEWeights:
        """What the layer holds, in the engine's order, for kernels of the engine; a copy if rows were moved. Raises
        KernelError as `check` does."""
        self.check()
        return relayout(self.layer.held[0], LAYOUT)

    def _follow(self, tensors: Mapping[str, Tensor]) -> None:
        before: list[tuple[Tensor, Tensor]] = []
        held, derived = self.layer.held, self.layer.derived
        try:
            for field, tensor in tensors.items():
                if self._follows(tensor):
                    continue
                before.append((tensor, tensor.detach()))
                ours = next((getattr(h, field) for h in held if field not in ROWS or h.layout == LAYOUT), None)
                if ours is not None and storage(ours) != storage(tensor):
                    tensor.data = ours
                if ours is None or derived or (field in ROWS and len(held) > 1):
                    source = Source(self.layer, _AS_GIVEN, self._owner, field, field, None, LAYOUT, tensor.dtype, ours)
                    become(tensor, Placeholder(source, tensor.detach()))
        except BaseException:
            for tensor, data in before:
                if isinstance(tensor, Placeholder):
                    become(tensor, data)
                tensor.data = data
            raise
        self._tensors = dict(tensors)
        self._places = {field: place(t) for field, t in tensors.items()}

    def _follows(self, tensor: Tensor) -> bool:
        """Whether what is written to the parameter reaches the layer, and all that is derived from it."""
        return isinstance(tensor, Placeholder) and tensor._source.layer is self.layer


class _AsGiven:
    """What a Source asks of an adapter: an engine's tensors are those of MoEWeights."""

    def given(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        return tensor

    def own(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        return tensor


_AS_GIVEN: Any = _AsGiven()


def place(tensor: Tensor) -> object:
    """What changes if a parameter is given other memory."""
    return id(tensor._source) if isinstance(tensor, Placeholder) else tensor.data_ptr()
