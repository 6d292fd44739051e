"""The experts of Hugging Face Transformers 5: every class that its experts interface serves (about 50 families).

These classes hold `gate_up_proj [E, 2 I, H]` with gate rows first, and `down_proj [E, H, I]`. gpt-oss holds both
transposed, with biases, and its gate and up columns alternate.

`activation.py` finds out which activation a module has, and `flags.py` refuses what else it may have. `hints.py` says
why a model has no supported experts, and `registration.py` registers the name with Transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ramp_moe.plugin import SCALE_BLOCK, ExpertsAdapter, KernelError, MoEWeights, scale_blocks

from . import NAME
from .activation import activation_of
from .flags import check_count, check_flags
from .hints import hint_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

DEFAULT = "grouped_mm"
"""The implementation that Transformers takes by default."""
MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""Attributes that `transformers.integrations.moe.use_experts_implementation` sets on the classes it decorates."""
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_selected_experts")
"""Names of top_k in a model's configuration, which gives one number or one per layer."""
ROUTER_TOP_K = ("top_k", *TOP_K)
"""Names of top_k in a router."""
PROJECTIONS = {"gate_up": "gate_up_proj", "down": "down_proj"}
"""The module's parameters, by field of MoEWeights."""
LOCKED = "deepgemm_megamoe"
"""The only implementation that changes the weights in memory."""


class Order(NamedTuple):
    """How a module's tensors differ from those of MoEWeights.

    transposed: True if the matrices are.
    alternating: True if gate and up rows alternate.
    repeats: number of MoEWeights' blocks, in each direction, that one fp8 scale of the module covers.
    rows, hidden: second and third dimension of the module's gate_up_proj.
    """

    transposed: bool
    alternating: bool
    repeats: int
    rows: int
    hidden: int

    def refined(self, field: str, scale: Tensor) -> Tensor:
        """The scale `[E, blocks of rows, blocks of columns]` of the smaller blocks that hold weights."""
        if self.repeats == 1:
            return scale
        side = SCALE_BLOCK // self.repeats
        deep, wide = self.rows // side, self.hidden // side
        rows, columns = (deep, wide) if field == "gate_up_scale" else (wide, deep // 2)
        repeated = scale.repeat_interleave(self.repeats, 1).repeat_interleave(self.repeats, 2)
        return repeated[:, :rows, :columns].contiguous()


class TransformersExperts(ExpertsAdapter):
    """Gated experts in bf16, fp16 and fp8 (block scales, dynamic activation scales)."""

    name = "transformers"

    def finds(self, module: Any) -> bool:
        return all(hasattr(module, mark) for mark in MARKS) and hasattr(module, "config")

    def hint(self, model: Module) -> str | None:
        if not hasattr(model, "config") or not type(model).__module__.startswith("transformers."):
            return None
        return hint_of(model)

    def top_k_of(self, module: Any, parent: Any) -> int:
        """Read top_k from the configuration or, if that does not tell, from the router beside the experts.

        Raises KernelError if neither tells one number.
        """
        if found := _one_number([_of_config(module.config, name) for name in TOP_K]):
            return found
        beside = [child for child in (parent, *parent.children()) if child is not module]
        if found := _one_number([getattr(child, name, None) for child in beside for name in ROUTER_TOP_K]):
            return found
        raise KernelError(
            f"neither {type(module.config).__name__} ({', '.join(TOP_K)}) nor a router in {type(parent).__name__} "
            f"tells how many experts a token visits; set experts_implementation={NAME!r} instead, where the call tells"
        )

    def weights(self, module: Any) -> MoEWeights:
        from .registration import register

        register(self)  # raises KernelError if Transformers has no interface
        check_flags(module)
        if not module.has_gate:
            raise KernelError("its experts have no gate; ramp_moe computes activation(gate) * up")
        if module.config._experts_implementation == LOCKED:
            raise KernelError(f"{LOCKED} keeps the weights in a form of its own; load the model without it")
        gate_up = module.gate_up_proj
        check_count(module, len(gate_up))
        activation = activation_of(module, gate_up.shape[2 if module.is_transposed else 1], gate_up.device)
        if activation.alternating == module.is_concatenated:
            raise KernelError(f"is_concatenated is {module.is_concatenated}, but its activation takes the other order")
        names, order = self.names(module), self.order(module)
        if "gate_up_scale" in names:
            _check_scales(module)
        tensors: dict[str, Any] = {
            f: self.given(order, f, getattr(module, name).detach()).contiguous() for f, name in names.items()
        }
        return MoEWeights(**tensors, activation=activation.name, limit=activation.limit)

    def names(self, module: Any) -> dict[str, str]:
        added = {"bias": "bias"} if module.has_bias else {}
        if hasattr(module, "block_size") and module.gate_up_proj.element_size() == 1:
            added["scale"] = "scale_inv"
        suffixes = {
            f"{field}_{kind}": f"{name}_{suffix}"
            for kind, suffix in added.items()
            for field, name in PROJECTIONS.items()
        }
        return PROJECTIONS | suffixes

    def order(self, module: Any) -> Order:
        fp8 = "gate_up_scale" in self.names(module)
        _, rows, hidden = module.gate_up_proj.shape
        return Order(module.is_transposed, not module.is_concatenated, _repeats(module) if fp8 else 1, rows, hidden)

    def given(self, order: Order, field: str, tensor: Tensor) -> Tensor:
        if field in PROJECTIONS and order.transposed:
            tensor = tensor.transpose(1, 2)
        if field.endswith("_scale"):
            return order.refined(field, tensor.float())
        return _gate_first(tensor) if field in ("gate_up", "gate_up_bias") and order.alternating else tensor

    def own(self, order: Order, field: str, tensor: Tensor) -> Tensor:
        if field.endswith("_scale"):
            return tensor[:, :: order.repeats, :: order.repeats]
        if field in ("gate_up", "gate_up_bias") and order.alternating:
            tensor = _alternating(tensor)
        return tensor.transpose(1, 2) if field in PROJECTIONS and order.transposed else tensor

    def install(self, module: Any) -> str | None:
        """Name ramp_moe in the configuration from which the module's forward takes its implementation.

        All modules that share the configuration change together. One that is not wrapped yet is wrapped at its first
        call.
        """
        from .registration import register

        register(self)
        before: str | None = module.config._experts_implementation
        module.config._experts_implementation = NAME
        return before

    def uninstall(self, module: Any, before: str | None) -> None:
        module.config._experts_implementation = DEFAULT if before == NAME else before


def _check_scales(module: Any) -> None:
    """Raises KernelError for fp8 experts unless they have dynamic activation scales and [128, 128] weight blocks."""
    if module.activation_scheme != "dynamic":
        raise KernelError(f"its fp8 activations have {module.activation_scheme} scales; ramp_moe computes them itself")
    if module.block_size is None or tuple(module.block_size) != (SCALE_BLOCK, SCALE_BLOCK):
        raise KernelError(f"its fp8 scales belong to blocks {module.block_size}; ramp_moe takes [128, 128]")


def _repeats(module: Any) -> int:
    """How often each of the module's scales is repeated, in each direction.

    Transformers counts blocks of 128 rows over gate and up together. Scales are repeated for smaller blocks, so that
    each block lies within gate or up. Raises KernelError if no block size does that. Raises it, too, if the number of
    scales does not tell whether blocks were counted together or apart.
    """
    inter, rows = module.gate_up_proj.shape[1] // 2, module.gate_up_proj_scale_inv.shape[1]
    if inter % SCALE_BLOCK == 0:
        return 1
    block, apart, together = scale_blocks(inter)[-1], 2 * -(-inter // SCALE_BLOCK), -(-2 * inter // SCALE_BLOCK)
    if block == SCALE_BLOCK or apart == together or rows != together:
        raise KernelError(
            f"its intermediate size {inter} is no multiple of {SCALE_BLOCK}, and its {rows} rows of scales do not say "
            "where the blocks of up begin; load the model in bf16"
        )
    return SCALE_BLOCK // block


def _of_config(config: Any, name: str) -> Any:
    """An attribute of a configuration; None if there is none, or if it raises because layers differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _one_number(found: list[Any]) -> int | None:
    """The one number among these values and lists; None if there is none, or several. Ignores other values."""
    lists = (value if isinstance(value, list | tuple) else [value] for value in found)
    numbers = {n for values in lists for n in values if isinstance(n, int) and not isinstance(n, bool)}
    return numbers.pop() if len(numbers) == 1 else None


def _gate_first(t: Tensor) -> Tensor:
    """Copy `[E, 2 R, ...]` of alternating gate and up rows, gate rows first."""
    return t.view(len(t), -1, 2, *t.shape[2:]).transpose(1, 2).flatten(1, 2)


def _alternating(t: Tensor) -> Tensor:
    """The inverse of `_gate_first`."""
    return t.view(len(t), 2, -1, *t.shape[2:]).transpose(1, 2).flatten(1, 2)
