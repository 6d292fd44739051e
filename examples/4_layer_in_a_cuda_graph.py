"""Replay one CUDA graph on two routings of the same number of tokens: the device chooses a kernel at every replay.

    python examples/4_layer_in_a_cuda_graph.py [--model deepseek-v3-tp8] [--tokens 512]

Weights are random, in fp8. The cost model is fitted to the recorded profiles of the installed kernels. The exit code is
2 without a GPU, and 1 if one candidate is best for every routing or an output differs too much.
"""

from __future__ import annotations

import itertools
import sys

import torch
from _recorded_layer import arguments, need_gpu, recorded_layer
from ramp_moe import expert_histogram, generate
from ramp_moe.spec.launchable import Batch

UNORDERED = 0.01
"""Bound on the relative difference of two runs of a kernel that adds to a bf16 output in no fixed order."""
KINDS = ("uniform", "zipf1.2", "zipf2.0", "active0.125", "dirichlet0.3", "balancedness0.5")


def main(argv: list[str]) -> int:
    parser = arguments(__doc__, "deepseek-v3-tp8")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args(argv)
    need_gpu()
    recorded = recorded_layer(options.model)
    layer, shape, tokens = recorded.layer, recorded.layer.shape, options.tokens

    plan = layer.warm_up(tokens, torch.bfloat16)
    assert plan is not None
    assert layer.graphs is not None
    print(f"{shape.label}, {tokens} tokens: mode {plan.mode} ({plan.why}), {len(plan.bodies)} bodies")
    for body in plan.bodies:
        print(f"  {body.name}")
    for name, reason in (layer.dropped | layer.graphs.dropped).items():
        print(f"  left out: {name}: {reason}")
    short = plan.shortlist
    print(f"  slower than the best of all candidates by {short.loss:.2%}, the first alone by {short.single_loss:.2%}; "
          f"choosing saves {short.gain_us:.1f} us and costs {short.overhead_us:.1f} us")  # fmt: skip
    if plan.selector is None:
        print("there is nothing to choose; take another model or number of tokens")
        return 1

    # Two routings for which the cost model chooses different bodies, if possible of different kernels.
    routings = {kind: generate(kind, tokens, shape.num_experts, shape.top_k, seed=1) for kind in KINDS}
    columns = list(short.columns)
    best = {
        kind: int(recorded.model.cost(expert_histogram(ids, shape.num_experts))[columns].argmin())
        for kind, ids in routings.items()
    }
    pair = max(
        itertools.combinations(KINDS, 2),
        key=lambda p: (plan.bodies[best[p[0]]].kernel != plan.bodies[best[p[1]]].kernel, best[p[0]] != best[p[1]]),
    )

    x = torch.randn(tokens, shape.hidden_size, device="cuda").bfloat16()
    ids = torch.zeros(tokens, shape.top_k, dtype=torch.int32, device="cuda")
    scores = torch.rand(tokens, shape.top_k, device="cuda").softmax(-1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = layer(x, ids, scores)

    chosen = set()
    for kind in pair:
        ids.copy_(torch.from_numpy(routings[kind]))
        graph.replay()
        candidate = plan.bodies[int(plan.selector.choice)]
        plain = torch.empty_like(out)
        layer.launch(candidate, Batch(x, ids, scores), plain)
        apart = float((out.float() - plain.float()).norm() / plain.float().norm())
        print(f"{kind}: the graph ran {candidate.name}; its output differs from a plain launch's by {apart:.1e} of it")
        chosen.add(candidate.name)
        if not apart < UNORDERED:
            return 1
    print(f"one graph, {len(chosen)} configurations")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
