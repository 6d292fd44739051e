"""The library's own GPU kernels. Describing them needs neither torch nor Triton; launching them does."""

from __future__ import annotations

from collections.abc import Iterable

from ramp_moe import Diagnostic
from ramp_moe.plugin import Kernel, hookimpl

from .cute.aot.cache import VARIABLE, cache_folder
from .cute.kernel import CuteMoE
from .triton.kernel import TritonMoE


@hookimpl
def ramp_moe_kernels() -> Iterable[Kernel]:
    yield TritonMoE()
    yield CuteMoE()


@hookimpl
def ramp_moe_diagnostics() -> Iterable[Diagnostic]:
    yield Diagnostic("variable", VARIABLE, f"what is compiled is kept in {cache_folder()}")
    yield Diagnostic("cache", "compiled objects", str(cache_folder()))
