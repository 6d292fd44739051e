"""A package `flashinfer` with the functions that the adapter uses. It computes with the plain reference, and fails in
the cases in which flashinfer 0.7.2.post1 does. It is written from the behaviour of FlashInfer.

Another process compiles its module, and imports it from the folder that `write` makes.
"""

from __future__ import annotations

import os
import sys
import textwrap
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from ramp_moe_kernels import reference

VERSION = "0.7.2.post1"


class ActivationType(IntEnum):
    Swiglu = 3


class FakeFlashInfer(ModuleType):
    """`flashinfer.fused_moe.core`. `calls` holds the `profile_ids` of each launch. `largest` is the most tokens that
    the fp8 runner was asked about. `counts` are the numbers of its tactics."""

    ActivationType = ActivationType

    def __init__(self) -> None:
        super().__init__("flashinfer.fused_moe.core")
        self.counts = 45, 81
        self.calls: list[list[int]] = []
        self.allocated: list[torch.Tensor] = []
        self.largest = 0

    def get_cutlass_fused_moe_module(self, backend: str) -> Any:
        assert backend == "90"
        one, two = self.counts
        runner = SimpleNamespace(get_gemm1_tactic_count=lambda: one, get_gemm2_tactic_count=lambda: two)

        def make(
            x_dtype, weight_dtype, output_dtype, top_k, tp_size, tp_rank, ep_size, ep_rank, cluster_size, cluster_rank,
            enable_alltoall, use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
            min_latency_mode, enable_pdl, activation_type, use_packed_weights, use_fused_finalize, use_wfp4afp8_humming,
        ):  # fmt: skip
            assert x_dtype == weight_dtype == output_dtype == torch.bfloat16
            assert use_fused_finalize, "else the second GEMM has half of its tactics"
            assert tp_size == ep_size == cluster_size == 1
            return SimpleNamespace(fused_moe_runner=runner)

        return SimpleNamespace(MoERunner=make)

    def cutlass_fused_moe_workspace_size(
        self, max_num_tokens, hidden_size, intermediate_size, num_experts_total, top_k, *, x_dtype, weight_dtype,
        output_dtype=torch.bfloat16, use_deepseek_fp8_block_scale=False, device=None,
    ):  # fmt: skip
        assert max_num_tokens > 0
        tokens = max_num_tokens
        if use_deepseek_fp8_block_scale:
            self.largest = tokens = max(self.largest, tokens)
        return tokens * top_k * (hidden_size + 3 * intermediate_size) * 2 + 128 * num_experts_total

    def cutlass_fused_moe(
        self, input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output_dtype,
        quant_scales, fc1_expert_biases=None, fc2_expert_biases=None, output=None,
        use_deepseek_fp8_block_scale=False, profile_ids=None, workspace_buffer=None,
    ):  # fmt: skip
        x, ids, scales, w1, w2 = (
            *(input, token_selected_experts, token_final_scales),
            *(fc1_expert_weights, fc2_expert_weights),
        )
        (tokens, top_k), (experts, hidden, inter), fp8 = ids.shape, w2.shape, use_deepseek_fp8_block_scale
        assert profile_ids is not None, "the autotuner would choose"
        assert x.dtype == output.dtype == output_dtype == torch.bfloat16
        assert ids.dtype == torch.int32
        assert scales.dtype == torch.float32
        assert w1.shape == (experts, 2 * inter, hidden)
        assert (fc1_expert_biases is None) == (fc2_expert_biases is None), "would read one that is not there"
        assert all(b.dtype == torch.bfloat16 for b in (fc1_expert_biases, fc2_expert_biases) if b is not None)
        if fp8:
            assert [s.dtype for s in quant_scales] == [torch.float32] * 2
        else:
            one, two = self.counts
            assert list(quant_scales) == []
            assert 0 <= profile_ids[0] < one
            assert one <= profile_ids[1] < one + two
        assert workspace_buffer is not None, "would be allocated"
        assert workspace_buffer.dtype == torch.uint8
        needed = self.cutlass_fused_moe_workspace_size(
            tokens, hidden, inter, experts, top_k, x_dtype=x.dtype, weight_dtype=w1.dtype,
            use_deepseek_fp8_block_scale=fp8,
        )  # fmt: skip
        assert workspace_buffer.numel() >= needed, "workspace_buffer too small"
        workspace_buffer.fill_(0xFF)
        self.calls.append(list(profile_ids))
        self.allocated = [
            torch.empty((1,), dtype=torch.int32, device=x.device),
            torch.empty((experts, tokens), dtype=torch.float32, device=x.device),
            torch.empty((experts,), dtype=torch.int32, device=x.device),
        ]
        if tokens > 256 or top_k not in (1, 2, 4, 6, 8):  # its routing in three steps
            for token, named in enumerate(ids.tolist()):
                kept = [e for e in named if 0 <= e < experts]
                assert len(set(kept)) == len(kept), f"token {token} names an expert twice: a row that was never written"
        fc1_scale, fc2_scale = quant_scales or (None, None)
        output.copy_(
            reference.experts(
                x,
                w1,
                w2,
                ids.where((ids >= 0) & (ids < experts), -1),
                scales,
                gate_up_scale=fc1_scale,
                down_scale=fc2_scale,
                gate_up_bias=fc1_expert_biases,
                down_bias=fc2_expert_biases,
                layout="up-first",
                quantise=fp8,
            )
        )


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeFlashInfer:
    """Make `folder/flashinfer` the installed package, with its module compiled."""
    fake = FakeFlashInfer()
    write(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    parent = ModuleType("flashinfer.fused_moe")
    parent.core = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", parent)
    prebuilt = folder / "flashinfer" / "data" / "aot" / "fused_moe_90" / "fused_moe_90.so"
    prebuilt.parent.mkdir(parents=True)
    prebuilt.touch()
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(folder / "base"))
    return fake


def write(folder: Path, units: int = 4, seconds: float = 0.0) -> None:
    """Write a package whose module has `units` units, each of which takes `seconds` to compile. A unit that begins with
    "bad" does not compile. Units that are compiled already are not compiled again."""
    jit = folder / "flashinfer" / "jit"
    jit.mkdir(parents=True, exist_ok=True)
    (folder / "flashinfer" / "__init__.py").touch()
    (jit / "__init__.py").touch()
    (jit / "fused_moe.py").write_text(
        textwrap.dedent(
            f"""
            import os, sys, time
            from pathlib import Path
            arch = os.environ["FLASHINFER_CUDA_ARCH_LIST"]
            base = Path(os.environ["FLASHINFER_WORKSPACE_BASE"])
            folder = base / ".cache/flashinfer/{VERSION}" / arch.replace(".", "") / "cached_ops/fused_moe_90"

            class Spec:
                sources = [f"unit{{i}}.cu" for i in range({units})]
                is_aot = False

                def get_library_path(self):
                    return folder / "fused_moe_90.so"

                def build(self, verbose, need_lock):
                    assert need_lock, "another process may be at it"
                    folder.mkdir(parents=True, exist_ok=True)
                    for name in self.sources:
                        unit = folder / (name + ".o")
                        if not unit.exists():
                            time.sleep({seconds})
                            if (base / "bad").exists():
                                raise RuntimeError("Ninja build failed. " + name + ": error: no such thing")
                            unit.write_text(os.environ.get("MAX_JOBS", ""))
                    if not self.get_library_path().exists():
                        self.get_library_path().write_text("library")

            def gen_cutlass_fused_moe_sm90_module():
                return Spec()
            """
        )
    )


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an nvcc and a ninja that can be found, and are never run."""
    for name in ("bin/nvcc", "bin/ninja"):
        tool = folder / "toolkit" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "toolkit"))
    monkeypatch.setenv("PATH", f"{folder / 'toolkit' / 'bin'}{os.pathsep}{os.environ['PATH']}")
