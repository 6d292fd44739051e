"""Choosing a kernel and configuration for a batch, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cost_model.model import Candidate, CostModel
from ..errors import RoutingError
from ..registry.registry import get_registry
from ..spec.routing import check_histogram
from ..spec.shapes import DEFAULT_DTYPE
from .load_model import load_model
from .profile_store import ProfileStore


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate with the lowest predicted time; the first of several equal ones.

    extrapolated: the batch lies outside the batches that the cost model was fitted to.
    """

    candidate: Candidate
    index: int
    predicted_us: float
    extrapolated: bool


class Dispatcher:
    """Reads an expert histogram and names the fastest candidate of a cost model."""

    def __init__(self, model: CostModel) -> None:
        self.model = model

    @classmethod
    def for_model(cls, model: str, device: str, kernels: Sequence[str] = (), dtype: str | None = None) -> Dispatcher:
        """Make a dispatcher over what is recorded for a named model and device, of these kernels (of all if empty).

        dtype: format of the weights; if neither this nor the model's name says it, that of the model's release, or fp8
        if that has 16 bits. If these kernels have no profile of the shape, profiles of other shapes are used (see
        `transfer`), or of the nearest device (see `scaling`). Then `model.guessed` is True, and every choice
        extrapolates.

        Raises UnknownNameError for a name nobody registered, ProfileError if nothing is recorded.
        """
        registry = get_registry()
        store = ProfileStore(shipped=registry.profile_dirs)
        shape = registry.shape(model, dtype, DEFAULT_DTYPE)
        found, _ = load_model(registry, store, shape, registry.device(device), kernels)
        return cls(found)

    def choose(self, histogram: Any, num_tokens: int | None = None) -> Choice:
        """Choose the fastest candidate for one batch. Takes about 50 us for 152 configurations and 64 experts.

        histogram: tokens per expert, integers `[num_experts]`, on the host. num_tokens: bounds the sum by tokens x
        top_k, and is what corrections of the model go by, if given. Raises RoutingError for a histogram that does not
        fit the shape.
        """
        shape = self.model.shape
        max_ids = None if num_tokens is None else num_tokens * shape.top_k
        checked = check_histogram(histogram, shape.num_experts, max_ids)
        if checked.ndim != 1:
            raise RoutingError(f"choose takes one expert histogram, not a batch of shape {checked.shape}")
        model = self.model if num_tokens is None else self.model.at(num_tokens)
        index, us, extrapolated = model.choose(checked)
        return Choice(self.model.candidates[index], index, us, extrapolated)
