"""Dispatch inside CUDA graphs.

The few candidates that win at a batch size become bodies of the graph. At every replay the device chooses one of them
by the batch's expert histogram. There are five modes:

    nodes    the kernel that chooses switches the bodies' kernels on and off (see `conditional`)
    switch   a conditional node runs one body's graph (see `conditional`)
    inline   all bodies are configurations of one kernel, which reads the choice: one launch sequence
    gated    every body runs, with an output of its own. Those not chosen see only padding. It needs nothing from the
             driver, and takes most time.
    single   one body: the best for the batch size
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ...cost_model.model import Candidate, CostModel
from ...dispatch.shortlist import Shortlist, representative, shortlist
from ...errors import KernelError
from ...spec.launchable import Batch, MoEWeights, Workspace, allocate
from ..options import MODES
from ..reference import misfit, reference
from . import conditional as graph
from .cost_table import CostTable
from .recorder import Recorder
from .selector import Selector
from .selector_cuda import MAX_IDS, CudaSelector

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OVERHEAD_US: Mapping[str, Mapping[int, float]] = {
    "nodes": {1: 0.0, 2: 7.0, 4: 9.0, 8: 14.0},
    "switch": {1: 0.0, 2: 14.0, 8: 14.5},
    "inline": {1: 0.0, 2: 17.0, 4: 24.0},
    "gated": {1: 0.0, 2: 30.0, 4: 65.0, 8: 120.0},
    "single": {1: 0.0},
}
"""Microseconds that dispatch adds to a layer in a graph, by mode and number of bodies, the choice included.

The largest number is the most bodies of the mode. Measured on an H200 (profiles/benchmarks/graph_dispatch).
"""
CHECKED_TOKENS = 32
"""First tokens of a batch whose output is compared with the reference."""
STATES = 1024
"""Most captures of one layer in mode "nodes"."""
GUARD = 7.0
"""Value of the rows around a tested output, which must not change."""
_shortlists: WeakKeyDictionary[CostModel, dict[Hashable, tuple[CostModel | None, Shortlist]]] = WeakKeyDictionary()
"""Shortlists of each cost model, by their other arguments. The layers of a network share them.

Each stands with the part of the model that its columns refer to; None: the whole model.
"""

_right: WeakKeyDictionary[CostModel, dict[Hashable, set[str]]] = WeakKeyDictionary()
"""Candidates whose output was right in one layer of each cost model, by batch size and dtype.

Engines capture dozens of sizes of dozens of layers, which all run the same code.
"""


class Launches(Protocol):
    """What graph dispatch needs from a layer."""

    workspace: Workspace

    def launch(self, candidate: Candidate, batch: Batch, out: Tensor) -> None: ...

    def inline_key(self, candidate: Candidate) -> Hashable | None: ...

    def launch_inline(self, candidates: Sequence[Candidate], choice: Tensor, batch: Batch, out: Tensor) -> None: ...

    def max_tokens(self, candidate: Candidate) -> int | None: ...

    def takes(self, candidate: Candidate, dtype: torch.dtype) -> bool: ...

    def drop(self, candidate: Candidate, reason: str, wrong: bool = False) -> str | None: ...


@dataclass(frozen=True)
class GraphPlan:
    """How a graph for `num_tokens` dispatches.

    dtype: of the hidden states.
    why: the reason for the mode.
    bodies: the first is the best for the batch size alone.
    shortlist: what the bodies were chosen by.
    kernels: in mode "nodes", the number of kernels that all bodies launch; else 0.
    selector: chooses the body; None with a single one.
    """

    num_tokens: int
    dtype: torch.dtype
    mode: str
    why: str
    bodies: tuple[Candidate, ...]
    shortlist: Shortlist
    kernels: int = 0
    selector: Selector | None = field(default=None, repr=False)
    switching: CudaSelector | None = field(default=None, repr=False)
    """The selector if it also sets the graph's nodes, in modes "nodes" and "switch"; else None."""


class _Fault(NamedTuple):
    reason: str
    wrong: bool = False
    """Whether the output was wrong. If not, the candidate raised."""
    passing: bool = False
    """Whether memory was lacking, which is no fault of the candidate."""


@dataclass
class _Trial:
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


class _Offer(NamedTuple):
    mode: str
    model: CostModel
    short: Shortlist

    @property
    def bodies(self) -> tuple[Candidate, ...]:
        return tuple(self.model.candidates[c] for c in self.short.columns)


class GraphDispatch:
    """Plans and captures one layer's dispatch in CUDA graphs.

    mode: one of MODES; None: at each batch size the one with the least expected time, of those possible here.
    fixed: kernels that mode "nodes" leaves out (see `LaunchableKernel.switchable`).
    ep_size: see `LayerRuntime`.

    Raises KernelError for an unknown mode, and for one that is impossible on this machine.
    """

    def __init__(
        self,
        launches: Launches,
        weights: MoEWeights,
        cost_model: CostModel,
        top_k: int,
        mode: str | None = None,
        fixed: Collection[str] = (),
        ep_size: int = 1,
    ) -> None:
        import torch

        if mode is not None and mode not in MODES:
            raise KernelError(f"there is no mode {mode!r} of dispatch in graphs; take one of {', '.join(MODES)}")
        self._refused = {m: reason for m in ("nodes", "switch") if (reason := graph.unsupported(m))}
        if mode in self._refused:
            raise KernelError(_cannot(f"{mode}: {self._refused[mode]}"))
        self._modes = MODES if mode is None else (mode,)
        self._fixed, self._ep_size = frozenset(fixed), ep_size
        self.dropped: dict[str, str] = {}
        self.plans: dict[int, GraphPlan] = {}
        self.choosing: Container[int] | None = None
        """Batch sizes whose graphs may have several bodies; None: all may. Plans that exist already stay."""
        self._captured: dict[int, GraphPlan] = {}
        """By identity. Graphs read a plan's tables, and write its choice, for as long as they live: longer, maybe, than
        the plan is in `plans`."""
        self.recorder: Recorder | None = None
        self._recorders: list[Recorder] = []  # graphs write to them for as long as they live
        self.names = [c.name for c in cost_model.candidates]
        """Names of the candidates, by the index that a recorder writes."""
        self._launches, self._weights, self._model, self._top_k = launches, weights, cost_model, top_k
        self._reference: Callable[[Batch], Tensor] = partial(reference, weights)
        self._device = weights.gate_up.device
        self._side = _side_stream(self._device)
        # While engines sleep they free the pool that weights are loaded into: this memory must not come from there.
        self._states = allocate(4 * STATES, self._device).view(torch.int32).view(STATES, 1).fill_(-1)
        self._captures = 0
        self._ready: set[tuple[int, torch.dtype, int]] = set()

    def compare_with(self, weights: MoEWeights, compute: Callable[[Batch], Tensor]) -> None:
        """Compare candidates with what `compute` returns from now on, since the layer's weights are given up.

        weights: the same, without values. compute: the right output `[T, H]` of a batch.
        """
        self._weights, self._reference = weights, compute

    def drop(self, name: str, reason: str) -> None:
        """Plan no graph with a candidate from now on. name: of the candidate, or of a kernel for all of its
        candidates."""
        gone = {n for n in self.names if name in (n, n.partition("/")[0])}
        for found in gone:
            self.dropped.setdefault(found, reason)
        self.plans = {n: plan for n, plan in self.plans.items() if not gone & {c.name for c in plan.bodies}}

    def record(self, slots: int) -> Recorder:
        """Record the batches of the graphs that are captured from now on, and what was chosen for each.

        The device keeps the latest `slots` of them. `Recorder.write` makes a trace for `ramp-moe compare --trace`.
        Graphs of a single body are not recorded, since nothing counts their ids.
        """
        experts = self._weights.down.shape[0]
        self.recorder = Recorder(slots, experts, self._top_k, self._device)
        self._recorders.append(self.recorder)
        return self.recorder

    def prepare(self, num_tokens: int, dtype: torch.dtype) -> GraphPlan:
        """Decide how a graph for `num_tokens` dispatches, and run every body once.

        Every body is then compiled, and its buffers have their size. Its output was right, here or in another layer of
        the same cost model.

        A candidate that raises, writes outside its output or computes something else is dropped before any capture.
        `dropped` says why, and the next best takes its place. One whose output is wrong runs in no eager batch either.
        One that lacks memory is left out of this plan alone. Raises KernelError with the reasons if none is left.
        """
        known = self.plans.get(num_tokens)
        if known is not None and known.dtype is dtype:
            return known
        trial = self._trial(num_tokens, dtype)
        while True:
            offer = self._cheapest(trial)
            if not self._run_once(offer.bodies, trial):
                continue
            try:
                plan = self._planned(offer, trial)
                break
            except KernelError as e:
                trial.refused[offer.mode] = str(e)
        self.plans[num_tokens] = plan
        return plan

    def _trial(self, num_tokens: int, dtype: torch.dtype) -> _Trial:
        batch = self._batch(num_tokens, dtype)
        right = _right.setdefault(self._model, {}).setdefault((num_tokens, dtype), set())
        refused, ids = dict(self._refused), num_tokens * self._top_k
        if ids > MAX_IDS:
            refused |= dict.fromkeys(MODES[:-1], f"{ids} routed ids are more than {MAX_IDS}")
        expected = cache(lambda: self._reference(_first(batch, CHECKED_TOKENS)))
        unfit = {
            c.name: f"takes no hidden states in {str(dtype).removeprefix('torch.')}"
            for c in self._model.candidates
            if not self._launches.takes(c, dtype)
        }
        return _Trial(batch, expected, right, refused, unfit)

    def _cheapest(self, trial: _Trial) -> _Offer:
        """Take the first step: find the mode with the least expected time, and its bodies."""
        model = self._left({**trial.unfit, **trial.skipped}).at(trial.batch.num_tokens)
        if self._modes == MODES and {c.kernel for c in model.candidates} <= self._fixed:
            trial.refused["nodes"] = "every kernel here is slower if its nodes are switched"
        modes = [m for m in self._modes_at(trial.batch.num_tokens) if m not in trial.refused]
        if not modes:
            raise KernelError(_cannot(f"{self._modes[0]}: {trial.refused[self._modes[0]]}"))
        offers = [self._offer(m, model, trial.batch.num_tokens) for m in modes]
        return min(offers, key=lambda o: o.short.expected_us)  # of equal ones the first

    def _run_once(self, bodies: Sequence[Candidate], trial: _Trial) -> bool:
        """Take the second step: run every body that was not run yet. Returns False if one of them is left out."""
        for candidate in bodies:
            name = candidate.name
            if name in trial.run:
                continue
            trial.run.add(name)
            compared = None if name in trial.right else trial.expected()
            found = self._misbehaves(partial(self._launches.launch, candidate), trial.batch, compared)
            if found is None:
                trial.right.add(name)
            elif found.passing:
                trial.skipped[name] = found.reason
            else:
                self.dropped[name] = found.reason
                if found.wrong:  # so would it be in eager batches; a candidate that raises is dropped when it does
                    self._launches.drop(candidate, found.reason, wrong=True)
        return not any(c.name in self.dropped or c.name in trial.skipped for c in bodies)

    def _planned(self, offer: _Offer, trial: _Trial) -> GraphPlan:
        """Take the third step: make the plan. Raises KernelError if the mode is impossible with these bodies."""
        mode, bodies, tokens = offer.mode, offer.bodies, trial.batch.num_tokens
        dtype = trial.batch.hidden_states.dtype
        skipped = [f"{name}: {reason}" for name, reason in trial.skipped.items()]
        if len(bodies) == 1:
            reason = "one candidate is best, or switching would cost more than it gains"
            return GraphPlan(tokens, dtype, "single", "; ".join([reason, *skipped]), bodies, offer.short)
        kernels = self._kernels(bodies, trial.batch) if mode == "nodes" else 0
        if mode == "inline":
            self._check_inline(bodies, trial)
        table = self._table(offer)
        switching = self._cuda_selector(table) if mode in ("nodes", "switch") else None
        selector = switching or self._selector(table)
        refused = [f"{m}: {trial.refused[m]}" for m in self._modes if m in trial.refused]
        why = "; ".join(["least expected time", *refused, *skipped])
        return GraphPlan(tokens, dtype, mode, why, bodies, offer.short, kernels, selector, switching)

    def outlook(self, num_tokens: int) -> tuple[str, CostModel, Shortlist]:
        """The mode that `prepare` would try first, the model that its shortlist refers to, and that shortlist.

        Nothing is run. Raises KernelError if no candidate is left.
        """
        model = self._left({}).at(num_tokens)
        modes = self._modes_at(num_tokens)
        offers = [self._offer(m, model, num_tokens) for m in modes if m not in self._refused]
        offer = min(offers, key=lambda o: o.short.expected_us)
        return (offer.mode if offer.short.pays else "single"), offer.model, offer.short

    def _modes_at(self, num_tokens: int) -> Sequence[str]:
        return self._modes if self.choosing is None or num_tokens in self.choosing else ("single",)

    def ready(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Run every body of the plan for `num_tokens` once per stream, on the current one.

        Their buffers then have their size, and a capture on that stream allocates none. Does nothing in a capture, or
        without a plan for this size and dtype.
        """
        import torch

        plan, stream = self.plans.get(num_tokens), torch.cuda.current_stream(self._device)
        key = num_tokens, dtype, stream.cuda_stream
        if plan is None or plan.dtype is not dtype or key in self._ready or torch.cuda.is_current_stream_capturing():
            return
        batch = self._batch(num_tokens, dtype)
        out = torch.empty_like(batch.hidden_states)
        for candidate in plan.bodies:
            self._launches.launch(candidate, batch, out)
        if plan.mode == "gated":
            self._outs(plan, out)
        self._kernel_ids(batch.topk_ids)
        self._ready.add(key)

    def capture(
        self, plan: GraphPlan, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor, num_valid: Tensor | None
    ) -> None:
        """Add the choice and the plan's bodies to the graph that is captured on the current stream.

        Every replay reads the tensors given, and writes out. They are as `LayerRuntime.forward` takes them; num_valid
        is int32 `[1]` or None.
        """
        assert plan.selector is not None
        self._captured[id(plan)] = plan
        ids = self._kernel_ids(topk_ids)
        batch = Batch(x, ids, topk_weights)
        if plan.switching is None:
            plan.selector.launch(topk_ids, num_valid, ids, self.recorder)
            if plan.mode == "inline":
                self._launches.launch_inline(plan.bodies, plan.selector.choice, batch, out)
            else:
                self._run_all(plan, batch, out, plan.selector.choice)
            return
        bodies = [partial(self._launches.launch, c, batch, out) for c in plan.bodies]
        select = partial(plan.switching.launch, topk_ids, num_valid, ids, self.recorder)
        if plan.mode == "nodes":
            graph.capture_nodes(partial(select, last=self._state()), plan.switching.function, bodies)
        else:
            graph.capture_switch(select, bodies, self._side)

    def _state(self) -> Tensor:
        """Memory for what was chosen last, int32 `[1]`, of one more capture in mode "nodes"."""
        if self._captures == STATES:
            raise KernelError(f"one layer can be captured {STATES} times in mode nodes; give mode='switch' for more")
        self._captures += 1
        return self._states[self._captures - 1]

    def _table(self, offer: _Offer) -> CostTable:
        table = CostTable.of(offer.model, offer.short.columns)
        return replace(table, label=np.array([self.names.index(c.name) for c in offer.bodies], np.int32))

    def _cuda_selector(self, table: CostTable) -> CudaSelector:
        return CudaSelector(table, self._weights.down.shape[0], self._device)

    def _selector(self, table: CostTable) -> Selector:
        """A selector that need not set nodes. Raises KernelError if there is none."""
        try:
            return self._cuda_selector(table)
        except KernelError:
            pass
        try:
            from .selector_triton import TritonSelector
        except ImportError as e:
            raise KernelError(f"the choice needs NVRTC or Triton ({e})") from e
        return TritonSelector(table, self._weights.down.shape[0], self._device)

    def _kernel_ids(self, topk_ids: Tensor) -> Tensor:
        import torch

        return self._launches.workspace.get("kernel_ids", tuple(topk_ids.shape), torch.int32, topk_ids.device)

    def _run_all(self, plan: GraphPlan, batch: Batch, out: Tensor, choice: Tensor) -> None:
        import torch

        outs = self._outs(plan, out)
        for i, candidate in enumerate(plan.bodies):
            ids = torch.where(choice == i, batch.topk_ids, -1)
            self._launches.launch(candidate, Batch(batch.hidden_states, ids, batch.topk_weights), outs[i])
        torch.index_select(outs, 0, choice, out=out[None])

    def _outs(self, plan: GraphPlan, out: Tensor) -> Tensor:
        """The outputs of gated bodies, `[bodies, T, H]`."""
        return self._launches.workspace.get("gated_out", (len(plan.bodies), *out.shape), out.dtype, out.device)

    def _offer(self, mode: str, model: CostModel, num_tokens: int) -> _Offer:
        """The bodies that a mode would have at a batch size."""
        costs = OVERHEAD_US[mode]
        known = _shortlists.setdefault(model, {})
        key = mode, num_tokens, self._fixed, tuple(costs.items()), self._ep_size
        if key not in known:
            few = model
            if mode == "nodes" and (switchable := {c.kernel for c in model.candidates} - self._fixed):
                few = model.restrict(sorted(switchable))
            groups = [self._launches.inline_key(c) for c in few.candidates] if mode == "inline" else None
            met = representative(num_tokens, model.shape.num_experts, self._top_k, self._ep_size)
            short = shortlist(few, num_tokens, costs, max(costs), histograms=met, groups=groups)
            known[key] = None if few is model else few, short
        part, short = known[key]
        return _Offer(mode, part or model, short)

    def _left(self, skipped: Mapping[str, str]) -> CostModel:
        """The model without what was dropped and what is skipped. Raises KernelError if nothing is left, saying why."""
        without = {**self.dropped, **skipped}
        if all(name in without for name in self.names):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in without.items())
            raise KernelError(f"no candidate is left for a graph ({reasons})")
        return self._model.without(without)

    def _kernels(self, bodies: Sequence[Candidate], batch: Batch) -> int:
        """The number of kernels that the bodies launch. Raises KernelError if mode "nodes" cannot switch them."""
        import torch

        out, kernels = torch.empty_like(batch.hidden_states), 0
        for body in bodies:
            try:
                count = graph.kernel_nodes(partial(self._launches.launch, body, batch, out), self._side)
            except Exception as e:  # whatever a kernel raises
                raise KernelError(f"{body.name} cannot be captured: {e}") from e
            if count is None:
                raise KernelError(f"{body.name} launches more than kernels")
            kernels += count
        if kernels > graph.MAX_NODES:
            raise KernelError(f"the bodies have {kernels} kernels, more than {graph.MAX_NODES}")
        return kernels

    def _check_inline(self, bodies: Sequence[Candidate], trial: _Trial) -> None:
        """Run the common launch once as each of the bodies. Raises KernelError if they have none, or if it is
        wrong."""
        import torch

        keys = {self._launches.inline_key(c) for c in bodies}
        if len(keys) > 1 or None in keys:
            raise KernelError("no kernel is all of the bodies in one launch")
        if len(bodies) > max(OVERHEAD_US["inline"]):
            raise KernelError(f"one launch would be {len(bodies)} bodies, more than {max(OVERHEAD_US['inline'])}")
        tokens = trial.batch.num_tokens
        if any((most := self._launches.max_tokens(c)) is not None and most < tokens for c in bodies):
            raise KernelError(f"{tokens} tokens are more than one launch takes")
        for i, body in enumerate(bodies):
            choice = torch.full((1,), i, dtype=torch.int32, device=self._device)
            launch = partial(self._launches.launch_inline, bodies, choice)
            if found := self._misbehaves(launch, trial.batch, trial.expected()):
                raise KernelError(f"as {body.name}: {found.reason}")

    def _misbehaves(
        self, launch: Callable[[Batch, Tensor], None], batch: Batch, expected: Tensor | None
    ) -> _Fault | None:
        """Why a launch must not be captured; None if nothing is wrong with it.

        expected: the first tokens' output `[tokens, H]`; None: the output is not compared.
        """
        import torch

        x = batch.hidden_states
        guarded = torch.full((len(x) + 2, x.shape[1]), GUARD, dtype=x.dtype, device=x.device)
        try:
            for stream in (torch.cuda.current_stream(self._device), self._side):
                # A capture runs on the caller's stream or on ours, and each stream has buffers of its own.
                stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(stream):
                    launch(batch, guarded[1:-1])
                torch.cuda.current_stream(self._device).wait_stream(stream)
            if expected is None:
                return None
            torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError as e:
            return _Fault(f"lacks memory: {e}".partition("\n")[0], passing=True)
        except Exception as e:  # whatever a kernel raises
            return _Fault(f"raised {type(e).__name__}: {e}")
        if not (guarded[0] == GUARD).all() or not (guarded[-1] == GUARD).all():
            return _Fault("wrote outside its output", wrong=True)
        if wrong := misfit(guarded[1 : 1 + len(expected)], expected, self._weights.stored.name):
            return _Fault(f"wrong output: {wrong}", wrong=True)
        return None

    def _batch(self, num_tokens: int, dtype: torch.dtype) -> Batch:
        """A random batch with even routing."""
        import torch

        experts, hidden = self._weights.down.shape[:2]
        generator = torch.Generator(self._device).manual_seed(num_tokens)
        x = torch.randn(num_tokens, hidden, device=self._device, dtype=dtype, generator=generator)
        scores = torch.rand(num_tokens, experts, dtype=torch.float32, device=self._device, generator=generator)
        ids = scores.topk(self._top_k, -1).indices.int()
        weights = torch.rand(num_tokens, self._top_k, dtype=torch.float32, device=self._device, generator=generator)
        return Batch(x, ids, weights / weights.sum(-1, keepdim=True))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all layers capture bodies of conditional nodes.

    Buffers are each stream's own, so these bodies share one set of a workspace. Graphs of such layers must not run at
    the same time.
    """
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _cannot(mode_and_reason: str) -> str:
    return f"graphs cannot dispatch in mode {mode_and_reason}; leave the mode out"


def _first(batch: Batch, tokens: int) -> Batch:
    of: Any = (batch.hidden_states, batch.topk_ids, batch.topk_weights)
    return Batch(*(t[:tokens].contiguous() for t in of))
