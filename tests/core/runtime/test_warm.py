"""A layer's candidates are launched before it serves, at the sizes that compile something."""

from __future__ import annotations

import pytest
import torch
from moe_cases import H200, weights
from ramp_moe import Candidate, KernelError, ShapeError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.warm import warm
from ramp_moe.spec.launchable import Batch
from ramp_moe_kernels.triton.kernel import TritonMoE
from ramp_moe_kernels.triton.sizes import warm_sizes


def layer_of(kernel: TritonMoE) -> tuple[LayerRuntime, Candidate]:
    layer = LayerRuntime(weights(4, 128, 64, "fp16", "cpu"), 2, H200, [kernel])
    return layer, Candidate(kernel.name, kernel.default_config(layer.shape, H200, 9))


def test_every_size_is_launched_and_names_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(self: TritonMoE, config: object, prepared: object, batch: Batch, *rest: object) -> None:
        launched.append(batch.num_tokens)
        assert (batch.topk_ids == -1).all()

    monkeypatch.setattr(TritonMoE, "launch", launch)
    layer, candidate = layer_of(TritonMoE())
    assert warm(layer, [candidate, candidate], 700, torch.float16) == {}
    assert launched == [*warm_sizes(layer.shape, 700)] * 2
    assert len(launched) > 2


def test_it_runs_and_changes_no_result() -> None:
    layer, candidate = layer_of(TritonMoE())
    assert warm(layer, [candidate], 3, torch.float16) == {}


def test_what_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, candidate = layer_of(TritonMoE())
    for raised, said in ((KernelError("no memory"), "no memory"), (ValueError("a\nb"), "ValueError: a")):

        def launch(*_: object, raised: Exception = raised) -> None:
            raise raised

        monkeypatch.setattr(TritonMoE, "launch", launch)
        assert warm(layer, [candidate], 3, torch.float16) == {candidate.name: said}


def test_no_tokens_are_refused() -> None:
    layer, candidate = layer_of(TritonMoE())
    with pytest.raises(ShapeError, match="one token or more, not 0"):
        warm(layer, [candidate], 0, torch.float16)
