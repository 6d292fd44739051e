"""How a model's modules hold their experts, so that `wrap` can have a layer compute them instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import KernelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from .device import MoEWeights

    Call = Callable[[Tensor, Tensor, Tensor], Tensor]
    """Hidden states `[T, H]`, top-k ids `[T, k]` and weights `[T, k]` to the weighted sum of the experts `[T, H]`."""


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
    def top_k_of(self, module: Module) -> int:
        """Experts a token. Raises KernelError where the module does not tell."""

    @abstractmethod
    def weights(self, module: Module) -> MoEWeights:
        """The parameters themselves where they lie as MoEWeights wants them, copies of them where not. Raises
        RampMoEError with the reason why they cannot be used."""

    @abstractmethod
    def restored(self, module: Module, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        """gate_up and down as the module had them, of what `weights` gave; both are gate-first."""

    @abstractmethod
    def install(self, module: Module, experts: Call) -> Callable[[], None]:
        """Have the module call this from now on. Returns what undoes it."""


@dataclass(frozen=True)
class Experts(ExpertsAdapter):
    """The experts of a module of your own, by the names of its attributes.

    module: its class. gate_up `[E, 2 I, H]` and down `[E, H, I]`, their scales and biases: names of its parameters, as
    `MoEWeights` describes them; so are activation and layout. top_k: the number, or the name of an attribute.
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

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.module.__name__

    def finds(self, module: Module) -> bool:
        return isinstance(module, self.module)

    def top_k_of(self, module: Module) -> int:
        return int(self._attribute(module, self.top_k)) if isinstance(self.top_k, str) else self.top_k

    def weights(self, module: Module) -> MoEWeights:
        from .device import MoEWeights

        names = (self.gate_up, self.down, self.gate_up_scale, self.down_scale, self.gate_up_bias, self.down_bias)
        found = [None if name is None else self._attribute(module, name).detach() for name in names]
        return MoEWeights(*found, self.activation, self.layout)

    def restored(self, module: Module, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        from .device import relayout

        return relayout(weights, self.layout).gate_up, weights.down

    def install(self, module: Module, experts: Call) -> Callable[[], None]:
        before = module.__dict__.get("forward")

        def with_routing(hidden_states: Tensor) -> Tensor:
            assert self.route is not None
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            return experts(flat, *self.route(module, flat)).view_as(hidden_states)

        def as_routed(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
            return experts(hidden_states, topk_ids, topk_weights)

        def undo() -> None:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before

        module.__dict__["forward"] = as_routed if self.route is None else with_routing
        return undo

    def _attribute(self, module: Module, name: str) -> Any:
        found = getattr(module, name, None)
        if found is None:
            raise KernelError(f"{self.name} has no {name}; name its attributes in ramp_moe.Experts")
        return found
