"""A package `vllm` with the functions that the adapter uses. It computes with the plain reference, and fails in the
cases in which vllm 0.33 does. It is written from the behaviour of vLLM."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from ramp_moe_kernels import reference

MODULE = "vllm.model_executor.layers.fused_moe"


class MoEActivation(Enum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"


class QuantConfig:
    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


def fp8_w8a8_moe_quant_config(w1_scale, w2_scale, a1_scale=None, w1_bias=None, w2_bias=None, block_shape=None):
    return QuantConfig(w1_scale=w1_scale, w2_scale=w2_scale, w1_bias=w1_bias, w2_bias=w2_bias, block_shape=block_shape)


def biased_moe_quant_config(w1_bias, w2_bias, gemm1_alpha=None):
    return QuantConfig(w1_scale=None, w2_scale=None, w1_bias=w1_bias, w2_bias=w2_bias, block_shape=None)


class FakeVllm:
    """vLLM's fused experts. `calls` holds the configuration of each call. `during` is run within a call."""

    def __init__(self) -> None:
        self.config: dict[str, Any] | None = None
        self.calls: list[dict[str, Any] | None] = []
        self.during = lambda: None

    @contextmanager
    def override_config(self, config):
        """Override the configuration without a finally clause, as vllm 0.33 does: an exception leaves it overridden."""
        old, self.config = self.config, config
        yield
        self.config = old

    def fused_experts(
        self,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation=MoEActivation.SILU,
        apply_router_weight_on_input=False,
        global_num_experts=-1,
        expert_map=None,
        quant_config=None,
    ):
        self.calls.append(None if self.config is None else dict(self.config))
        self.during()
        assert bool(((topk_ids >= 0) & (topk_ids < len(w1))).all()), "would read out of bounds, or sum garbage"
        assert topk_ids.dtype == torch.int32
        assert topk_weights.dtype == torch.float32
        quant = quant_config or QuantConfig(w1_scale=None, w2_scale=None, w1_bias=None, w2_bias=None, block_shape=None)
        if w1.dtype == torch.float8_e4m3fn:
            assert quant.block_shape == [128, 128]
        return reference.experts(
            hidden_states,
            w1,
            w2,
            topk_ids,
            topk_weights,
            activation={MoEActivation.SILU: "swiglu", MoEActivation.GELU_TANH: "gelu_tanh"}[activation],
            gate_up_scale=quant.w1_scale,
            down_scale=quant.w2_scale,
            gate_up_bias=quant.w1_bias,
            down_bias=quant.w2_bias,
            quantise=quant.w1_scale is not None,
        ).to(hidden_states.dtype)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeVllm:
    """Make `folder/vllm` the installed package, with an empty folder for tuned files (see `configs_folder`)."""
    fake = FakeVllm()
    names = [MODULE[:i] for i, c in enumerate(MODULE + ".") if c == "."]
    modules = {name: types.ModuleType(name) for name in [*names, f"{MODULE}.config"]}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=str(folder / "vllm" / "__init__.py"))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    vars(modules[MODULE]).update(
        fused_experts=fake.fused_experts, override_config=fake.override_config, MoEActivation=MoEActivation
    )
    vars(modules[f"{MODULE}.config"]).update(
        fp8_w8a8_moe_quant_config=fp8_w8a8_moe_quant_config, biased_moe_quant_config=biased_moe_quant_config
    )
    configs_folder(folder).mkdir(parents=True)
    return fake


def configs_folder(folder: Path) -> Path:
    return folder / MODULE.replace(".", "/") / "configs"
