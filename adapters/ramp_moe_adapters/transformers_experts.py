"""The experts of Hugging Face Transformers 5: every class that its experts interface serves (about 50 families).

Such a class holds `gate_up_proj [E, 2 I, H]` and `down_proj [E, H, I]`, gate rows first; gpt-oss holds them transposed,
with biases, gate and up columns in turn. Which activation it has is found by running it. What needs Transformers itself
is in `transformers.py` beside this.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from ramp_moe import ExpertsAdapter
from ramp_moe.device import MoEWeights
from ramp_moe.device.contract import ACTIVATIONS
from ramp_moe.errors import KernelError
from ramp_moe.shapes import SCALE_BLOCK, scale_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

NAME = "ramp_moe"
"""Of the implementation, as `experts_implementation=` takes it."""
DEFAULT = "grouped_mm"
"""What Transformers takes where nobody names an implementation."""
MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What `transformers.integrations.moe.use_experts_implementation` puts on the classes that it decorates."""
TOP_K = ("num_experts_per_tok", "top_k_experts")
"""Names in a model's configuration."""
LOCKED = "deepgemm_megamoe"
"""The one implementation that changes the weights in memory."""
PROBE_ROWS, PROBE_SCALE = 64, 40.0
"""Gates and ups that an activation is told by: up to far beyond any clamp, dense around zero."""


class TransformersExperts(ExpertsAdapter):
    """bf16, fp16 and fp8 (block-scaled, dynamic activations) experts with a gate."""

    name = "transformers"
    gate_up, down = "gate_up_proj", "down_proj"

    def finds(self, module: Any) -> bool:
        return all(hasattr(module, mark) for mark in MARKS) and hasattr(module, "config")

    def hint(self, model: Module) -> str | None:
        if not hasattr(model, "config") or not type(model).__module__.startswith("transformers."):
            return None
        version = metadata.version("transformers")
        if int(version.partition(".")[0]) < 5:
            return f"transformers {version} has no experts interface; install 5.17 or newer of 5"
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
        if method is not None:
            return f"it is quantised by {getattr(method, 'value', method)}; ramp_moe takes bf16, fp16 and fp8 experts"
        return "it has no module of the experts interface; it may be a dense model"

    def top_k_of(self, module: Any) -> int:
        found = [top_k for name in TOP_K if isinstance(top_k := getattr(module.config, name, None), int)]
        if not found:
            raise KernelError(f"{type(module.config).__name__} has no {' or '.join(TOP_K)}")
        return found[0]

    def weights(self, module: Any) -> MoEWeights:
        if not module.has_gate:
            raise KernelError("its experts have no gate; ramp_moe computes activation(gate) * up")
        if module.config._experts_implementation == LOCKED:
            raise KernelError(f"{LOCKED} keeps the weights in a form of its own; load the model without it")
        gate_up, down = (self._parameter(module, name) for name in (self.gate_up, self.down))
        rows = gate_up.shape[2 if module.is_transposed else 1]
        activation, alternating = _activation(module, rows, gate_up.device)
        if module.is_transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        up_bias, down_bias = (
            self._parameter(module, f"{name}_bias") if module.has_bias else None for name in (self.gate_up, self.down)
        )
        if alternating:
            gate_up, up_bias = _gate_first(gate_up), None if up_bias is None else _gate_first(up_bias)
        up_scale, down_scale = _scales(module, gate_up)
        weights = gate_up.contiguous(), down.contiguous()
        return MoEWeights(*weights, up_scale, down_scale, up_bias, down_bias, activation)

    def restored(self, module: Any, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        gate_up, down = weights.gate_up, weights.down
        if _activation(module, gate_up.shape[1], gate_up.device)[1]:
            gate_up = _alternating(gate_up)
        return (gate_up.transpose(1, 2), down.transpose(1, 2)) if module.is_transposed else (gate_up, down)

    def install(self, module: Any) -> str | None:
        """Through the configuration that the module's forward asks for the implementation: all modules that share it
        take it together, and one of them that is not wrapped is wrapped when it is called."""
        from . import transformers as registers  # noqa: F401

        before: str | None = module.config._experts_implementation
        module.config._experts_implementation = NAME
        return before

    def uninstall(self, module: Any, before: str | None) -> None:
        module.config._experts_implementation = DEFAULT if before == NAME else before

    def _parameter(self, module: Any, name: str) -> Tensor:
        found: Tensor = getattr(module, name).detach()
        if found.is_meta:
            raise KernelError(f"{name} is not loaded (it is on the device meta)")
        if hasattr(found, "device_mesh"):
            raise KernelError(f"{name} is sharded over several devices; ramp_moe takes whole experts")
        return found


def _scales(module: Any, gate_up: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of fp8 experts, float32. Raises KernelError for another scheme than ours."""
    if gate_up.element_size() > 1 or not hasattr(module, "block_size"):
        return None, None
    if module.activation_scheme != "dynamic":
        raise KernelError(f"its fp8 activations have {module.activation_scheme} scales; ramp_moe computes them itself")
    if module.block_size is None or tuple(module.block_size) != (SCALE_BLOCK, SCALE_BLOCK):
        raise KernelError(f"its fp8 scales are of blocks {module.block_size}; ramp_moe takes [128, 128]")
    scales = module.gate_up_proj_scale_inv.detach().float(), module.down_proj_scale_inv.detach().float()
    _, rows, hidden = gate_up.shape
    return scales if rows // 2 % SCALE_BLOCK == 0 else _refined(*scales, rows // 2, hidden)


def _refined(gate_up_scale: Tensor, down_scale: Tensor, inter: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Scales of smaller blocks, each within gate or up: Transformers counts blocks of 128 rows over both together.
    Raises KernelError where none fit, or the number of blocks would be the same if gate and up had their own."""
    block, apart, together = scale_blocks(inter)[-1], 2 * -(-inter // SCALE_BLOCK), -(-2 * inter // SCALE_BLOCK)
    if block == SCALE_BLOCK or apart == together or gate_up_scale.shape[1] != together:
        raise KernelError(
            f"its intermediate size {inter} is no multiple of {SCALE_BLOCK}, and its {gate_up_scale.shape[1]} rows of "
            "scales do not say where the blocks of up begin; load the model in bf16"
        )
    times = SCALE_BLOCK // block
    gate_up, down = (s.repeat_interleave(times, 1).repeat_interleave(times, 2) for s in (gate_up_scale, down_scale))
    wide, deep = hidden // block, inter // block
    return gate_up[:, : 2 * deep, :wide].contiguous(), down[:, :wide, :deep].contiguous()


def _activation(module: Any, rows: int, device: Any) -> tuple[str, bool]:
    """Which of ACTIVATIONS the module has, and whether gate and up come in turn. Raises KernelError for another."""
    import torch

    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-2, 0, PROBE_ROWS)[:, None] * PROBE_SCALE
    probe = (torch.randn(PROBE_ROWS, rows, generator=generator) * spread).to(device)
    with torch.no_grad():
        found = module._apply_gate(probe)
    for alternating in (False, True):
        gate, up = (probe[:, 0::2], probe[:, 1::2]) if alternating else probe.chunk(2, 1)
        for activation in ACTIVATIONS:
            if torch.allclose(found, _activated(gate, up, activation), rtol=1e-4, atol=1e-5):
                return activation, alternating
    raise KernelError(f"its activation is none of {', '.join(ACTIVATIONS)}")


def _activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from ramp_moe_kernels.reference import activate

    return activate(gate, up, activation)


def _gate_first(t: Tensor) -> Tensor:
    """`[E, 2 R, ...]` of rows that come in turn: a copy with the gate's first."""
    return t.view(len(t), -1, 2, *t.shape[2:]).transpose(1, 2).flatten(1, 2)


def _alternating(t: Tensor) -> Tensor:
    """The inverse of `_gate_first`."""
    return t.view(len(t), 2, -1, *t.shape[2:]).transpose(1, 2).flatten(1, 2)
