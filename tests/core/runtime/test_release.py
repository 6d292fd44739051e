"""A layer whose kernels hold the weights in formats of their own gives up the weights that it was given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_cases import batch, error, expected, weights
from plain_kernel import Plain
from ramp_moe import Hardware, KernelError, ShapeError, WeightLayout
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import MoEWeights

EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 64, 32
TOLERANCE = 2e-3


class Repacking(Plain):
    name = "repacking"

    def weight_layout(self, shape: Any) -> WeightLayout:
        return WeightLayout("repacking/own", 1)

    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("repacking/own",)

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        return replace(weights, gate_up=weights.gate_up.clone(), down=weights.down.clone())


class Wrong(Repacking):
    def prepare(self, weights: MoEWeights) -> MoEWeights:
        return replace(super().prepare(weights), down=-weights.down)


def given() -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, "bf16", "cpu")


def layer(h200: Hardware, kernel: Plain, of: MoEWeights) -> LayerRuntime:
    return LayerRuntime(of, TOP_K, h200, [kernel])


def wrong(of: LayerRuntime, with_weights: MoEWeights) -> float:
    b = batch(9, TOP_K, EXPERTS, HIDDEN, "padded", "cpu", torch.bfloat16)
    out = of(b.hidden_states, b.topk_ids, b.topk_weights)
    return error(out, expected(with_weights, b, quantise=False))


def test_it_computes_without_them(h200: Hardware) -> None:
    of = given()
    made = layer(h200, Repacking(), of)
    kept = of.gate_up.clone(), of.down.clone()
    made.release(torch.bfloat16)
    assert all(getattr(made.held[0], name).is_meta for name in ("gate_up", "down"))
    for t in (of.gate_up, of.down):
        t.fill_(float("nan"))
    assert wrong(made, replace(of, gate_up=kept[0], down=kept[1])) < 2 * TOLERANCE


def test_new_weights_are_derived_again_in_place(h200: Hardware) -> None:
    made = layer(h200, Repacking(), given())
    made.release(torch.bfloat16)
    before = made.kernel("repacking")[1].gate_up.data_ptr()
    new = replace(given(), gate_up=given().gate_up.flip(0).contiguous(), down=given().down.flip(0).contiguous())
    made.update(new)
    assert made.kernel("repacking")[1].gate_up.data_ptr() == before
    assert wrong(made, new) < 2 * TOLERANCE
    with pytest.raises(ShapeError, match="gate_up has the shape"):
        made.update(weights(EXPERTS, HIDDEN, 2 * INTER, "bf16", "cpu"))
    assert wrong(made, new) < 2 * TOLERANCE, "nothing was written"


def test_weights_that_a_kernel_reads_stay(h200: Hardware) -> None:
    made = layer(h200, Plain(), given())
    with pytest.raises(KernelError, match="reads the weights as they were given"):
        made.release(torch.bfloat16)
    assert not made.held[0].gate_up.is_meta


def test_weights_of_a_wrong_output_stay(h200: Hardware) -> None:
    made = layer(h200, Wrong(), given())
    with pytest.raises(KernelError, match="repacking/bm16"):
        made.release(torch.bfloat16)
    assert not made.released
    assert not made.held[0].gate_up.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["humming", "marlin"])
def test_graphs_of_a_released_layer(name: str) -> None:
    """Captured after the weights are gone: candidates are compared with the one that was right."""
    from ramp_moe import Candidate, MoEShape, get_registry
    from ramp_moe.profiler.bench import random_weights
    from ramp_moe.registry.detect import detect
    from ramp_moe.runtime.calibration import guess
    from ramp_moe.runtime.reference import reference
    from ramp_moe.spec.kernel import usable_configs

    shape = MoEShape(32, 4, 512, 256, "int4-g32")
    kernel: Any = get_registry().kernel(name)
    if reason := kernel.unavailable():
        pytest.skip(reason)
    hardware = detect(index=0)
    configs = usable_configs(kernel, shape, hardware)
    candidates = [Candidate(name, c) for c in (*configs[:2], configs[-1])]
    of = random_weights(shape, "cuda", 0)
    made = LayerRuntime(of, 4, hardware, [kernel], guess(shape, hardware, None, candidates))
    made.release(torch.bfloat16)
    b = batch(24, 4, 32, 512, "skewed", "cuda", torch.bfloat16)
    right = reference(of, b)
    for t in (of.gate_up, of.down):
        t.zero_()
    side, out = torch.cuda.Stream(), torch.empty_like(b.hidden_states)
    with torch.cuda.stream(side), torch.no_grad():
        made.warm_up(24, torch.bfloat16)
        side.synchronize()
        made.ready(24, torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            made(b.hidden_states, b.topk_ids, b.topk_weights, out=out)
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, right) < 0.012
    assert not made.dropped
