"""Wrap a MoE block of your own by the names of its weights. Without a GPU Triton's interpreter runs the kernels.

python examples/3_own_module.py
"""

from __future__ import annotations

import ramp_moe
import torch
from _models import DEVICE, DTYPE, STANDS_FOR
from torch import nn


class MoE(nn.Module):
    """A plain MoE block, which computes one expert after the other."""

    def __init__(self, experts: int, top_k: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w13 = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, intermediate) * intermediate**-0.5)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, ids = self.router(x).softmax(-1).topk(self.top_k)
        return ids, scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, scores = self.route(x)
        out = torch.zeros_like(x)
        for expert in range(len(self.w13)):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ self.w13[expert].T).chunk(2, -1)
            found = (nn.functional.silu(gate) * up) @ self.w2[expert].T
            out.index_add_(0, token, found * scores[token, slot, None])
        return out


torch.manual_seed(0)
block = MoE(experts=8, top_k=2, hidden=64, intermediate=32).to(DEVICE, DTYPE)
x = torch.randn(16, 64, device=DEVICE, dtype=DTYPE)
with torch.no_grad():
    expected = block(x)
    print(ramp_moe.wrap(block, ramp_moe.Experts(MoE, "w13", "w2", "top_k", route=MoE.route), device=STANDS_FOR))
    apart = float((block(x) - expected).float().norm() / expected.float().norm())
print(f"outputs are {apart:.1e} apart")
