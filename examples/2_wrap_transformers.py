"""Wrap the MoE layers of a Transformers model in one line, generate, and compare with the model's own experts.

    python examples/2_wrap_transformers.py [TOKENS ...]

Needs `pip install '.[transformers]'`. The weights are random. Without a GPU the model is tiny. Passes are eager: the
host launches every kernel. `profiles/benchmarks/wrap` measures CUDA graphs.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ramp_moe
import torch
from _models import GPU, STANDS_FOR, olmoe, prompt

PASSES = 10 if GPU else 1


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits float32 `[1, tokens, vocabulary]`, and milliseconds per pass."""
    with torch.no_grad():
        found = model(ids).logits.float()  # compiles
        if GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(PASSES):
            model(ids)
        if GPU:
            torch.cuda.synchronize()
    return found, (time.perf_counter() - began) * 1e3 / PASSES


def main(sizes: list[int]) -> None:
    model = olmoe()
    batches = [prompt(model, 1, tokens) for tokens in sizes]
    without = [run(model, ids) for ids in batches]

    print(ramp_moe.wrap(model, device=STANDS_FOR))

    print(model.generate(prompt(model, 2, 4), max_new_tokens=4, do_sample=False).tolist())
    for tokens, ids, (expected, stock_ms) in zip(sizes, batches, without, strict=True):
        found, ms = run(model, ids)
        apart = float((found - expected).norm() / expected.norm())
        print(f"{tokens} tokens: {stock_ms:.1f} ms, wrapped {ms:.1f} ms; logits {apart:.1e} apart")
    ramp_moe.unwrap(model)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [8, 128])
