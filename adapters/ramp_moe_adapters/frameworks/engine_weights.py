"""Keeps an engine's parameters and the layer that is made from them in step.

Engines write into their parameters as long as they run: in reloads, and in the weight updates of reinforcement
learning. If the layer holds a parameter in another order of rows, or derives something from it, the parameter becomes a
placeholder. It has the engine's order, reads what the layer holds, and writes through to it. Other parameters share the
layer's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from ramp_moe.plugin import KernelError, MoEWeights, ShapeError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.placeholder import Placeholder, Source, become
from ramp_moe.runtime.relayout import ROWS, relayout
from ramp_moe.runtime.release import WEIGHTS
from ramp_moe.runtime.update import check_fits, put, storage, writing
from torch import Tensor

LAYOUT = "gate-first"
"""Order of rows in vLLM and SGLang."""


class Parameters:
    """The parameters that a layer was made from, by field of MoEWeights. From now on they follow what the layer holds.

    owner: the object that has them; it must support weak references.

    Raises KernelError if a parameter cannot become a placeholder. All parameters are then unchanged.
    """

    def __init__(self, owner: Any, layer: LayerRuntime, tensors: Mapping[str, Tensor]) -> None:
        self.layer, self._owner = layer, weakref.ref(owner)
        self._follow(tensors)

    def meet(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the layer compute with the engine's present parameters, if these were exchanged or given other memory.

        Captured CUDA graphs then compute with them, too. Raises KernelError during a capture. Raises RampMoEError if
        the parameters do not fit the layer, which then computes no batch until fitting ones are loaded.
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
        """Have the layer compute with these parameters, and derive again what kernels derived from them.

        Parameters that follow the layer have their values there already. Others are read, and follow it from then on.
        Raises RampMoEError as `meet` does.
        """
        if missing := self._tensors.keys() - tensors.keys():
            raise ShapeError(f"the layer was made with {', '.join(sorted(missing))}, which the engine no longer has")
        new: dict[str, Any] = {field: t.detach() for field, t in tensors.items() if not self._follows(t)}
        held = self.layer.held[0]
        with writing(self.layer):
            given = replace(held, **new)  # packed weights are bytes there
            check_fits(held, given)
            for field in new:
                put(self.layer, field, getattr(given, field), LAYOUT)
        self._follow(tensors)

    def check(self) -> None:
        """Raises KernelError if the layer has no weights since an update failed."""
        if self.layer.stale is not None:
            raise KernelError(self.layer.stale)

    def values(self) -> MoEWeights:
        """The layer's weights in the engine's order, for kernels of the engine; a copy if rows were reordered.

        Raises KernelError as `check` does.
        """
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
        """Whether a write to the parameter reaches the layer and all that is derived from it."""
        return isinstance(tensor, Placeholder) and tensor._source.layer is self.layer


class Repacked:
    """The parameters of a layer whose kernels hold the weights in formats of their own alone. They are emptied.

    Their last dimension is then 0; biases stay. Engines must load new weights whole, into parameters of their first
    shape, and give them to `load`.

    dtype: of hidden states. make: makes MoEWeights of the parameters.

    Raises KernelError if a kernel reads the weights as they were given, or computes something else. The parameters are
    then unchanged.
    """

    def __init__(
        self,
        layer: LayerRuntime,
        dtype: torch.dtype,
        tensors: Mapping[str, Tensor],
        make: Callable[[Mapping[str, Tensor]], MoEWeights],
    ) -> None:
        self.layer, self._make = layer, make
        layer.release(dtype)
        self._empty(tensors)

    def meet(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the layer compute with parameters that were loaded since; see `Parameters.meet`."""
        if all(tensors[field].numel() == 0 for field in WEIGHTS if field in tensors):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise KernelError("weights were loaded since the layer last ran; run it once before it is captured")
        self.load(tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Have kernels derive again what they hold, from newly loaded parameters, and empty those.

        Does nothing if nothing was loaded. Raises RampMoEError as `meet` does.
        """
        given = [field for field in WEIGHTS if field in tensors]
        if loaded := [field for field in given if tensors[field].numel()]:
            if loaded != given:
                raise ShapeError(f"{', '.join(loaded)} were loaded without the others, which the layer has repacked")
            self.layer.update(self._make(tensors))
            self._empty(tensors)

    def check(self) -> None:
        """Raises KernelError if the layer has no weights since an update failed."""
        if self.layer.stale is not None:
            raise KernelError(self.layer.stale)

    def values(self) -> MoEWeights:
        """Raises KernelError: no kernel of the engine can read the weights."""
        raise KernelError(f"the weights are held in a format of {', '.join(self.layer.kernels)} alone")

    def _empty(self, tensors: Mapping[str, Tensor]) -> None:
        for field in WEIGHTS:
            if field in tensors:
                tensors[field].data = tensors[field].data.new_empty((*tensors[field].shape[:-1], 0))


class _AsGiven:
    """The part of an adapter that a Source needs, for an engine whose tensors are those of MoEWeights."""

    def given(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        return tensor

    def own(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        return tensor


_AS_GIVEN: Any = _AsGiven()


def place(tensor: Tensor) -> object:
    """A value that changes if a parameter is given other memory."""
    return id(tensor._source) if isinstance(tensor, Placeholder) else tensor.data_ptr()
