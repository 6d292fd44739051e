"""Refuses what is no dense tensor, by name and with the remedy."""

from __future__ import annotations

from ..errors import RampMoEError


def check_dense(error: type[RampMoEError], **given: object) -> None:
    """Raises `error` for the first of the arguments that is no tensor, or a nested or sparse one."""
    import torch

    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            remedy = "convert it by torch.as_tensor" if hasattr(value, "__array__") else "give a torch tensor"
            raise error(f"{name} must be a tensor, not {type(value).__name__}; {remedy}")
        if value.is_nested or value.layout is not torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise error(f"{name} is a {kind} tensor; give a dense one, as by .to_dense() or to_padded_tensor()")
