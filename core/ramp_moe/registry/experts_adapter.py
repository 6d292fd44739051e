"""How a model's modules hold their experts, so that `wrap` can have a layer compute them instead."""

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
    """One kind of module that holds experts. Importing and finding must need no GPU library.

    name: for messages.
    """

    name: str

    @abstractmethod
    def finds(self, module: Module) -> bool:
        """Whether the module is of this kind."""

    def hint(self, model: Module) -> str | None:
        """Why nothing was found in a model, for a person to read, where the adapter can tell."""
        return None

    @abstractmethod
    def top_k_of(self, module: Module, parent: Module) -> int:
        """Experts a token. parent: the module that holds this one, itself for a model that is its own experts. Raises
        KernelError if neither tells."""

    @abstractmethod
    def weights(self, module: Module) -> MoEWeights:
        """The parameters themselves where they lie as MoEWeights wants them, copies of them where not. Raises
        RampMoEError with the reason why they cannot be used."""

    @abstractmethod
    def names(self, module: Module) -> Mapping[str, str]:
        """By field of what `weights` gives, the name of the module's attribute that it is made of."""

    def order(self, module: Module) -> Any:
        """What `given` and `own` must know of the module; nothing by default. It does not change."""
        return None

    def given(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        """The module's tensor of some experts `[e, ...]`, as `weights` gives the field: as it is by default."""
        return tensor

    def own(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        """The inverse of `given`."""
        return tensor

    @abstractmethod
    def install(self, module: Module) -> Any:
        """Have the module's forward call `experts_of(module)` from now on. Returns what `uninstall` needs."""

    @abstractmethod
    def uninstall(self, module: Module, before: Any) -> None:
        """Undo `install`, which returned `before`."""
