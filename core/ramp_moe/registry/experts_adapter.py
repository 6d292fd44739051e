"""How a model's modules hold their experts, so that `wrap` can replace them by a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from ..spec.launchable import MoEWeights


HOOK = "_hf_hook"
"""Attribute in which accelerate keeps a module's hook, which it calls in a forward put over the module's."""


class ExpertsAdapter(ABC):
    """One kind of module that holds experts. Importing an adapter and finding modules must need no GPU library.

    name: appears in messages.
    """

    name: str

    @abstractmethod
    def finds(self, module: Module) -> bool:
        """Tell whether the module is of this kind."""

    def hint(self, model: Module) -> str | None:
        """Explain to a person why nothing was found in a model. None if the adapter cannot tell."""
        return None

    @abstractmethod
    def top_k_of(self, module: Module, parent: Module) -> int:
        """Number of experts a token visits.

        parent: the module that holds this one, or the module itself if the model is its own experts. Raises KernelError
        if neither tells.
        """

    @abstractmethod
    def weights(self, module: Module) -> MoEWeights:
        """The weights: the parameters themselves if their layout is one of MoEWeights, copies otherwise.

        Raises RampMoEError with the reason if they cannot be used.
        """

    @abstractmethod
    def names(self, module: Module) -> Mapping[str, str]:
        """The module's attribute that each field of `weights` is made of, by field."""

    def order(self, module: Module) -> Any:
        """What `given` and `own` must know of the module; nothing by default. It does not change."""
        return None

    def given(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        """Convert the module's tensor of some experts `[e, ...]` to the order that `weights` uses for the field; the
        same order by default."""
        return tensor

    def own(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        """The inverse of `given`."""
        return tensor

    @abstractmethod
    def install(self, module: Module) -> Any:
        """Make the module's forward call `experts_of(module)` from now on. Returns what `uninstall` needs."""

    @abstractmethod
    def uninstall(self, module: Module, before: Any) -> None:
        """Undo `install`, which returned `before`."""
