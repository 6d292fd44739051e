"""Distribute a layer by expert and by tensor parallelism. Every rank chooses its kernel by its own expert histogram.

    torchrun --nproc-per-node 2 examples/5_expert_parallel.py

ep: a rank owns E / ranks experts and has tokens of its own. A token is sent once to every rank that owns one of its
    experts. The ids of other ranks' experts are replaced by -1. One partial sum per token and rank comes back.
tp: a rank owns I / ranks of every expert. Every rank has all tokens, and the partial sums are added up.

Each rank prints its number of tokens, its choice, and how far its output is from that of one GPU. Without GPUs the
layer is tiny. `profiles/benchmarks/parallel` has times.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _parallel import DEVICE, GPU, HALF, MODEL, TOKENS, WAYS, start

# isort: split
import torch.distributed as dist
from ramp_moe import generate, get_registry
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.spec.launchable import Batch


def main() -> None:
    start()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shape = replace(get_registry().shape(MODEL), dtype="fp8")
    weights = random_weights(shape, DEVICE, seed=0)  # the same on all ranks
    builder = Builder("auto" if GPU else "h200")

    torch.manual_seed(1)  # the batches are also the same on all ranks
    ids = torch.from_numpy(generate("zipf1.2", TOKENS * ranks, shape.num_experts, shape.top_k, seed=1)).int()
    x, scores = torch.randn(len(ids), shape.hidden_size).to(HALF), torch.rand(ids.shape).softmax(-1)
    whole = Batch(x.to(DEVICE), ids.to(DEVICE), scores.to(DEVICE))
    alone = builder.layer(weights, shape.top_k)(whole.hidden_states, whole.topk_ids, whole.topk_weights)

    for way, made in WAYS.items():
        parallel = made(weights, shape.top_k, builder)
        mine = slice(rank * TOKENS, (rank + 1) * TOKENS) if way == "ep" else slice(None)
        given = parallel.send(Batch(whole.hidden_states[mine], whole.topk_ids[mine], whole.topk_weights[mine]))
        out = parallel.collect(parallel.layer(given.hidden_states, given.topk_ids, given.topk_weights))
        chosen = parallel.layer.choose(given).name if given.num_tokens else "nothing to do"
        apart = float((out - alone[mine]).float().norm() / alone[mine].float().norm())
        print(f"{way}, rank {rank}: {given.num_tokens} tokens, {chosen}; {apart:.1e} from one GPU's", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
