"""Describes the experts of a user's own module, by the names of its attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from ..errors import KernelError
from ..registry.experts_adapter import HOOK, ExpertsAdapter

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from ..spec.launchable import MoEWeights
    from .wrapped_experts import WrappedExperts


@dataclass(frozen=True)
class Experts(ExpertsAdapter):
    """Describes the experts of your own module, by the names of its attributes.

    module: the module's class.
    gate_up, down: names of its parameters `[E, 2 I, H]` and `[E, H, I]`.
    gate_up_scale, down_scale, gate_up_bias, down_bias: names of its scales and biases, as MoEWeights describes them;
        None if it has none.
    top_k: the number of experts per token, or the name of an attribute that holds it.
    activation, layout, limit, format, activations: as for MoEWeights.
    route: a function from the module and hidden states `[T, H]` to (topk_ids `[T, k]` int32 or int64, topk_weights
        `[T, k]`). The module's forward then takes only hidden states `[..., H]`, and returns the same shape. Without
        `route`, forward takes (hidden states `[T, H]`, topk_ids, topk_weights).

    Wrapping raises KernelError for a subclass with its own forward, and if the module's forward was replaced: either
    may compute something else.
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
    format: str | None = None
    activations: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.module.__name__

    def finds(self, module: Module) -> bool:
        return isinstance(module, self.module)

    def top_k_of(self, module: Module, parent: Module) -> int:
        return int(self._attribute(module, self.top_k)) if isinstance(self.top_k, str) else self.top_k

    def weights(self, module: Module) -> MoEWeights:
        from ..spec.launchable import MoEWeights

        given = {field: self._attribute(module, name).detach() for field, name in self.names(module).items()}
        named = ("activation", "layout", "limit", "format", "activations")
        return MoEWeights(**given, **{name: getattr(self, name) for name in named})

    def names(self, module: Module) -> Mapping[str, str]:
        fields = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
        return {field: name for field in fields if (name := getattr(self, field)) is not None}

    def install(self, module: Module) -> Any:
        kind, before = type(module), module.__dict__.get("forward")
        if kind.forward is not self.module.forward:
            raise KernelError(
                f"{kind.__name__} has a forward of its own, which may do more than {self.name}'s; if it does not, "
                f"give ramp_moe.Experts({kind.__name__}, ...)"
            )
        if before is not None and not hasattr(module, HOOK):
            raise KernelError(
                f"its forward was replaced by {before!r:.60}, which would no longer be called; undo that first"
            )
        # A method of the module, so that a deep copy of the module calls its own experts.
        module.__dict__["forward"] = MethodType(_as_routed if self.route is None else _routing, module)
        return before

    def uninstall(self, module: Module, before: Any) -> None:
        found = module.__dict__.get("forward")
        if getattr(found, "__func__", None) not in (_as_routed, _routing):
            return  # replaced by others since; theirs may call ours, which then calls the class's
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before

    def _attribute(self, module: Module, name: str) -> Any:
        found = getattr(module, name, None)
        if found is None:
            raise KernelError(f"{self.name} has no {name}; name its attributes in ramp_moe.Experts")
        return found


def _as_routed(module: Module, *given: Any, **named: Any) -> Any:
    from .wrapped_experts import experts_of

    experts = experts_of(module)
    return type(module).forward(module, *given, **named) if experts is None else experts(*given, **named)


def _routing(module: Module, *given: Any, **named: Any) -> Any:
    from .wrapped_experts import experts_of

    experts = experts_of(module)
    if experts is None:
        return type(module).forward(module, *given, **named)
    if len(given) + len(named) != 1:
        known = ", ".join([f"{len(given)} without a name", *named])
        raise KernelError(f"a wrapped {type(module).__name__} takes only hidden states, not the arguments {known}")
    return _routed(experts, module, *given, *named.values())


def _routed(experts: WrappedExperts, module: Module, hidden_states: Tensor) -> Tensor:
    from .wrapped_experts import pair

    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    route = cast(Experts, experts.adapter).route
    assert route is not None
    return experts(flat, *pair(route(module, flat), "route")).view_as(hidden_states)
