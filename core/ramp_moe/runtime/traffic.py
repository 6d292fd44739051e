"""What a server's layers routed, sampled on the device while they run, for `ramp-moe compare --trace`.

Each layer keeps the latest SLOTS batches of each class of sizes, and counts all of them. Sizes of a class have the same
next power of two. A batch costs one launch of one CTA, in CUDA graphs, too, and nothing on the host. A layer's memory
is CLASSES * (SLOTS * (experts + 1) * 4 + 8) bytes: 0.15 MB with 128 experts.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import RoutingError
from ..measurements.json_file import write_atomically

SLOTS = 16
CLASSES = 18
"""Up to 131,072 tokens; larger batches are in the last class."""
BLOCK = 1024
"""Ids that the launch reads at a time."""


@triton.jit(do_not_specialize=["num_ids", "num_tokens", "num_experts"])
def sample_kernel(
    topk_ids,  # [num_ids]
    ring,  # int32 [SLOTS, 1 + num_experts]
    seen,  # int64 [1]
    num_ids,
    num_tokens,
    num_experts,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,  # a power of two, more than num_experts
    BLOCK: tl.constexpr,
):
    """Write the batch's tokens and histogram over the oldest entry, and count it. Ids out of range are skipped."""
    count = tl.load(seen)
    entry = ring + (count % SLOTS) * (1 + num_experts)
    histogram = tl.zeros((BINS,), tl.int32)
    for begin in range(0, num_ids, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        ids = tl.load(topk_ids + at, mask=at < num_ids, other=-1).to(tl.int32)
        histogram += tl.histogram(tl.where((ids >= 0) & (ids < num_experts), ids, num_experts), BINS)
    expert = tl.arange(0, BINS)
    tl.store(entry + 1 + expert, histogram, mask=expert < num_experts)
    tl.store(entry, num_tokens)
    tl.store(seen, count + 1)


class Traffic:
    """Samples of the layers of one model; calls of one layer follow each other on one stream.

    num_experts: of all ranks. Raises RoutingError if there is nothing to write.
    """

    def __init__(self, num_experts: int, top_k: int, device: torch.device) -> None:
        self.num_experts, self.top_k, self._device = num_experts, top_k, device
        self._rings: list[Tensor] = []
        self._seen: list[Tensor] = []

    def layer(self) -> int:
        """Make place for another layer, and return its number."""
        size = CLASSES, SLOTS, 1 + self.num_experts
        self._rings.append(torch.zeros(size, dtype=torch.int32, device=self._device))
        self._seen.append(torch.zeros(CLASSES, dtype=torch.int64, device=self._device))
        return len(self._rings) - 1

    def sample(self, layer: int, topk_ids: Tensor) -> None:
        """Keep a batch of a layer, in the order of the current stream: topk_ids contiguous int32 or int64 `[T, k]`."""
        tokens = len(topk_ids)
        if not tokens:
            return
        of = min((tokens - 1).bit_length(), CLASSES - 1)
        sample_kernel[(1,)](
            topk_ids,
            self._rings[layer][of],
            self._seen[layer][of:],
            topk_ids.numel(),
            tokens,
            self.num_experts,
            SLOTS=SLOTS,
            BINS=triton.next_power_of_2(self.num_experts + 1),
            BLOCK=BLOCK,
        )

    def read(self) -> Iterator[tuple[int, list[int], float]]:
        """Tokens and histogram of each batch that is kept, and how many that ran it stands for. Waits for a copy of the
        samples alone: nothing that runs meanwhile is held up."""
        rings, seen = _to_host(self._rings), _to_host(self._seen)
        for ring, counts in zip(rings, seen, strict=True):
            for entries, count in zip(ring, counts.tolist(), strict=True):
                # Of a full ring the oldest entry may be half overwritten by now.
                kept = [i for i in range(min(count, SLOTS)) if count < SLOTS or i != count % SLOTS]
                good = [e for i in kept if 0 < sum((e := entries[i].tolist())[1:]) <= e[0] * self.top_k]
                for tokens, *histogram in good:
                    yield tokens, histogram, count / len(good)

    def write(self, path: Path, source: str) -> int:
        """Write a trace, whole or not at all, and return how many batches it has. Raises RoutingError if none ran,
        ProfileError if the file cannot be written."""
        batches = [
            {"tokens": tokens, "histogram": histogram, "runs": round(runs, 3)}
            for tokens, histogram, runs in self.read()
        ]
        if not batches:
            raise RoutingError("no batch with a token was recorded yet")
        header = {"num_experts": self.num_experts, "top_k": self.top_k, "source": source, "layers": len(self._rings)}
        write_atomically(path, msgspec.json.Encoder().encode_lines([header, *batches]))
        return len(batches)


def _to_host(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors or not tensors[0].is_cuda:
        return [t.clone() for t in tensors]
    device = tensors[0].device
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        found = [t.to("cpu", non_blocking=True) for t in tensors]
    stream.synchronize()
    return found
