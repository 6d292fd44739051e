"""What the parts of a layer ask of each other, so that each can be read alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..cost_model.model import Candidate
    from ..spec.launchable import Batch, LaunchableKernel, MoEWeights
    from ..spec.shapes import MoEShape


class Owner(Protocol):
    """What a wrapped module calls its layer through."""

    def current(self) -> Layer:
        """The layer of the weights that the module has now."""
        ...


class Layer(Protocol):
    """A layer, to the operator that torch.compile sees of it."""

    @property
    def owner(self) -> Callable[[], Owner | None] | None: ...

    def ready(self, num_tokens: int, dtype: torch.dtype) -> None: ...

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None = None,
        num_valid: Tensor | int | None = None,
    ) -> Tensor: ...


class Launching(Protocol):
    """A layer, to what has a batch computed whatever fails."""

    @property
    def dropped(self) -> dict[str, str]: ...

    def launch(self, candidate: Candidate, batch: Batch, out: Tensor, most: int | None = None) -> None: ...

    def drop(self, candidate: Candidate, reason: str) -> str | None: ...


class Holding(Protocol):
    """A layer, to what gives it new weights."""

    stale: str | None

    @property
    def shape(self) -> MoEShape: ...

    @property
    def held(self) -> Sequence[MoEWeights]: ...

    @property
    def derived(self) -> Collection[str]: ...

    def kernel(self, name: str) -> tuple[LaunchableKernel, Any]: ...

    def weights_of(self, kernel: LaunchableKernel) -> MoEWeights: ...
