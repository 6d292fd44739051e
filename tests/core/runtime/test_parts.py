"""Batches of more tokens than a kernel takes in one launch: computed in parts, as if there were no limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import PRICES, FakeKernel, H, K, by_hand, inputs, layer, model_of
from ramp_moe import Hardware, KernelConfig, KernelError, MoEShape
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.parts import ALIGNED_TOKENS, parts
from ramp_moe.spec.launchable import Batch


class Limited(FakeKernel):
    most: Any = 48

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> Any:
        return self.most


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 48, 49, 96, 97, 1000])
@pytest.mark.parametrize("most", [1, 2, 15, 16, 17, 31, 48, 999, 1000, 1001, None])
def test_parts_cover_the_batch_once_within_the_limit(tokens: int, most: int | None) -> None:
    x, ids, scores = inputs(tokens)
    out = torch.empty_like(x)
    found = list(parts(Batch(x, ids, scores), out, most))
    for whole, of in ((x, 0), (ids, 1), (scores, 2)):
        mine = [(p.hidden_states, p.topk_ids, p.topk_weights)[of] for p, _ in found]
        assert torch.equal(torch.cat(mine), whole)
    assert sum(len(rows) for _, rows in found) == tokens
    sizes = [part.num_tokens for part, _ in found]
    assert max(sizes) <= (most or tokens)
    for part, rows in found:
        assert rows.data_ptr() - out.data_ptr() == part.hidden_states.data_ptr() - x.data_ptr()
        if most is not None and most >= ALIGNED_TOKENS:
            assert (part.topk_ids.data_ptr() - ids.data_ptr()) % (4 * K * ALIGNED_TOKENS) == 0
    if most is not None and most >= ALIGNED_TOKENS:
        assert len(found) <= -(-tokens // (most - most % ALIGNED_TOKENS))


def test_a_long_batch_is_the_same_in_parts(h200: Hardware) -> None:
    kernel = Limited()
    x, ids, scores = inputs(150)
    ids[7, 0], ids[120, 1] = -1, 99
    moe = layer(h200, kernel)
    out = torch.full_like(x, torch.nan)
    assert moe(x, ids, scores, out) is out
    torch.testing.assert_close(out.float(), by_hand(x, ids, scores), rtol=1e-2, atol=1e-3)
    assert [n for _, n in kernel.launched] == [48, 48, 48, 6]
    in_place = x.clone()
    assert torch.equal(moe(in_place, ids, scores, out=in_place), out)
    # Of one memory, shifted by a row: what a part writes, a later one would read.
    memory = torch.empty(151, H, dtype=x.dtype)
    shifted = memory[:150].copy_(x)
    assert torch.equal(moe(shifted, ids, scores, out=memory[1:]), out)
    for valid in (0, 50, 149):
        padded = moe(x, ids, scores, num_valid=valid)
        assert torch.equal(padded[:valid], out[:valid])
        assert not padded[valid:].any()


def test_the_choice_is_for_the_whole_batch(h200: Hardware) -> None:
    kernel = Limited()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES))
    moe(*inputs(128, "one-hot"))
    assert [name for name, _ in kernel.launched] == ["bm128"] * 3


def test_a_warm_up_and_a_capture_run_the_same_parts(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Limited()
    moe = layer(h200, kernel)
    moe.warm_up(150, torch.bfloat16)
    warmed, kernel.launched = kernel.launched, []
    monkeypatch.setattr("ramp_moe.runtime.layer._capturing", lambda topk_ids: True)
    moe(*inputs(150))
    assert kernel.launched == warmed


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "many"])
def test_a_kernel_that_takes_no_number_of_tokens_is_passed_over(h200: Hardware, most: Any) -> None:
    kernel = Limited("odd")
    kernel.most = most
    with pytest.raises(KernelError, match=r"kernel odd takes .* tokens as bm8; it must take one or more"):
        layer(h200, kernel)(*inputs(3))
    good = FakeKernel("good")
    moe = layer(h200, kernel, good)
    moe(*inputs(3))
    assert good.launched == [("bm8", 3)]
    assert "it must take one or more" in moe.dropped["odd"]


# --- on a GPU: more ids than one schedule sorts ----------------------------------------------------------------------


def long_batch(tokens: int, top_k: int, hidden: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda", dtype=torch.float32).bfloat16()
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator, device="cuda", dtype=torch.int32)
    return x, ids, torch.rand(tokens, top_k, generator=generator, device="cuda", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_gpu_a_long_batch_is_the_same_in_parts(dtype: str) -> None:
    """131,073 tokens of 8 experts each, eager and captured: one token more than one launch takes."""
    from moe_cases import weights
    from ramp_moe.registry.detect import detect
    from ramp_moe_kernels.triton.kernel import TritonMoE

    moe = LayerRuntime(weights(16, 128, 128, dtype, "cuda"), 8, detect(), [TritonMoE()])
    x, ids, scores = long_batch(2**17 + 1, 8, 128, 16)
    out = torch.full_like(x, torch.nan)
    moe(x, ids, scores, out, num_valid=2**17 - 5)
    for first in range(0, len(x), 10_000):
        some = slice(first, first + 10_000)
        valid = min(max(2**17 - 5 - first, 0), len(x[some]))
        of_some = moe(x[some], ids[some].contiguous(), scores[some].contiguous(), num_valid=valid)
        torch.testing.assert_close(out[some], of_some, rtol=2**-6, atol=2**-6)
    assert not out[2**17 - 5 :].any()
    moe.warm_up(len(x), torch.bfloat16)
    captured, graph = torch.full_like(x, torch.nan), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe(x, ids, scores, captured)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured[: 2**17 - 5], moe(x, ids, scores)[: 2**17 - 5])


@pytest.mark.gpu
def test_gpu_more_elements_than_32_bits_count() -> None:
    """Rows of 2^31 elements and more: of a token in the last part, as by itself."""
    from moe_cases import weights
    from ramp_moe.registry.detect import detect
    from ramp_moe_kernels.triton.kernel import TritonMoE

    moe = LayerRuntime(weights(4, 4096, 128, "bf16", "cuda"), 2, detect(), [TritonMoE()])
    tokens = 2**31 // 4096 + 1000
    x, ids, scores = long_batch(tokens, 2, 4096, 4)
    out = moe(x, ids, scores)
    for first in (0, tokens // 2, tokens - 64):
        some = slice(first, first + 64)
        torch.testing.assert_close(out[some], moe(x[some], ids[some], scores[some]), rtol=2**-6, atol=2**-6)
