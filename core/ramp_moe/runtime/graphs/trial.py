"""Runs a candidate before any capture, and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ...spec.launchable import Batch
from ..reference import misfit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHECKED_TOKENS = 32
"""First tokens of a batch whose output is compared with the reference."""
GUARD = 7.0
"""Value of the rows around a tested output, which must not change."""


class Misbehaviour(NamedTuple):
    reason: str
    wrong: bool = False
    """Whether the output was wrong. If not, the candidate raised."""
    passing: bool = False
    """Whether memory was lacking, which is no fault of the candidate."""


@dataclass
class SizeTrial:
    """What `prepare` learns about one batch size on its way to a plan."""

    batch: Batch
    expected: Callable[[], Tensor]
    """The reference's output for the first tokens of the batch."""
    right: set[str]
    """Candidates whose output was right, in any layer of the cost model."""
    refused: dict[str, str]
    """Why modes are impossible, by mode."""
    unfit: dict[str, str]
    """Why candidates do not take the batch's dtype, by name."""
    run: set[str] = field(default_factory=set)
    """Names of the candidates that were run."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why candidates are left out of this plan alone, by name."""


def misbehaves(
    launch: Callable[[Batch, Tensor], None], batch: Batch, expected: Tensor | None, format: str
) -> Misbehaviour | None:
    """Why a launch must not be captured; None if nothing is wrong with it.

    expected: the first tokens' output `[tokens, H]`; None: the output is not compared.
    format: of the weights, which says how far outputs may lie from that.
    """
    import torch

    x = batch.hidden_states
    device, side = x.device, side_stream(x.device)
    guarded = torch.full((len(x) + 2, x.shape[1]), GUARD, dtype=x.dtype, device=x.device)
    try:
        for stream in (torch.cuda.current_stream(device), side):
            # A capture runs on the caller's stream or on ours, and each stream has buffers of its own.
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                launch(batch, guarded[1:-1])
            torch.cuda.current_stream(device).wait_stream(stream)
        if expected is None:
            return None
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as e:
        return Misbehaviour(f"lacks memory: {e}".partition("\n")[0], passing=True)
    except Exception as e:  # whatever a kernel raises
        return Misbehaviour(f"raised {type(e).__name__}: {e}")
    if not (guarded[0] == GUARD).all() or not (guarded[-1] == GUARD).all():
        return Misbehaviour("wrote outside its output", wrong=True)
    if wrong := misfit(guarded[1 : 1 + len(expected)], expected, format):
        return Misbehaviour(f"wrong output: {wrong}", wrong=True)
    return None


def even_batch(num_tokens: int, top_k: int, dtype: torch.dtype, down: torch.Size, device: torch.device) -> Batch:
    """A random batch with even routing.

    dtype: of the hidden states. down: `[E, H, I]`, the shape of the down projection.
    """
    import torch

    experts, hidden, _ = down
    generator = torch.Generator(device).manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, device=device, dtype=dtype, generator=generator)
    scores = torch.rand(num_tokens, experts, dtype=torch.float32, device=device, generator=generator)
    ids = scores.topk(top_k, -1).indices.int()
    weights = torch.rand(num_tokens, top_k, dtype=torch.float32, device=device, generator=generator)
    return Batch(x, ids, weights / weights.sum(-1, keepdim=True))


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all layers capture bodies of conditional nodes.

    Buffers are each stream's own, so these bodies share one set of a workspace. Graphs of such layers must not run at
    the same time.
    """
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def first(batch: Batch, tokens: int) -> Batch:
    """The first tokens of a batch, which share no memory with it unless it has no more."""
    of: Any = (batch.hidden_states, batch.topk_ids, batch.topk_weights)
    return Batch(*(t[:tokens].contiguous() for t in of))
