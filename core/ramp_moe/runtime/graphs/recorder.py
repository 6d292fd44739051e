"""Records on the device what a layer routes and chooses while graphs are replayed. The host reads it at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...errors import KernelError, RoutingError
from ...measurements.json_file import write_atomically
from ...spec.routing import IntArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RecordedBatches:
    """Batches in the order in which they ran.

    tokens: int64 `[batches]`.
    choices: int64 `[batches]`, labels of the cost table.
    histograms: int64 `[batches, num_experts]`.
    lost: number of batches before them, which were overwritten.
    """

    tokens: IntArray
    choices: IntArray
    histograms: IntArray
    lost: int

    def counts(self, candidates: Sequence[str]) -> dict[str, int]:
        """How often each candidate was chosen, the most frequent first. Those that never were are left out.

        candidates: names by label.
        """
        return {candidates[c]: n for c, n in Counter(self.choices.tolist()).most_common()}


class Recorder:
    """The latest `slots` batches of one layer, which selection kernels write and `read` reads.

    ring: int32 `[slots, 2 + num_experts]`. An entry is [tokens, choice, histogram...]. tokens counts those before
        num_valid, and choice is the candidate's label in the cost table.
    counter: int64 `[1]`, batches so far. Batch i is, or was, entry i % slots.

    A selection kernel writes entry counter % slots, and then counter + 1. So calls that share a recorder must follow
    each other on one stream. Raises KernelError if any argument is below one.
    """

    def __init__(self, slots: int, num_experts: int, top_k: int, device: torch.device | str) -> None:
        import torch

        if min(slots, num_experts, top_k) < 1:
            raise KernelError(
                f"a recorder needs at least one slot, expert and id a token, not {slots}, {num_experts} and {top_k}"
            )
        self.slots, self.num_experts, self.top_k = slots, num_experts, top_k
        self.ring = torch.zeros(slots, 2 + num_experts, dtype=torch.int32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    def check(self, num_experts: int, top_k: int, device: torch.device) -> None:
        """Raises KernelError if a selection kernel of these sizes, or on this device, cannot write here."""
        if (self.num_experts, self.top_k, self.ring.device) != (num_experts, top_k, device):
            raise KernelError(
                f"the recorder is for {self.top_k} of {self.num_experts} experts on {self.ring.device}, the choice for "
                f"{top_k} of {num_experts} on {device}; make it for those"
            )

    def read(self) -> RecordedBatches:
        """Read what is recorded so far, and keep it. Waits for the device."""
        import torch

        if self.ring.is_cuda:
            torch.cuda.synchronize(self.ring.device)  # the layer may run on another stream
        total = int(self.counter.item())
        kept = min(total, self.slots)
        entries = self.ring.roll(-(total % self.slots) if kept == self.slots else 0, 0)[:kept].cpu().long().numpy()
        return RecordedBatches(entries[:, 0], entries[:, 1], entries[:, 2:], total - kept)

    def write(self, path: str | Path, candidates: Sequence[str], source: str = "") -> None:
        """Write a routing trace (see `measurements.trace`), whole or not at all.

        Its header has `source`, how often each candidate was chosen, and how many batches were lost. The batches with a
        token follow. candidates: names by label in the cost table. Raises RoutingError if no batch with a token was
        recorded, ProfileError if the file cannot be written.
        """
        found = self.read()
        if not found.tokens.any():
            raise RoutingError("no batch with a token was recorded; run the layer first")
        header = {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "source": source,
            "choices": found.counts(candidates),
            "lost": found.lost,
        }
        batches = [
            {"tokens": tokens, "choice": candidates[choice], "histogram": histogram}
            for tokens, choice, histogram in zip(
                found.tokens.tolist(), found.choices.tolist(), found.histograms.tolist(), strict=True
            )
            if tokens
        ]
        write_atomically(Path(path), msgspec.json.Encoder().encode_lines([header, *batches]))
