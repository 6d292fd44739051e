"""The hooks a plugin may implement. Export functions of these names, decorated with `ramp_moe.plugin.hookimpl`, from a
module that an entry point of the group `ramp_moe` names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pluggy

from ..spec.hardware import Hardware
from ..spec.kernel import Kernel
from ..spec.shapes import Model
from .diagnostics import Diagnostic
from .experts_adapter import ExpertsAdapter

GROUP = "ramp_moe"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def ramp_moe_kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """MoE kernels. Building them must not import a GPU library: do that when one is launched."""


@hookspec
def ramp_moe_models() -> Iterable[Model]:  # type: ignore[empty-body]
    """Named MoE shapes."""


@hookspec
def ramp_moe_hardware() -> Iterable[Hardware]:  # type: ignore[empty-body]
    """Constants of GPUs."""


@hookspec
def ramp_moe_profiles() -> Iterable[Path]:  # type: ignore[empty-body]
    """Folders of recorded sweeps, laid out as DEVICE/KERNEL/SHAPE.json, that the plugin ships."""


@hookspec
def ramp_moe_experts() -> Iterable[ExpertsAdapter]:  # type: ignore[empty-body]
    """How modules of a framework hold their experts, for `ramp_moe.wrap`. Building them must not import it."""


@hookspec
def ramp_moe_diagnostics() -> Iterable[Diagnostic]:  # type: ignore[empty-body]
    """What a bug report should say of the plugin, asked by `ramp-moe env` alone. Must not import a GPU library."""
