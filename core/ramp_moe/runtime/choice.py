"""Chooses the candidate that computes an eager batch, among those that have not failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..cost_model.model import Candidate, CostModel
from ..dispatch.dispatcher import Dispatcher
from ..dispatch.shortlist import choice_by_batch_size
from ..errors import KernelError
from ..spec.hardware import Hardware
from ..spec.launchable import LaunchableKernel
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape

MOST_FAILURES = 3
"""Failed candidates after which their kernel is dropped as a whole, if there are other kernels."""

MOST_SIZES = 1024
"""Most batch sizes whose choice is remembered. Servers' eager batches can be of any size."""


class Chooser:
    """Chooses among the candidates of a layer's kernels.

    Without a cost model it takes the static default of the first kernel that has one. It does the same once all of a
    model's candidates have failed: kernels without a candidate in the model are then left.
    """

    def __init__(
        self,
        shape: MoEShape,
        hardware: Hardware,
        kernels: Sequence[LaunchableKernel],
        cost_model: CostModel | None,
        ep_size: int,
    ) -> None:
        self._shape, self._hardware, self._ep_size = shape, hardware, ep_size
        self._kernels = {kernel.name: kernel for kernel in kernels}
        self._failures = Counter[str]()
        self._gone = set[str]()
        """Names of the candidates that were dropped."""
        self._growing = False
        self.dispatcher = None if cost_model is None else Dispatcher(cost_model.restrict(list(self._kernels)))
        """None if there is no model."""
        self._latest: dict[int, Candidate] = {}
        """The latest choice by histogram, by number of tokens."""
        self._known: dict[tuple[int, float], Candidate | None] = {}
        """Results of `choice_by_batch_size`, by its arguments."""

    @property
    def kernels(self) -> list[LaunchableKernel]:
        """The kernels that were not dropped, in the order of preference."""
        return list(self._kernels.values())

    @property
    def model(self) -> CostModel | None:
        """The cost model of the candidates that were not dropped; None if there is none."""
        return None if self.dispatcher is None else self.dispatcher.model

    def take(self, cost_model: CostModel, growing: bool = False) -> None:
        """Choose among the candidates of this model from now on, except for those that were dropped.

        growing: there will be more candidates, so that no kernel is dropped for lack of others. Choosers that are given
        one model, and have dropped nothing, share what is derived from it.
        """
        self._growing = growing
        left = [c for c in cost_model.candidates if c.kernel in self._kernels and c.name not in self._gone]
        if left:
            kept = {c.name for c in left}
            self.dispatcher = Dispatcher(cost_model.without({c.name for c in cost_model.candidates} - kept))
            self._known.clear()

    def by_histogram(self, num_tokens: int, histogram: IntArray) -> Candidate:
        """The candidate that the model predicts to be fastest. There must be a model.

        histogram: int64 `[num_experts]` of a batch of num_tokens.
        """
        assert self.dispatcher is not None
        found = self._latest[num_tokens] = self.dispatcher.choose(histogram, num_tokens).candidate
        return found

    def choice_by_batch_size(self, num_tokens: int, host_sync_us: float) -> Candidate | None:
        """The one candidate for a batch size if reading the histogram back would not pay; None if it would."""
        key = num_tokens, host_sync_us
        try:
            return self._known[key]  # looked up once: another thread may clear it
        except KeyError:
            pass
        found = self._by_batch_size(num_tokens, host_sync_us)
        if len(self._known) >= MOST_SIZES:
            self._known.clear()
        self._known[key] = found
        return found

    def _by_batch_size(self, num_tokens: int, host_sync_us: float) -> Candidate | None:
        if self.dispatcher is None:
            return self._static(num_tokens)
        if not host_sync_us or not num_tokens:
            return None
        return choice_by_batch_size(self.dispatcher.model, num_tokens, host_sync_us, self._ep_size)

    def by_size(self, num_tokens: int, host_sync_us: float) -> Candidate:
        """The choice for a batch size alone, also if the histogram decides in eager batches.

        In that case it is the candidate that ran last, since a capture need not allocate its buffers. If none ran, it
        is the model's choice for an even spread.
        """
        if known := self.choice_by_batch_size(num_tokens, host_sync_us) or self._latest.get(num_tokens):
            return known
        assert self.dispatcher is not None
        each, rest = divmod(-(-num_tokens * self._shape.top_k // self._ep_size), self._shape.num_experts)
        return self.dispatcher.choose(each + (np.arange(self._shape.num_experts) < rest)).candidate

    def _static(self, num_tokens: int) -> Candidate:
        if not self._kernels:
            raise KernelError("every kernel of the layer computes something else; its `dropped` says what")
        failed: list[str] = []
        for kernel in self._kernels.values():
            try:
                config = kernel.default_config(self._shape, self._hardware, num_tokens)
                return Candidate(kernel.name, config)
            except Exception as e:  # a plugin's own mistake, or a GPU that no configuration fits
                failed.append(f"{kernel.name}: {type(e).__name__}: {e}")
        raise KernelError(f"no kernel has a default for {num_tokens} tokens ({'; '.join(failed)})")

    def drop(self, candidate: Candidate, even_last: bool) -> str | None:
        """Choose a candidate no more.

        Returns the name of what is dropped: the candidate, or its kernel. The kernel is dropped if it has failed
        MOST_FAILURES times, or has no other candidate. None if nothing is dropped: the last candidate stays, since it
        may compute other batches, unless even_last.
        """
        kernel = candidate.kernel
        self._known.clear()
        if kernel not in self._kernels:
            return kernel
        model = self.model
        known = [] if model is None else list(model.candidates)
        left = [c for c in known if c.name != candidate.name]
        if known and len(left) == len(known):
            return candidate.name
        self._failures[kernel] += 1
        own = self._growing or any(c.kernel == kernel for c in left)
        others = len(self._kernels) > 1
        if not own and not others and not even_last:
            return None
        whole = not own or (others and self._failures[kernel] >= MOST_FAILURES)
        if whole:
            del self._kernels[kernel]
            left = [c for c in left if c.kernel != kernel]
        kept = {c.name for c in left}
        self._gone |= {c.name for c in known} - kept
        self._latest = {n: c for n, c in self._latest.items() if c.name in kept}
        if model is not None:
            self.dispatcher = Dispatcher(model.without(self._gone)) if left else None
        return kernel if whole else candidate.name
