"""What a call of the Triton path does on the host, besides launching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_calls import calls
from moe_cases import H200, batch, expected, weights
from moe_cases import error as error_of
from ramp_moe import KernelError
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels.triton import combine, ops, schedule
from ramp_moe_kernels.triton.kernel import TritonMoE

KERNELS = ((ops, "up_kernel"), (ops, "down_kernel"), (schedule, "schedule_kernel"), (combine, "combine_kernel"))
MOST_CALLS = 40
"""Of functions of this project, for the four launches of one batch; 160 before plans were kept."""


class Launching:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_a_batch_of_the_size_before_costs_few_calls(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Launching())
    kernel, layer, workspace = TritonMoE(), weights(4, 128, 128, dtype, "cpu"), Workspace()
    config = kernel.default_config(layer.shape(2), H200, 9)
    given = batch(9, 2, 4, 128, "uniform", "cpu", torch.float16)
    out = torch.empty_like(given.hidden_states)

    def run() -> None:
        kernel.launch(config, layer, given, out, workspace)

    first, second = calls(run), calls(run)
    assert second.total() <= MOST_CALLS < first.total(), second
    assert "get" in first
    assert "get" not in second


def test_sizes_and_layers_that_share_a_workspace_do_not_mix() -> None:
    """A plan is of one size and of weights alike: what follows another batch is as right as what comes first."""
    kernel, workspace = TritonMoE(), Workspace()
    layers = [
        weights(4, 128, 128, "fp16", "cpu"),
        weights(4, 128, 128, "fp8", "cpu"),
        weights(4, 128, 64, "fp16", "cpu"),
    ]
    layers.append(weights(4, 128, 64, "fp16", "cpu", "gelu_tanh", bias=True))
    for tokens, layer in ((9, 0), (9, 1), (9, 0), (5, 0), (9, 2), (9, 3), (9, 2)):
        w, given = layers[layer], batch(tokens, 2, 4, 128, "uniform", "cpu", torch.float16)
        out = torch.empty_like(given.hidden_states)
        kernel.launch(kernel.default_config(w.shape(2), H200, 9), w, given, out, workspace)
        assert error_of(out, expected(w, given, quantise=w.gate_up_scale is not None)) < 2e-2


def test_a_launch_that_does_not_fit_is_refused() -> None:
    kernel, layer = TritonMoE(), weights(4, 128, 128, "fp16", "cpu")
    config = kernel.default_config(layer.shape(2), H200, 9)
    given = batch(9, 2, 4, 128, "uniform", "cpu", torch.float16)
    other = Batch(given.hidden_states.bfloat16(), given.topk_ids, given.topk_weights)
    x = given.hidden_states
    for batched, out, message in (
        (given, torch.empty(9, 64, dtype=x.dtype), r"triton: hidden_states .* must be \[T, 128\]"),
        (given, torch.empty(128, 9, dtype=x.dtype).T, "triton: out must be contiguous"),
        (given, torch.empty(9, 128, dtype=x.dtype, device="meta"), "move them together"),
        (other, torch.empty_like(other.hidden_states), "triton: hidden_states must be float16, not bfloat16"),
    ):
        with pytest.raises(KernelError, match=message):
            kernel.launch(config, layer, batched, out, Workspace())
