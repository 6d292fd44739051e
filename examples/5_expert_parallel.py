"""Expert and tensor parallelism: every rank chooses its kernel by the histogram of what it computes itself.

    torchrun --nproc-per-node 2 examples/5_expert_parallel.py

ep: a rank owns E / ranks experts and has tokens of its own. A token travels once to every rank that owns one of its
    experts, with -1 in the place of the others, and one partial sum comes back.
tp: a rank owns I / ranks of every expert; every rank has all tokens, and the partial sums are added up.

Each rank prints what it had to do and what it chose; rank 0 also how far the output is from one GPU's. Without GPUs the
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
    weights = random_weights(shape, DEVICE, seed=0)  # alike on all ranks
    builder = Builder("auto" if GPU else "h200")

    torch.manual_seed(1)  # so are the batches
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
