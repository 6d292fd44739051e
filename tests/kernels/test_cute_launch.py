"""Launches of the fused kernel around compiled functions: what they are given, what comes of it, and what is refused.

The function is emulated and its arguments are checked as tvm-ffi checks them; test_cute_moe.py has the real one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cute_cases import emulated
from host_calls import calls
from moe_cases import ROUTINGS, batch, error, expected, weights
from ramp_moe import KernelConfig, KernelError, MoEShape
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe.testing import KernelConformance
from ramp_moe_kernels.cute import kernel as kernel_module
from ramp_moe_kernels.cute import launch
from ramp_moe_kernels.cute.config import Config
from ramp_moe_kernels.cute.kernel import CuteMoE
from tiers import slow_except

KERNEL = CuteMoE()
EXPERTS, TOP_K, HIDDEN, INTER = 5, 3, 256, 256
MOST_CALLS = 20
"""Of functions of this project besides the schedule's, for one batch; over 60 before plans were kept."""
LIMITS = {"fp8": 0.02, "bf16": 0.01}
KINDS = [
    Config(8, 32, 8, 3),
    Config(16, 32, 8, 3, wide=2),
    Config(8, 32, 8, 4, split_k=2),
    Config(32, 64, 4, 2, ctas=2, pair=True),
    Config(16, 32, 8, 3, combine="f32"),
    Config(16, 32, 8, 3, combine="rows"),
    Config(32, 32, 8, 3, wide=2, combine="rows"),
]


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulated on the CPU")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.compiled.cache_clear()
    monkeypatch.setattr(launch, "load", emulated)
    monkeypatch.setattr(launch, "check_hopper", lambda kernel, device: None)
    monkeypatch.setattr(kernel_module.CuteMoE, "unavailable", lambda self: None)


def given(tokens: int, routing: str = "uniform") -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, "cpu", torch.bfloat16, seed=tokens)


def layer(dtype: str = "fp8") -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, dtype, "cpu")


def described(config: Config, dtype: str = "fp8") -> KernelConfig:
    return KERNEL.describe(replace(config, dtype=dtype), MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, dtype))


def run(config: Config, of: MoEWeights, b: Batch, workspace: Workspace | None = None) -> torch.Tensor:
    out = torch.full_like(b.hidden_states, float("nan"))
    dtype = of.shape(TOP_K).dtype
    KERNEL.launch(described(config, dtype), KERNEL.prepare(of), b, out, workspace or Workspace())
    return out


class TestEmulated(KernelConformance):
    kernel = KERNEL
    launch_shape = MoEShape(6, 2, 256, 256, "fp8")
    configs = 2
    test_asynchronous = None  # the emulation does read from the device


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("config", slow_except(KINDS[:2], KINDS), ids=lambda c: c.name)
def test_outputs(config: Config, dtype: str) -> None:
    of, workspace = layer(dtype), Workspace()
    for tokens, routing in ((9, "padded"), (1, "uniform"), (4, "duplicates")):
        b = given(tokens, routing)
        assert error(run(config, of, b, workspace), expected(of, b, quantise=dtype == "fp8")) < LIMITS[dtype]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str) -> None:
    of, b = layer(), given(7, routing)
    assert error(run(KINDS[0], of, b), expected(of, b, quantise=True)) < LIMITS["fp8"]


@pytest.mark.parametrize("dtype", LIMITS)
def test_every_layout_of_weights(dtype: str) -> None:
    of, b = layer(dtype), given(6)
    outs = [run(KINDS[5], relayout(of, order), b) for order in LAYOUTS]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("config", [KINDS[0], *KINDS[4:]], ids=lambda c: c.name)
def test_in_place(config: Config) -> None:
    of, b, workspace = layer(), given(6), Workspace()
    wanted, prepared = run(config, of, b), KERNEL.prepare(of)
    KERNEL.launch(described(config), prepared, b, b.hidden_states, workspace)
    assert torch.equal(b.hidden_states, wanted)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.name)
def test_no_tokens(config: Config) -> None:
    b = given(3)
    none = Batch(b.hidden_states[:0], b.topk_ids[:0], b.topk_weights[:0])
    assert run(config, layer(), none).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_batch_of_the_size_before_costs_few_calls(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are fetched, and the function is found, once for a size."""
    monkeypatch.setattr(launch, "load", lambda config: lambda *_: None)
    monkeypatch.setattr(launch, "launch_schedule", lambda *_, **__: None)
    of, b, workspace = KERNEL.prepare(layer(dtype)), given(9), Workspace()
    config, out = described(KINDS[0], dtype), torch.empty_like(b.hidden_states)
    first, second = (calls(lambda: KERNEL.launch(config, of, b, out, workspace)) for _ in range(2))
    assert second.total() <= MOST_CALLS < first.total(), second
    assert "get" in first
    assert "get" not in second


def test_sizes_and_layers_that_share_a_workspace_do_not_mix() -> None:
    """A plan is of one size and of weights alike: what follows another batch is as right as what comes first."""
    workspace, layers = Workspace(), [layer("fp8"), layer("bf16"), weights(EXPERTS, HIDDEN, 512, "bf16", "cpu")]
    for tokens, index, config in ((9, 0, 0), (9, 1, 0), (9, 0, 4), (5, 0, 0), (9, 2, 0), (9, 1, 5), (9, 2, 5)):
        of, b = layers[index], given(tokens)
        dtype = of.shape(TOP_K).dtype
        assert error(run(KINDS[config], of, b, workspace), expected(of, b, quantise=dtype == "fp8")) < LIMITS[dtype]


def test_one_launch_is_any_of_its_blocks() -> None:
    of, b = layer(), given(40, "skewed")
    configs = [Config(block, 32, 8, 3) for block in (32, 8, 64)]
    for choice, config in enumerate(configs):
        out = torch.full_like(b.hidden_states, float("nan"))
        chosen = torch.tensor([choice], dtype=torch.int32)
        KERNEL.launch_inline([*map(described, configs)], chosen, KERNEL.prepare(of), b, out, Workspace())
        assert error(out, run(config, of, b).float()) < 1e-2
        assert error(out, expected(of, b, quantise=True)) < LIMITS["fp8"]
    with pytest.raises(KernelError, match="no launch of cute is any of bm8-t32-w8-st3, bm8-t32-w8-st4"):
        KERNEL.launch_inline(
            [described(Config(8, 32, 8, s)) for s in (3, 4)], chosen, KERNEL.prepare(of), b, out, Workspace()
        )


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, 8 bytes off the alignment."""
    buffer = torch.empty(t.nbytes + 8, dtype=torch.uint8)[8:]
    return buffer.view(t.dtype).view(t.shape).copy_(t)


def test_weights_it_refuses() -> None:
    of = layer()
    for bad, message in (
        (replace(of, activation="gelu_tanh"), "swiglu only, not gelu_tanh"),
        (replace(of, down_bias=torch.zeros(EXPERTS, HIDDEN)), "adds no biases"),
        (weights(2, 256, 128, "fp16", "cpu"), "fp8 and bf16 weights, not torch.float16"),
        (weights(2, 384, 128, "fp8", "cpu"), "hidden_size 384 and intermediate_size 128 must be multiples of 256"),
        (replace(of, down=shifted(of.down)), "down must be contiguous and start at a multiple of 16 bytes"),
        (replace(of, gate_up=shifted(of.gate_up)), "gate_up must be contiguous and start at a multiple of 16 bytes"),
    ):
        with pytest.raises(KernelError, match=message):
            KERNEL.prepare(bad)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(KernelError, match=r"Hopper \(sm_90\) only; the weights are on cpu"):
        KERNEL.prepare(layer())


def test_batches_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    of, b = layer(), given(4)
    prepared = KERNEL.prepare(of)

    def refused(message: str, b: Batch = b, out: torch.Tensor = b.hidden_states, config: Config = KINDS[0]) -> None:
        with pytest.raises(KernelError, match=message):
            KERNEL.launch(described(config, config.dtype), prepared, b, out, Workspace())

    half = Batch(b.hidden_states.half(), b.topk_ids, b.topk_weights)
    wide = batch(4, TOP_K, EXPERTS, 512, "uniform", "cpu", torch.bfloat16)
    refused("writes bf16 only: hidden_states are torch.float16", half)
    refused("out is torch.float32", out=b.hidden_states.float())
    refused(r"must be \[T, 256\]", wide)
    refused(r"must be \[T, 256\]", out=b.hidden_states[:3])
    refused("out must be contiguous and start at a multiple of 16 bytes", out=shifted(b.hidden_states))
    refused("hidden_states must be contiguous", replace(b, hidden_states=shifted(b.hidden_states)))
    refused("out on meta", out=b.hidden_states.to("meta"))
    refused("bm8-t32-w8-st3-bf16 computes bf16; the weights are fp8", config=replace(KINDS[0], dtype="bf16"))
    monkeypatch.setattr(launch, "most_tokens", lambda config, shape: 3)
    refused("cute: bm8-t32-w8-st3 takes up to 3 tokens here, not 4; split the batch")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(8, 32, 8, 3, wide=4), "intermediate_size 256 is no multiple of 4 x 128"),
        (Config(8, 32, 8, 4, split_k=4), "fewer steps of 128 than 4 splits"),
        (Config(16, 32, 4, 3), "8 warps' 32 or 4 warps' 64"),
    ],
)
def test_what_is_not_listed_is_not_launched(config: Config, reason: str) -> None:
    """By the predicate that lists configurations: a grid of another shape would leave intermediates out."""
    config_of_another = KernelConfig(config.name, (), described(Config(8, 32, 8, 3)).params)
    params = dict(config_of_another.params) | {f: getattr(config, f) for f in ("block_m", "warps", "wide", "split_k")}
    b = given(3)
    with pytest.raises(KernelError, match=reason):
        KERNEL.launch(
            replace(config_of_another, params=tuple(params.items())),
            KERNEL.prepare(layer()),
            b,
            torch.empty_like(b.hidden_states),
            Workspace(),
        )


def test_a_configuration_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(launch, "load", lambda c: loaded.append(c.name) or emulated(c))
    of, b = layer(), given(2)
    for _ in range(3):
        run(KINDS[0], of, b)
    run(KINDS[1], of, b)
    assert loaded == [KINDS[0].name, KINDS[1].name]
