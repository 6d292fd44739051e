"""One MoE layer's weights, with the kernels that compute with them and the choice among those kernels."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cost_model.model import Candidate, CostModel
from ..dispatch.weight_layouts import choose_layouts, kernel_times, weighed_batches, why_not_served
from ..errors import HardwareError, KernelError, RampMoEError, RoutingError, ShapeError, shown
from ..spec.dense import check_dense
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig, layouts_of, most_tokens, usable_configs
from ..spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace, kernel_ids, obstacle
from ..spec.routing import expert_histogram
from .choice import Chooser
from .fallback import compute
from .padding import valid_count, valid_tokens
from .parts import parts
from .relayout import relayout, to_give

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .graphs.capture import GraphDispatch, GraphPlan
    from .protocols import Owner

HALVES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""Names of the dtypes of hidden states, by `str(torch.dtype)`."""
MOST_READY = 1024
"""Most candidates for which `_Ready` is remembered."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """What launching a candidate needs, so that no call looks it up again."""

    candidate: Candidate
    kernel: LaunchableKernel
    prepared: Any
    max_tokens: int | None


class LayerRuntime:
    """Computes with one MoE layer's weights: chooses a kernel and a configuration for every batch, and launches them.

    `MoELayer` wraps it as a module, and finds the hardware, kernels and cost model itself. The other arguments are
    options of `DispatchOptions`.

    With a cost model, an eager batch's expert histogram is read back from the device, and decides. This is one host
    synchronisation per call. If it is predicted to gain less than `host_sync_us`, the batch size alone decides. Without
    a model the batch size always decides, by the first kernel's static default.

    In a CUDA graph the choice is made on the device at every replay. `warm_up` finds the candidates that win at a batch
    size, checks them, and returns how the graph dispatches (`graphs.capture.GraphPlan`).

    kernels: in the order of preference. A kernel is dropped if it cannot take the weights, or reads none of the layouts
        in which they are held. A kernel or candidate that fails later is dropped, too. `dropped` says why.
    copies: most layouts in which the weights are held; `layouts` names them. With a cost model they are those that are
        predicted to lose least on the batches of its profile. Without one, they serve the first kernels.
    ep_size: ranks that share the experts, of which the weights are one rank's. A token's top_k ids are spread over the
        experts of all ranks.

    `held` has the weights in those layouts. In a layout other than the given one, gate_up is a copy (`relayout`). It
    takes memory beside the caller's tensor until the caller drops that. Weights given in the right layout avoid this.

    Raises KernelError if no kernel computes the shape here. Raises ShapeError or HardwareError if the cost model is for
    another shape or GPU.
    """

    def __init__(
        self,
        weights: MoEWeights,
        top_k: int,
        hardware: Hardware,
        kernels: Sequence[LaunchableKernel],
        cost_model: CostModel | None = None,
        checked: bool = False,
        copies: int = 1,
        mode: str | None = None,
        host_sync_us: float = 0.0,
        ep_size: int = 1,
    ) -> None:
        from .torch_op import register  # torch: whoever has weights has it

        if not isinstance(weights, MoEWeights):
            raise KernelError(
                f"weights must be a MoEWeights, not {type(weights).__name__}; write MoEWeights(gate_up, down)"
            )
        self.shape = weights.shape(top_k)
        self.hardware, self.checked = hardware, checked
        self.host_sync_us, self.ep_size = host_sync_us, ep_size
        self._device, self._dtype = weights.gate_up.device, weights.gate_up.dtype
        self._row, self._slots = (self.shape.hidden_size,), (top_k,)
        self.workspace = Workspace()
        self.layouts: tuple[str, ...] = ()
        self.held: tuple[MoEWeights, ...] = ()
        self.dropped: dict[str, str] = {}
        self.derived = set[str]()
        """Kernels that launch with something that they derived from the weights, in memory of its own."""
        self.owner: weakref.ref[Owner] | None = None
        """The object through which a module calls this layer. It knows whether the module still has these weights."""
        self.stale: str | None = None
        """Why this layer must not compute with the weights it holds; None if it may."""
        self.released = False
        """Whether the weights are held in kernels' own formats alone. Those in `held` are then without values."""
        self._kernels: dict[str, tuple[LaunchableKernel, Any]] = {}
        if cost_model is not None:
            self._check(cost_model)
        usable = self._usable(kernels)
        # A kernel that refuses the weights once they are in its layout leaves the choice of layouts to the others.
        while usable and (refusing := self._hold(weights, usable, copies, cost_model)):
            usable.remove(refusing)
        if not self._kernels:
            reasons = "; ".join(f"{k}: {r}" for k, r in self.dropped.items()) or "none was given"
            raise KernelError(f"no kernel can compute {self.shape.label} on {hardware.name} ({reasons})")
        self.chooser = Chooser(
            self.shape, hardware, [kernel for kernel, _ in self._kernels.values()], cost_model, ep_size
        )
        self._ready: dict[int, _Ready] = {}
        """Keyed by `id` of the candidate."""
        self._choosers: dict[torch.dtype, Chooser] = {}
        """Choosers among the kernels that take a dtype of hidden states, by dtype. Unused if every kernel takes all."""
        self._picky = any({*HALVES.values()} - {*kernel.hidden_dtypes} for kernel in self.kernels.values())
        self._number = register(self)
        self.graphs: GraphDispatch | None = None
        safe = [name for name, (kernel, _) in self._kernels.items() if kernel.graph_safe]
        if cost_model is not None and safe and self._device.type == "cuda":
            from .graphs.capture import GraphDispatch

            fixed = {name for name in safe if not self._kernels[name][0].switchable}
            known = cost_model.restrict(safe)
            self.graphs = GraphDispatch(self, next(iter(self.held)), known, top_k, mode, fixed, ep_size)

    def _usable(self, kernels: Sequence[LaunchableKernel]) -> list[LaunchableKernel]:
        """The kernels that say that they can compute the shape here. The others are dropped."""
        usable: dict[str, LaunchableKernel] = {}
        for kernel in kernels:
            if kernel.name in usable:
                raise KernelError(f"two of the layer's kernels are named {kernel.name!r}; give one of them")
            try:
                if reason := obstacle(kernel, self.shape, self.hardware):
                    raise KernelError(reason)
                if self.shape.dtype in HALVES.values() and self.shape.dtype not in kernel.hidden_dtypes:
                    raise KernelError(f"takes hidden states in {' and '.join(kernel.hidden_dtypes)} only")
                layouts_of(kernel, self.shape)
                usable[kernel.name] = kernel
            except RampMoEError as e:
                self.dropped[kernel.name] = str(e)
        return list(usable.values())

    def _hold(
        self, weights: MoEWeights, usable: Sequence[LaunchableKernel], copies: int, cost_model: CostModel | None
    ) -> LaunchableKernel | None:
        """Choose the layouts, and prepare the kernels that read one of them.

        Returns a kernel that refuses the weights, as soon as there is one. None if none does.
        """
        times = None
        if cost_model is not None:
            names = [k.name for k in usable]
            times = kernel_times(cost_model.restrict(names), names, weighed_batches(cost_model))
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

    def _check(self, cost_model: CostModel) -> None:
        """Raises ShapeError or HardwareError for a model of another shape or GPU."""
        if cost_model.shape != self.shape:
            raise ShapeError(f"the cost model is for {cost_model.shape.slug}, the weights are {self.shape.slug}")
        if cost_model.hardware != self.hardware:
            raise HardwareError(
                f"the cost model was fitted on {cost_model.hardware.name}, the layer is on {self.hardware.name}"
            )

    def update(self, weights: MoEWeights) -> None:
        """Compute with new weights from now on, also in CUDA graphs that were captured before.

        weights: of the shape, dtype, device and activation of those held, with rows in any order of LAYOUTS. They may
            share memory with those held.

        The new values are copied into the memory of those held, in the order of the current stream. Kernels then derive
        again what they had derived. Raises ShapeError for weights that do not fit, before anything is written. Raises
        KernelError if a kernel does not take them.
        """
        if self.released:
            from .release import derive_again

            derive_again(self, weights)
            return
        from .update import update

        update(self, weights)

    def release(self, dtype: torch.dtype) -> None:
        """Hold the weights no longer as they were given, if every kernel holds them in a format of its own.

        Their memory is then the caller's to free. Before, the output of one candidate is compared with the float32
        layer, on a random batch of this dtype; other candidates are later compared with that one.

        Raises KernelError if a kernel reads the weights as they were given, or if the output is wrong.
        """
        from .release import checked, on_meta, repacked

        if not repacked(self):
            raise KernelError("a kernel of the layer reads the weights as they were given, which must stay")
        compute = checked(self, dtype)
        self.held, self.released = (on_meta(self.held[0]),), True
        if self.graphs is not None:
            self.graphs.compare_with(self.held[0], compute)

    @property
    def kernels(self) -> Mapping[str, LaunchableKernel]:
        """The kernels by name, in the order of preference."""
        return {name: kernel for name, (kernel, _) in self._kernels.items()}

    def kernel(self, name: str) -> tuple[LaunchableKernel, Any]:
        """The kernel of this name, and what its `prepare` returned."""
        return self._kernels[name]

    def weights_of(self, kernel: LaunchableKernel) -> MoEWeights:
        """The weights held that the kernel was given."""
        layout = to_give([key for key in layouts_of(kernel, self.shape) if key in self.layouts])
        return next(held for held in self.held if held.layout == layout)

    def choose(self, batch: Batch) -> Candidate:
        """The kernel and configuration that `forward` would launch for this batch."""
        return self._choose(batch, _capturing(batch.topk_ids))

    def _choose(self, batch: Batch, capturing: bool) -> Candidate:
        dtype = batch.hidden_states.dtype
        if capturing:
            return self._blind(batch.num_tokens, dtype)
        chooser = self._chooser_for(dtype) if self._picky else self.chooser
        if known := chooser.choice_by_batch_size(batch.num_tokens, self.host_sync_us):
            return known
        histogram = expert_histogram(_in_range(batch, self.shape.num_experts), self.shape.num_experts)
        return chooser.by_histogram(batch.num_tokens, histogram)

    def _blind(self, num_tokens: int, dtype: torch.dtype) -> Candidate:
        """The choice for a batch size alone: the first body of the graph planned for it, else the chooser's choice."""
        if (plan := self._planned(num_tokens, dtype)) is not None:
            return plan.bodies[0]
        return self._chooser_for(dtype).by_size(num_tokens, self.host_sync_us)

    def _planned(self, num_tokens: int, dtype: torch.dtype) -> GraphPlan | None:
        plan = None if self.graphs is None else self.graphs.plans.get(num_tokens)
        return None if plan is None or plan.dtype is not dtype else plan

    def _chooser_for(self, dtype: torch.dtype) -> Chooser:
        """The chooser among kernels that take hidden states of this dtype. Raises KernelError if none does."""
        if not self._picky:
            return self.chooser
        if (found := self._choosers.get(dtype)) is None:
            found = self._choosers[dtype] = self._made_chooser(dtype)
        return found

    def _made_chooser(self, dtype: torch.dtype) -> Chooser:
        left, name = self.chooser.kernels, HALVES.get(str(dtype), str(dtype))
        kernels = [kernel for kernel in left if name in kernel.hidden_dtypes]
        if not kernels:
            others = ", ".join(f"{k.name} takes {' and '.join(k.hidden_dtypes)}" for k in left)
            raise KernelError(f"no kernel of the layer takes hidden states in {name} ({others}); cast them")
        if len(kernels) == len(left):
            return self.chooser
        model, names = self.chooser.model, {kernel.name for kernel in kernels}
        if model is not None and not any(c.kernel in names for c in model.candidates):
            model = None
        return Chooser(self.shape, self.hardware, kernels, model, self.ep_size)

    def takes(self, candidate: Candidate, dtype: torch.dtype) -> bool:
        """Whether the candidate's kernel takes hidden states of this dtype."""
        return HALVES.get(str(dtype)) in self._kernels[candidate.kernel][0].hidden_dtypes

    def warm_up(self, num_tokens: int, dtype: torch.dtype) -> GraphPlan | None:
        """Prepare the capture of a CUDA graph of `num_tokens`: run once on the current stream what it would launch.

        Everything is then compiled, and every buffer has its size. dtype: of the hidden states.

        Returns how the graph will dispatch. None if its kernel is chosen before the capture: on the CPU, without a cost
        model, or without a kernel that a graph can hold. Raises ShapeError for less than one token, or for a dtype that
        the layer does not take.
        """
        import torch

        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ShapeError(f"a layer is warmed up for one token or more, not {shown(num_tokens)}")
        self._check_dtype(dtype)
        if self.graphs is not None:
            return self.graphs.prepare(num_tokens, dtype)
        device, shape = self._device, self.shape
        x = torch.zeros(num_tokens, shape.hidden_size, dtype=dtype, device=device)
        ids = torch.arange(num_tokens * shape.top_k, dtype=torch.int32, device=device) % shape.num_experts
        weights = torch.full((num_tokens, shape.top_k), 1 / shape.top_k, dtype=torch.float32, device=device)
        batch = Batch(x, ids.view(num_tokens, shape.top_k), weights)
        compute(self, lambda: self._blind(num_tokens, dtype), batch, torch.empty_like(x))
        return None

    def ready(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Run once on the current stream what a capture of `num_tokens` would launch.

        The capture then allocates nothing that must outlive it. Does nothing in a capture, or if this size was not
        warmed up. `warm_up` may have run on another stream.
        """
        if self.graphs is not None:
            self.graphs.ready(num_tokens, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None = None,
        num_valid: Tensor | int | None = None,
    ) -> Tensor:
        """The layer's output `[T, H]` in the dtype of hidden_states, on the current stream.

        hidden_states: bf16 or fp16 `[T, H]`.
        topk_ids: int32 or int64 `[T, k]`. Ids of -1 or E are skipped.
        topk_weights: float32 `[T, k]`.
        out: contiguous, as the output; None: it is allocated.
        num_valid: number of tokens before the padding, whose output is 0. An integer tensor of one element on the
            device, best int32 `[1]`; outside of captures also an int. Clamped to [0, T].

        A batch of more tokens than a kernel takes is computed in parts. Outside of captures a candidate that raises is
        dropped (`dropped` says why), and the next best computes the batch (see `compute`). Raises ShapeError or
        RoutingError for tensors that do not fit the layer, KernelError if no kernel computes the batch.
        """
        import torch

        if self.stale is not None:
            raise KernelError(self.stale)
        capturing, valid = _capturing(topk_ids), None
        if num_valid is not None and not (capturing or isinstance(num_valid, torch.Tensor)):
            valid, num_valid = valid_count(num_valid, hidden_states.shape[0]), None
        if num_valid is not None:  # first of all: kernels read it by its address
            num_valid = valid_tokens(num_valid, hidden_states.shape[0], topk_ids.device)
        plan = self._plan(hidden_states) if capturing else None
        if plan is None:
            ids = topk_ids
            if num_valid is not None or ids.dtype is not torch.int32:
                ids = kernel_ids(ids, self.shape.num_experts, num_valid)
            batch = Batch(hidden_states, ids, topk_weights)
        if hidden_states.shape[1:] != self._row or topk_ids.shape[1:] != self._slots:
            raise ShapeError(
                f"the layer takes hidden_states [T, {self.shape.hidden_size}] and {self.shape.top_k} ids a token, "
                f"not {list(hidden_states.shape)} and {topk_ids.shape[-1]}"
            )
        if hidden_states.device != self._device:
            raise ShapeError(
                f"hidden_states is on {hidden_states.device}, the weights on {self._device}; move it there"
            )
        if hidden_states.dtype is not self._dtype:
            self._check_dtype(hidden_states.dtype)
        if self.checked:
            expert_histogram(topk_ids, self.shape.num_experts)
        if out is None:
            out = torch.empty_like(hidden_states)
        elif out.shape != hidden_states.shape or out.dtype is not hidden_states.dtype or not out.is_contiguous():
            raise ShapeError(f"out must be contiguous {hidden_states.dtype} {list(hidden_states.shape)}")
        elif out.device != self._device:
            raise ShapeError(f"out is on {out.device}, the weights on {self._device}")
        if plan is not None and self.graphs is not None:
            self.graphs.capture(plan, hidden_states, topk_ids, topk_weights, out, num_valid)
        else:
            part, rows = batch, out
            if valid is not None and valid < batch.num_tokens:
                part = Batch(hidden_states[:valid], batch.topk_ids[:valid], topk_weights[:valid])
                rows = out[:valid]
            if part.num_tokens:
                compute(self, lambda: self._choose(part, capturing), part, rows)
            if rows is not out:
                out[valid:].zero_()
        return out

    def _check_dtype(self, dtype: torch.dtype) -> None:
        """Raises ShapeError for hidden states of a dtype that the layer does not take."""
        import torch

        if not isinstance(dtype, torch.dtype):
            raise ShapeError(f"dtype must be torch.bfloat16 or torch.float16, not {shown(dtype)}")
        if self.shape.format.scale is not None:
            if dtype not in (torch.bfloat16, torch.float16):
                raise ShapeError(f"hidden_states must be bf16 or fp16, not {dtype}")
        elif dtype != self._dtype:
            raise ShapeError(f"hidden_states must be {self._dtype} as the weights are, not {dtype}")

    def _plan(self, hidden_states: Tensor) -> GraphPlan | None:
        """The plan of a graph in which the device chooses; None if there is none for this batch size and dtype."""
        plan = self._planned(hidden_states.shape[0], hidden_states.dtype)
        return None if plan is None or plan.selector is None else plan

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None = None,
        num_valid: Tensor | int | None = None,
    ) -> Tensor:
        """Call `forward`. Under torch.compile, or if a gradient is asked for, through one opaque operator (see
        `torch_op`)."""
        import torch

        for given in (hidden_states, topk_ids, topk_weights):
            if not isinstance(given, torch.Tensor):
                _check_dense(hidden_states, topk_ids, topk_weights, out, num_valid)
        differentiable = torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad)
        if not differentiable and not torch.compiler.is_compiling():
            try:
                return self.forward(hidden_states, topk_ids, topk_weights, out, num_valid)
            except (AttributeError, RuntimeError, TypeError):  # before that, looking would cost time in every call
                _check_dense(hidden_states, topk_ids, topk_weights, out, num_valid)
                raise
        from .torch_op import moe

        valid = valid_tokens(num_valid, len(hidden_states), topk_ids.device)
        found = moe(hidden_states, topk_ids, topk_weights, self._number, valid)
        return found if out is None else out.copy_(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRuntime:
        """Raises KernelError on a GPU, and if something that a kernel keeps has no copy."""
        refusal = "a layer cannot be copied here ({}); build another, or ramp_moe.unwrap a wrapped model first"
        if self._device.type == "cuda":
            raise KernelError(refusal.format("on a GPU kernels and graphs hold addresses of its weights"))
        found = memo[id(self)] = object.__new__(type(self))
        try:
            state = copy.deepcopy(self.__dict__, memo)
        except Exception as e:  # whatever a plugin's kernel keeps
            raise KernelError(refusal.format(e)) from e
        found.__setstate__(state)
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy a number of its own, since it is another layer."""
        from .torch_op import register

        self.__dict__.update(state, _number=register(self), _ready={})

    def launch(self, candidate: Candidate, batch: Batch, out: Tensor, most: int | None = None) -> None:
        """Run one candidate, whatever the dispatcher would have chosen.

        most: tokens of a launch, if less than the candidate takes. A batch of more tokens is computed in parts.
        """
        ready = self._ready.get(id(candidate))
        if ready is None or ready.candidate is not candidate:
            ready = self._made_ready(candidate)
        kernel, limit, workspace = ready.kernel, ready.max_tokens, self.workspace
        if most is not None and (limit is None or most < limit):
            limit = most
        with workspace.lock:
            if limit is None or batch.num_tokens <= limit:
                kernel.launch(candidate.config, ready.prepared, batch, out, workspace)
                return
            for part, rows in parts(batch, out, limit):
                kernel.launch(candidate.config, ready.prepared, part, rows, workspace)

    def _made_ready(self, candidate: Candidate) -> _Ready:
        kernel, prepared = self._kernels[candidate.kernel]
        if len(self._ready) >= MOST_READY:
            self._ready.clear()
        most = most_tokens(kernel, candidate.config, self.shape)
        found = self._ready[id(candidate)] = _Ready(candidate, kernel, prepared, most)
        return found

    def max_tokens(self, candidate: Candidate) -> int | None:
        """The most tokens that a candidate takes in one launch; None if any number."""
        return most_tokens(self._kernels[candidate.kernel][0], candidate.config, self.shape)

    def drop(self, candidate: Candidate, reason: str, wrong: bool = False) -> str | None:
        """Choose a candidate no more, in eager batches and in graphs that are planned from now on.

        `dropped` then says why. Returns the name of what is dropped: the candidate, or its kernel after several
        failures. None if nothing is: the last candidate stays, unless its output is `wrong`.
        """
        name = self.chooser.drop(candidate, even_last=wrong)
        self._choosers.clear()
        if name is not None:
            self.dropped.setdefault(name, reason)
            if self.graphs is not None:
                self.graphs.drop(name, reason)
        return name

    def inline_key(self, candidate: Candidate) -> Hashable | None:
        """The key that candidates must share for `launch_inline` to take them together. None if it never takes one."""
        kernel, _ = self._kernels[candidate.kernel]
        key = kernel.inline_key(candidate.config, self.shape)
        return None if key is None else (candidate.kernel, key)

    def launch_inline(self, candidates: Sequence[Candidate], choice: Tensor, batch: Batch, out: Tensor) -> None:
        """Run candidates[choice], with choice int32 `[1]` read by the device.

        candidates: two to four, which share one `inline_key`.
        """
        kernel, prepared = self._kernels[candidates[0].kernel]
        with self.workspace.lock:
            kernel.launch_inline([c.config for c in candidates], choice, prepared, batch, out, self.workspace)

    def configs(self) -> Mapping[str, Sequence[KernelConfig]]:
        """Every configuration of every kernel that the layer can launch."""
        kernels = {name: kernel for name, (kernel, _) in self._kernels.items() if name not in self.dropped}
        return {name: usable_configs(kernel, self.shape, self.hardware) for name, kernel in kernels.items()}


def _check_dense(x: object, ids: object, weights: object, out: object, num_valid: object) -> None:
    """Raises ShapeError or RoutingError for what is no dense tensor."""
    check_dense(ShapeError, hidden_states=x)
    check_dense(RoutingError, topk_ids=ids, topk_weights=weights)
    if out is not None:
        check_dense(ShapeError, out=out)
    if getattr(num_valid, "is_nested", False):
        check_dense(RoutingError, num_valid=num_valid)


def _capturing(topk_ids: Tensor) -> bool:
    if not topk_ids.is_cuda:
        return False
    import torch

    return torch.cuda.is_current_stream_capturing()


def _in_range(batch: Batch, num_experts: int) -> Tensor:
    """The batch's ids, with those outside [0, E] as -1, which `expert_histogram` skips as the kernels do."""
    ids = batch.topk_ids
    return ids.masked_fill((ids < 0) | (ids > num_experts), -1)
