"""Computes eager batches whose kernel raises with the next best candidate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..cost_model.model import Candidate
from ..errors import KernelError, RoutingError, ShapeError
from ..spec.launchable import Batch
from .parts import ALIGNED_TOKENS, overlap

if TYPE_CHECKING:
    from torch import Tensor

    from .protocols import Launching

_logger = logging.getLogger("ramp_moe")


def compute(layer: Launching, choose: Callable[[], Candidate], batch: Batch, out: Tensor) -> None:
    """Run the candidate that `choose` returns. If it raises, drop it with one line in the log, and choose again.

    This is repeated until the batch is computed. It is safe since candidates write all of out, and only read the batch.
    If memory is lacking, the same candidate is tried on ever smaller parts of the batch. ShapeError and RoutingError
    are about the batch, and raised as they are.

    Raises KernelError with the reasons if no candidate is left. Raises KernelError at the first failure in three cases:

    - in the capture of a graph;
    - if out overlaps hidden_states, which may be half overwritten by then;
    - if the GPU answers no more: after an illegal access nothing runs in this process.
    """
    failed: dict[str, str] = {}
    most = None
    while True:
        candidate = choose()
        try:
            layer.launch(candidate, batch, out, most)
            return
        except (ShapeError, RoutingError):
            raise
        except Exception as e:  # whatever a kernel raises
            import torch

            said = f"{type(e).__name__}: {e}".partition("\n")[0]
            if reason := _lost(out):
                raise KernelError(f"{candidate.name} failed ({said}), and the GPU with it ({reason}); restart") from e
            where = None  # the case that rules out a second try
            if _capturing(out):
                where = "in the capture of a graph"
            elif overlap(batch.hidden_states, out):
                where = "while out overlaps hidden_states"
            if isinstance(e, torch.OutOfMemoryError):  # which says nothing of the candidate
                if where is not None:
                    raise KernelError(f"{candidate.name} lacks memory {where}; free some, then run that again") from e
                most = _fewer(batch, most)
                if most is None:
                    raise KernelError(f"{candidate.name} lacks memory for {ALIGNED_TOKENS} tokens: {said}") from e
                torch.cuda.empty_cache()
                _logger.warning("ramp_moe: %s lacks memory; in parts of %d tokens", candidate.name, most)
                continue
            dropped = layer.drop(candidate, f"raised {said}")
            failed[candidate.name] = said
            if dropped is None:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in (layer.dropped | failed).items())
                raise KernelError(f"no kernel computes {batch.num_tokens} tokens ({reasons})") from e
            _logger.warning("ramp_moe: dropped %s, which raised %s", dropped, said)
            if where is not None:
                raise KernelError(f"{candidate.name} failed {where} and is dropped; run that again ({said})") from e


def _fewer(batch: Batch, most: int | None) -> int | None:
    """Half as many tokens at a time; None if those are fewer than ALIGNED_TOKENS."""
    half = (batch.num_tokens if most is None else most) // 2
    return half if half >= ALIGNED_TOKENS else None


def _capturing(out: Tensor) -> bool:
    import torch

    return out.is_cuda and torch.cuda.is_current_stream_capturing()


def _lost(out: Tensor) -> str | None:
    """Why the GPU does not answer this process; None if it does, or if it cannot be asked: in a capture."""
    import torch

    if not out.is_cuda or _capturing(out):
        return None
    try:
        torch.cuda.synchronize(out.device)
    except Exception as e:
        return f"{type(e).__name__}: {e}".partition("\n")[0]
    return None
