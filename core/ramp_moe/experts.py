"""How a model's modules hold their experts, so that `wrap` can have a layer compute them instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from .errors import KernelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .device import MoEWeights
    from .device.routed import RoutedExperts


class ExpertsAdapter(ABC):
    """One kind of module that holds experts. Importing and finding must need no GPU library.

    name: for messages. gate_up, down: names of the module's parameters of the two projections.
    """

    name: str
    gate_up: str
    down: str

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
    def restored(self, module: Module, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        """gate_up and down as the module had them, of what `weights` gave; both are gate-first."""

    @abstractmethod
    def install(self, module: Module) -> Any:
        """Have the module's forward call `experts_of(module)` from now on. Returns what `uninstall` needs."""

    @abstractmethod
    def uninstall(self, module: Module, before: Any) -> None:
        """Undo `install`, which returned `before`."""


@dataclass(frozen=True)
class Experts(ExpertsAdapter):
    """The experts of a module of your own, by the names of its attributes.

    module: its class. gate_up `[E, 2 I, H]` and down `[E, H, I]`, their scales and biases: names of its parameters, as
    `MoEWeights` describes them; so are activation, layout and limit. top_k: the number, or the name of an attribute.
    route: the module and hidden states `[T, H]` to (topk_ids `[T, k]` int32 or int64, topk_weights `[T, k]`), where the
    module's forward takes hidden states `[..., H]` and returns their like. Without it forward takes (hidden states
    `[T, H]`, topk_ids, topk_weights).
    """

    module: type[Module]
    gate_up: str
    down: str
    top_k: int | str
    route: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    gate_up_scale: str | None = None
    down_scale: str | None = None
    gate_up_bias: str | None = None
    down_bias: str | None = None
    activation: str = "swiglu"
    layout: str = "gate-first"
    limit: float | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.module.__name__

    def finds(self, module: Module) -> bool:
        return isinstance(module, self.module)

    def top_k_of(self, module: Module, parent: Module) -> int:
        return int(self._attribute(module, self.top_k)) if isinstance(self.top_k, str) else self.top_k

    def weights(self, module: Module) -> MoEWeights:
        from .device import MoEWeights

        def of(name: str | None) -> Any:
            return None if name is None else self._attribute(module, name).detach()

        return MoEWeights(
            of(self.gate_up),
            of(self.down),
            of(self.gate_up_scale),
            of(self.down_scale),
            of(self.gate_up_bias),
            of(self.down_bias),
            self.activation,
            self.layout,
            self.limit,
        )

    def restored(self, module: Module, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        from .device import relayout

        return relayout(weights, self.layout).gate_up, weights.down

    def install(self, module: Module) -> Any:
        before = module.__dict__.get("forward")
        # A method of the module, so that a deep copy of that calls its own experts.
        module.__dict__["forward"] = MethodType(_as_routed if self.route is None else _routing, module)
        return before

    def uninstall(self, module: Module, before: Any) -> None:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before

    def _attribute(self, module: Module, name: str) -> Any:
        found = getattr(module, name, None)
        if found is None:
            raise KernelError(f"{self.name} has no {name}; name its attributes in ramp_moe.Experts")
        return found


def _as_routed(module: Module, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return _routed(module)(hidden_states, topk_ids, topk_weights)


def _routing(module: Module, hidden_states: Tensor) -> Tensor:
    experts = _routed(module)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    route = cast(Experts, experts.adapter).route
    assert route is not None
    return experts(flat, *route(module, flat)).view_as(hidden_states)


def _routed(module: Module) -> RoutedExperts:
    from .device.routed import experts_of

    found = experts_of(module)
    assert found is not None
    return found
