"""A MoE layer over any launchable kernels: weights and a dispatcher in, hidden states out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cost_model import Candidate, CostModel
from ..dispatch import Dispatcher
from ..errors import HardwareError, KernelError, RampMoEError, RoutingError, ShapeError
from ..hardware import Hardware
from ..kernel import KernelConfig, layouts_of, usable_configs
from ..layouts import choose_layouts, kernel_times, weighed_batches, why_not_served
from ..routing import expert_histogram
from ..shortlist import settled
from .contract import Batch, LaunchableKernel, MoEWeights, Workspace, kernel_ids
from .layouts import relayout, to_give

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .dispatch import GraphDispatch, Plan
    from .routed import RoutedExperts

Router = Callable[["Tensor"], "tuple[Tensor, Tensor]"]


class MoELayer:
    """Computes one MoE layer, choosing kernel and configuration for every batch.

    With a cost model the choice follows the batch's expert histogram, read back from the device: one host
    synchronisation a call; but for batch sizes for which that is predicted to gain less than `read_back_us`, where it
    follows the size alone. Without a model so it does always: the first kernel's static default.

    In a CUDA graph the choice is made on the device at every replay: `warm_up` finds the candidates that win at a batch
    size, checks them, and says how they are dispatched to (`dispatch.Plan`).

    kernels: launchable kernels by preference; those that cannot take the weights, or that read no layout in which they
    are held, are dropped, and `dropped` says why.
    copies: in how many layouts the weights may be held. In which, `layouts` says: those whose kernels are predicted to
    lose least, on the batches of the cost model's profile where they are at hand; without a model those that serve the
    kernels in their order.
    router: hidden states `[T, H]` -> (topk_ids int32 `[T, k]`, topk_weights float32 `[T, k]`), for `forward_hidden`.
    checked: read the ids back and raise RoutingError for one out of range, instead of skipping it.
    ranks: over how many the experts are spread, these being one rank's (expert parallelism): batch sizes are then of
    tokens whose top_k ids are of all ranks' experts.
    read_back_us: microseconds that reading the histogram back takes. 0: it is always read. inf: it never is.
    mode: of dispatch in graphs, one of `dispatch.MODES`; the cheapest that this machine has where None.

    `held` are the weights in those layouts. A layout that the weights are not given in is a copy of gate_up
    (`relayout`). While the layer is built, and for as long as the caller keeps the weights given, it is there beside
    theirs: drop them, or give them in that layout.
    """

    def __init__(
        self,
        weights: MoEWeights,
        top_k: int,
        hardware: Hardware,
        kernels: Sequence[LaunchableKernel],
        model: CostModel | None = None,
        router: Router | None = None,
        checked: bool = False,
        copies: int = 1,
        mode: str | None = None,
        read_back_us: float = 0.0,
        ranks: int = 1,
    ) -> None:
        from .op import register  # torch: whoever has weights has it

        self.shape = weights.shape(top_k)
        self.hardware, self.router, self.checked = hardware, router, checked
        self.read_back_us, self.ranks = read_back_us, ranks
        self._device, self._dtype = weights.gate_up.device, weights.gate_up.dtype
        self.workspace = Workspace()
        self.layouts: tuple[str, ...] = ()
        self.held: tuple[MoEWeights, ...] = ()
        self.dropped: dict[str, str] = {}
        self.derived = set[str]()
        """Kernels that launch with something that they made of the weights, in memory of its own."""
        self.owner: weakref.ref[RoutedExperts] | None = None
        """What a module calls this layer through; it knows whether the module still has these weights."""
        self.stale: str | None = None
        """Why the weights held are not to be computed with."""
        self._kernels: dict[str, tuple[LaunchableKernel, Any]] = {}
        if model is not None:
            self._check(model)
        usable = self._usable(kernels)
        # A kernel that refuses the weights once they are in its layout leaves the choice of layouts to the others.
        while usable and (refusing := self._hold(weights, usable, copies, model)):
            usable.remove(refusing)
        if not self._kernels:
            reasons = "; ".join(f"{k}: {r}" for k, r in self.dropped.items()) or "none was given"
            raise KernelError(f"no kernel can compute {self.shape.label} on {hardware.name} ({reasons})")
        self._dispatcher = None if model is None else Dispatcher(model.restrict(list(self._kernels)))
        self._latest: dict[int, Candidate] = {}
        """By number of tokens, what ran last, of the sizes that are not settled."""
        self._number = register(self)
        self.graphs: GraphDispatch | None = None
        safe = [name for name, (kernel, _) in self._kernels.items() if kernel.graph_safe]
        if model is not None and safe and self._device.type == "cuda":
            from .dispatch import GraphDispatch

            fixed = {name for name in safe if not self._kernels[name][0].switchable}
            self.graphs = GraphDispatch(self, next(iter(self.held)), model.restrict(safe), top_k, mode, fixed, ranks)

    def _usable(self, kernels: Sequence[LaunchableKernel]) -> list[LaunchableKernel]:
        """Those that say that they can compute the shape here; the others are dropped."""
        usable: dict[str, LaunchableKernel] = {}
        for kernel in kernels:
            if kernel.name in usable:
                raise KernelError(f"two of the layer's kernels are named {kernel.name!r}; give one of them")
            try:
                if reason := kernel.unsupported(self.shape, self.hardware) or kernel.unavailable():
                    raise KernelError(reason)
                layouts_of(kernel, self.shape)
                usable[kernel.name] = kernel
            except RampMoEError as e:
                self.dropped[kernel.name] = str(e)
        return list(usable.values())

    def _hold(
        self, weights: MoEWeights, usable: Sequence[LaunchableKernel], copies: int, model: CostModel | None
    ) -> LaunchableKernel | None:
        """Choose the layouts, and prepare the kernels that read one of them; or a kernel that refuses the weights."""
        times = None
        if model is not None:
            names = [k.name for k in usable]
            times = kernel_times(model.restrict(names), names, weighed_batches(model))
        chosen = choose_layouts(self.shape, usable, copies, times, weights.layout)
        from .update import prepare  # torch

        held: dict[str, MoEWeights] = {}
        self._kernels, self.derived = {}, set[str]()
        for kernel in usable:
            if kernel.name not in chosen.kernels:
                continue
            layout = to_give([key for key in layouts_of(kernel, self.shape) if key in chosen.layouts])
            try:
                if layout not in held:
                    held[layout] = relayout(weights, layout)
                prepared, derives = prepare(kernel, held[layout])
                self._kernels[kernel.name] = kernel, prepared
                self.derived |= {kernel.name} if derives else set()
            except RampMoEError as e:
                self.dropped[kernel.name] = str(e)
                self._kernels = {}
                return kernel
        self.layouts = chosen.layouts
        self.held = tuple(held.values())
        self.dropped |= {
            kernel.name: why_not_served(self.shape, usable, kernel, copies, times, weights.layout)
            for kernel in usable
            if kernel.name not in chosen.kernels
        }
        return None

    def _check(self, model: CostModel) -> None:
        """Raises ShapeError or HardwareError for a model of another shape or GPU."""
        if model.shape != self.shape:
            raise ShapeError(f"the cost model is for {model.shape.slug}, the weights are {self.shape.slug}")
        if model.hardware != self.hardware:
            raise HardwareError(
                f"the cost model was fitted on {model.hardware.name}, the layer is on {self.hardware.name}"
            )

    def update(self, weights: MoEWeights) -> None:
        """Compute with new weights from now on, also in CUDA graphs that were captured before.

        weights: of the shape, dtype, device and activation of those held, with rows in any order of LAYOUTS. They are
        copied into the memory of those held, which they may share, in the order of the current stream. What kernels
        derived from the weights is derived again. Raises ShapeError for weights that do not fit, before anything is
        written; KernelError if a kernel does not take them.
        """
        from .update import update

        update(self, weights)

    def kernel(self, name: str) -> tuple[LaunchableKernel, Any]:
        """The kernel of this name, and what it prepared of the weights."""
        return self._kernels[name]

    def weights_of(self, kernel: LaunchableKernel) -> MoEWeights:
        """The weights held that the kernel was given."""
        layout = to_give([key for key in layouts_of(kernel, self.shape) if key in self.layouts])
        return next(held for held in self.held if held.layout == layout)

    def choose(self, batch: Batch) -> Candidate:
        """The kernel and configuration that `forward` would launch for this batch."""
        if self._dispatcher is None:
            return self._static(batch.num_tokens)
        if _capturing(batch.topk_ids):
            return self._blind(batch.num_tokens)
        if known := self._settled(batch.num_tokens):
            return known
        histogram = expert_histogram(_in_range(batch, self.shape.num_experts), self.shape.num_experts)
        found = self._latest[batch.num_tokens] = self._dispatcher.choose(histogram).candidate
        return found

    def _settled(self, num_tokens: int) -> Candidate | None:
        """The one candidate for a batch size where reading the histogram back would not pay; None where it would."""
        if self._dispatcher is None or not self.read_back_us or not num_tokens:
            return None
        return settled(self._dispatcher.model, num_tokens, self.read_back_us, self.ranks)

    def _blind(self, num_tokens: int) -> Candidate:
        """The choice for a batch size alone: the best single one where a graph was planned for it, or where it is
        settled; else what ran last, whose buffers a capture need not allocate, or the model's choice for an even
        spread; the static default without a model."""
        if self.graphs is not None and num_tokens in self.graphs.plans:
            return self.graphs.plans[num_tokens].bodies[0]
        if self._dispatcher is None:
            return self._static(num_tokens)
        if known := self._settled(num_tokens) or self._latest.get(num_tokens):
            return known
        each, rest = divmod(-(-num_tokens * self.shape.top_k // self.ranks), self.shape.num_experts)
        return self._dispatcher.choose(each + (np.arange(self.shape.num_experts) < rest)).candidate

    def warm_up(self, num_tokens: int, dtype: torch.dtype) -> Plan | None:
        """Run, on the current stream, what a capture of `num_tokens` would launch, so that everything is compiled and
        every buffer has its size before. dtype is that of the hidden states. Returns how the captured layer will
        dispatch, None where it has no model to choose by."""
        import torch

        if self.graphs is not None:
            return self.graphs.prepare(num_tokens, dtype)
        device, shape = self._device, self.shape
        x = torch.zeros(num_tokens, shape.hidden_size, dtype=dtype, device=device)
        ids = torch.arange(num_tokens * shape.top_k, dtype=torch.int32, device=device) % shape.num_experts
        weights = torch.full((num_tokens, shape.top_k), 1 / shape.top_k, dtype=torch.float32, device=device)
        batch = Batch(x, ids.view(num_tokens, shape.top_k), weights)
        self.launch(self._blind(num_tokens), batch, torch.empty_like(x))
        return None

    def ready(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Run once on the current stream what a capture of `num_tokens` would launch, where that was warmed up, maybe
        on another stream: the capture then allocates nothing that must outlive it. Does nothing in a capture."""
        if self.graphs is not None:
            self.graphs.ready(num_tokens, dtype)

    def _static(self, num_tokens: int) -> Candidate:
        kernel, _ = next(iter(self._kernels.values()))
        return Candidate(kernel.name, kernel.default_config(self.shape, self.hardware, num_tokens))

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None = None,
        num_valid: Tensor | None = None,
    ) -> Tensor:
        """The layer's output `[T, H]` in the dtype of hidden_states (bf16 or fp16).

        topk_ids int32 or int64 `[T, k]`, topk_weights float32 `[T, k]`; ids of -1 or E are skipped. num_valid int32
        `[1]` on the device: tokens from there on are padding, and their output is 0. Runs in the order of the current
        stream. Raises ShapeError or RoutingError for tensors that do not fit the layer.
        """
        import torch

        if self.stale is not None:
            raise KernelError(self.stale)
        # First of all: kernels read it by its address.
        if num_valid is not None and (num_valid.shape != (1,) or num_valid.dtype != torch.int32):
            raise RoutingError(f"num_valid must be int32 [1], not {num_valid.dtype} {list(num_valid.shape)}")
        if num_valid is not None and num_valid.device != topk_ids.device:
            raise RoutingError(f"num_valid is on {num_valid.device}, topk_ids on {topk_ids.device}; move it there")
        plan = self._plan(hidden_states, topk_ids)
        if plan is None:
            batch = Batch(hidden_states, kernel_ids(topk_ids, self.shape.num_experts, num_valid), topk_weights)
        if hidden_states.shape[1:] != (self.shape.hidden_size,) or topk_ids.shape[1:] != (self.shape.top_k,):
            raise ShapeError(
                f"the layer takes hidden_states [T, {self.shape.hidden_size}] and {self.shape.top_k} ids a token, "
                f"not {list(hidden_states.shape)} and {topk_ids.shape[-1]}"
            )
        if hidden_states.device != self._device:
            raise ShapeError(
                f"hidden_states is on {hidden_states.device}, the weights on {self._device}; move it there"
            )
        if self.shape.dtype != "fp8" and hidden_states.dtype != self._dtype:
            raise ShapeError(f"hidden_states must be {self._dtype} as the weights are, not {hidden_states.dtype}")
        if self.checked:
            expert_histogram(topk_ids, self.shape.num_experts)
        if out is None:
            out = torch.empty_like(hidden_states)
        elif out.shape != hidden_states.shape or out.dtype != hidden_states.dtype or not out.is_contiguous():
            raise ShapeError(f"out must be contiguous {hidden_states.dtype} {list(hidden_states.shape)}")
        elif out.device != self._device:
            raise ShapeError(f"out is on {out.device}, the weights on {self._device}")
        if plan is not None and self.graphs is not None:
            self.graphs.capture(plan, hidden_states, topk_ids, topk_weights, out, num_valid)
        elif batch.num_tokens:
            self.launch(self.choose(batch), batch, out)
        return out

    def _plan(self, hidden_states: Tensor, topk_ids: Tensor) -> Plan | None:
        """That of a graph in which the device chooses, if one is being captured."""
        if self.graphs is None or not _capturing(topk_ids):
            return None
        plan = self.graphs.plans.get(len(hidden_states))
        return None if plan is None or plan.selector is None else plan

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None = None,
        num_valid: Tensor | None = None,
    ) -> Tensor:
        """`forward`; what torch.compile traces is one opaque operator (see `op`), as is what gradients are asked of."""
        import torch

        differentiable = torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad)
        if not differentiable and not torch.compiler.is_compiling():
            return self.forward(hidden_states, topk_ids, topk_weights, out, num_valid)
        from .op import moe

        found = moe(hidden_states, topk_ids, topk_weights, self._number, num_valid)
        return found if out is None else out.copy_(found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another layer, with a number of its own."""
        from .op import register

        self.__dict__.update(state, _number=register(self))

    def forward_hidden(self, hidden_states: Tensor) -> Tensor:
        """The whole layer, routing included. Raises RoutingError where the layer has no router."""
        if self.router is None:
            raise RoutingError("the layer was built without a router; call forward with top-k ids and weights")
        return self(hidden_states, *self.router(hidden_states))

    def launch(self, candidate: Candidate, batch: Batch, out: Tensor) -> None:
        """Run one candidate, whatever the dispatcher would have chosen."""
        kernel, prepared = self._kernels[candidate.kernel]
        kernel.launch(candidate.config, prepared, batch, out, self.workspace)

    def inline_key(self, candidate: Candidate) -> Hashable | None:
        """What candidates must share for `launch_inline` to take them together; None for one that it never takes."""
        kernel, _ = self._kernels[candidate.kernel]
        key = kernel.inline_key(candidate.config, self.shape)
        return None if key is None else (candidate.kernel, key)

    def launch_inline(self, candidates: Sequence[Candidate], choice: Tensor, batch: Batch, out: Tensor) -> None:
        """Run candidates[choice], two to four of one `inline_key`, as the device reads choice int32 `[1]`."""
        kernel, prepared = self._kernels[candidates[0].kernel]
        kernel.launch_inline([c.config for c in candidates], choice, prepared, batch, out, self.workspace)

    def configs(self) -> Mapping[str, Sequence[KernelConfig]]:
        """Every configuration of every kernel that the layer can launch."""
        return {k: usable_configs(kernel, self.shape, self.hardware) for k, (kernel, _) in self._kernels.items()}


def _capturing(topk_ids: Tensor) -> bool:
    import torch

    return topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()


def _in_range(batch: Batch, num_experts: int) -> Tensor:
    """Ids with those out of range marked as padding, as the kernels treat them."""
    ids = batch.topk_ids
    return ids.masked_fill((ids < 0) | (ids > num_experts), -1)
