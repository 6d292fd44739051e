"""Compiles, before serving, whatever eager batches of a layer can need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..cost_model.model import Candidate
from ..errors import RampMoEError, ShapeError
from ..spec.launchable import Batch

if TYPE_CHECKING:
    import torch

    from .layer import LayerRuntime


def warm(layer: LayerRuntime, candidates: Iterable[Candidate], max_tokens: int, dtype: torch.dtype) -> dict[str, str]:
    """Launch each candidate at its `LaunchableKernel.warm_sizes`: it then compiles nothing for 1 to max_tokens tokens.

    The batches route to no expert, so that a launch takes the GPU next to no time. dtype: of the hidden states.

    Returns the reasons why candidates raised, by their names. A server must not use those. Raises ShapeError if
    max_tokens is below 1.
    """
    import torch

    if max_tokens < 1:
        raise ShapeError(f"a layer is warmed for one token or more, not {max_tokens}")
    shape, device = layer.shape, layer.held[0].gate_up.device
    failed: dict[str, str] = {}
    x = torch.zeros(max_tokens, shape.hidden_size, dtype=dtype, device=device)
    ids = torch.full((max_tokens, shape.top_k), -1, dtype=torch.int32, device=device)
    weights = torch.zeros(max_tokens, shape.top_k, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    for candidate in candidates:
        kernel, _ = layer.kernel(candidate.kernel)
        try:
            for size in kernel.warm_sizes(shape, max_tokens):
                layer.launch(candidate, Batch(x[:size], ids[:size], weights[:size]), out[:size])
        except RampMoEError as e:
            failed[candidate.name] = str(e)
        except Exception as e:  # whatever a plugin's kernel raises
            failed[candidate.name] = f"{type(e).__name__}: {e}".partition("\n")[0]
    return failed
