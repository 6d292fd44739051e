"""Expert and tensor parallelism around a layer: the weights of each rank, and what it sends and collects.

Without a GPU, the ranks communicate by gloo, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if GPU else torch.device("cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch.distributed as dist  # noqa: E402
from ramp_moe import ShapeError  # noqa: E402
from ramp_moe.runtime.layer_factory import Builder  # noqa: E402
from ramp_moe.spec.launchable import Batch, MoEWeights  # noqa: E402
from torch import Tensor  # noqa: E402

MODEL, TOKENS = ("olmoe-1b-7b", 512) if GPU else ("E4-k2-h128-i256-fp8", 2)
# Triton's interpreter truncates where a GPU rounds to bf16.
HALF = torch.bfloat16 if GPU else torch.float16
PATIENCE = timedelta(seconds=120)
"""Longest time that a rank waits for another, for example while that one compiles. Then it ends, and torchrun ends the
others."""


def start() -> None:
    """Join the ranks that torchrun started."""
    if GPU:
        torch.cuda.set_device(DEVICE)  # kernels run on the current one
    dist.init_process_group("nccl" if GPU else "gloo", timeout=PATIENCE, device_id=DEVICE if GPU else None)


class ExpertParallel:
    """A layer of this rank's experts, for the tokens of all ranks. Raises ShapeError if the experts do not divide over
    the ranks, or if a rank has fewer experts than top_k."""

    def __init__(self, whole: MoEWeights, top_k: int, builder: Builder) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if len(whole.down) % ranks:
            raise ShapeError(f"{len(whole.down)} experts do not divide over {ranks} ranks")
        self.ranks = torch.arange(ranks, device=DEVICE)[:, None, None]
        self.layer = builder.layer(sharded(whole, *[lambda t: t.chunk(ranks)[rank].clone()] * 2), top_k, ranks)

    def send(self, batch: Batch) -> Batch:
        """Exchange tokens, and return those of all ranks for this rank's experts, one row per token. Ids are numbers of
        this rank's experts, or -1."""
        local = self.layer.shape.num_experts
        # The skipped ids -1 and E belong to no rank: their quotients are -1 and the number of ranks.
        wanted = (batch.topk_ids // local == self.ranks).any(2)
        rank, self.token = wanted.nonzero(as_tuple=True)  # in the order of ranks
        self.num_tokens, sent = batch.num_tokens, wanted.sum(1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        self.sent, self.received = sent.tolist(), received.tolist()
        ids = batch.topk_ids[self.token] - local * rank[:, None].int()
        ids = ids.where((ids >= 0) & (ids < local), -1)
        rows = batch.hidden_states[self.token], ids, batch.topk_weights[self.token]
        return Batch(*(exchange(t, self.sent, self.received) for t in rows))

    def collect(self, partial: Tensor) -> Tensor:
        """The output `[T, H]` of this rank's tokens, from one partial sum for each row that `send` returned."""
        back = exchange(partial, self.received, self.sent).float()
        return back.new_zeros(self.num_tokens, back.shape[1]).index_add_(0, self.token, back).to(partial.dtype)


class TensorParallel:
    """A layer of this rank's part of every expert. Raises ShapeError if the intermediate size does not divide."""

    def __init__(self, whole: MoEWeights, top_k: int, builder: Builder) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        whole.shape(top_k).shard(ranks)

        def rows(t: Tensor) -> Tensor:  # of gate, and the same of up
            return t.unflatten(1, (2, -1)).chunk(ranks, 2)[rank].flatten(1, 2).contiguous()

        self.layer = builder.layer(sharded(whole, rows, lambda t: t.chunk(ranks, 2)[rank].contiguous()), top_k)

    def send(self, batch: Batch) -> Batch:
        return batch

    def collect(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial)
        return partial


WAYS = {"ep": ExpertParallel, "tp": TensorParallel}


def sharded(whole: MoEWeights, gate_up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor]) -> MoEWeights:
    parts = (gate_up, whole.gate_up), (down, whole.down), (gate_up, whole.gate_up_scale), (down, whole.down_scale)
    return MoEWeights(*(None if t is None else part(t) for part, t in parts))


def exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send rows, ordered by the rank that they go to. Returns the rows received, ordered by the rank that they come
    from. `sent` and `received` are numbers of rows per rank."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows, received, sent)
    return out
