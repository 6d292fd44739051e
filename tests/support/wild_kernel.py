"""A kernel with a configuration that stores out of bounds. A spawned process can import this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from ramp_moe import Hardware, KernelConfig, MoEShape, get_registry
from ramp_moe.profiler.bench import Bench
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch import Tensor

WILD = "wild"
SANE_TOKENS = 100
"""Most tokens for which the configuration WILD is correct. It passes its check, and fails while it is timed."""
FAR_AWAY = 2**42


@triton.jit
def _store_at(pointer, offset):
    tl.store(pointer + offset, 0.0)


class Wild(TritonMoE):
    """TritonMoE with its static choices, and one of them again under the name WILD."""

    name = "wild"

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        sane = dict.fromkeys(self.default_config(shape, hardware, tokens) for tokens in (1, 64, 4096))
        return [*sane, replace(next(iter(sane)), name=WILD)]

    def launch(self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace) -> None:
        if config.name == WILD and batch.num_tokens > SANE_TOKENS:
            _store_at[(1,)](out, FAR_AWAY)
        super().launch(config, prepared, batch, out, workspace)


def make_bench(shape: MoEShape, hardware: str) -> Bench:
    return Bench(shape, get_registry().device(hardware), [Wild()])
