"""Protocols through which the parts of a layer use each other, so that each can be read by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..cost_model.model import Candidate
    from ..spec.launchable import Batch, LaunchableKernel, MoEWeights
    from ..spec.shapes import MoEShape


class Owner(Protocol):
    """The wrapped module's experts, as its layer sees them."""

    def current(self) -> Layer:
        """The layer of the module's present weights."""
        ...


class Layer(Protocol):
    """A layer, as the operator for torch.compile sees it."""

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
    """A layer, as the fallback sees it, which has a batch computed whatever fails."""

    @property
    def dropped(self) -> dict[str, str]: ...

    def launch(self, candidate: Candidate, batch: Batch, out: Tensor, most: int | None = None) -> None: ...

    def drop(self, candidate: Candidate, reason: str) -> str | None: ...


class Holding(Protocol):
    """A layer, as an update of its weights sees it."""

    stale: str | None

    @property
    def shape(self) -> MoEShape: ...

    @property
    def held(self) -> Sequence[MoEWeights]: ...

    @property
    def derived(self) -> Collection[str]: ...

    def kernel(self, name: str) -> tuple[LaunchableKernel, Any]: ...

    def weights_of(self, kernel: LaunchableKernel) -> MoEWeights: ...


class Running(Protocol):
    """A layer, as the check before its weights are given up sees it."""

    @property
    def shape(self) -> MoEShape: ...

    @property
    def held(self) -> Sequence[MoEWeights]: ...

    @property
    def kernels(self) -> Mapping[str, LaunchableKernel]: ...

    def kernel(self, name: str) -> tuple[LaunchableKernel, Any]: ...

    def choose(self, batch: Batch) -> Candidate: ...

    def launch(self, candidate: Candidate, batch: Batch, out: Tensor, most: int | None = None) -> None: ...
