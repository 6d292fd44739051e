"""`ramp_moe.MoELayer`: a MoE layer's experts as a torch module, computed by the fastest kernels that run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ..errors import KernelError, RoutingError
from ..spec.launchable import MoEWeights
from .explanation import Explanation, explain
from .layer_factory import Builder
from .options import DispatchOptions
from .own_experts import Experts
from .update import FIELDS
from .wrapped_experts import WrappedExperts, experts_of, pair

if TYPE_CHECKING:
    from .graphs.capture import GraphPlan
    from .layer import LayerRuntime

Router = Callable[[Tensor], tuple[Tensor, Tensor]]


class MoELayer(torch.nn.Module):
    """A MoE layer's experts, computed for every batch by the kernel that is predicted to be fastest.

        layer = ramp_moe.MoELayer(MoEWeights(gate_up, down), top_k=8)
        out = layer(hidden_states, topk_ids, topk_weights)

    It finds the GPU, the kernels that run there and their profiles. Build it when the weights are on the GPU.

    weights: see `MoEWeights`. They become the module's parameters, named as its fields, without gradients.
    top_k: experts per token.
    router: maps hidden states `[T, H]` to (topk_ids `[T, k]`, topk_weights `[T, k]`), for calls with hidden states
        alone.
    device: name of the hardware, or `auto` to detect it.
    options: see `DispatchOptions`.

    If the kernels read a tensor in the order given, it is used in place. If they need its rows in another order, the
    layer holds it in that order alone, once the caller drops `weights`. The parameter still reads and writes as before,
    but has no address (`runtime.placeholder`).

    `state_dict` has plain tensors in the order given. `load_state_dict`, `update` and writes to a parameter reach the
    kernels, also in captured CUDA graphs. `to`, `half` and `load_state_dict(assign=True)` replace parameters: the next
    call then builds another layer from them, or raises KernelError.

    Inference only: a backward pass raises KernelError. On a GPU, copy.deepcopy raises KernelError. Pickling raises it
    anywhere: save the state_dict.

    Raises HardwareError for weights on the CPU, and KernelError if no kernel takes them. Raises ProfileError for a
    damaged profile, and UnknownNameError for a name that nobody registered.
    """

    def __init__(
        self,
        weights: MoEWeights,
        top_k: int,
        *,
        router: Router | None = None,
        device: str = "auto",
        options: DispatchOptions | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(weights, MoEWeights):
            raise KernelError(
                f"weights must be a MoEWeights, not {type(weights).__name__}; write MoEWeights(gate_up, down)"
            )
        if not (router is None or callable(router)):
            raise KernelError(f"the router must be a function or a module, or None, not {router!r:.60}")
        given = {field: tensor for field in FIELDS if (tensor := getattr(weights, field)) is not None}
        for field in FIELDS:
            tensor = given.get(field)
            self.register_parameter(field, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))
        self.router = router
        builder = Builder(device, options)
        names = {field: field for field in given}
        of = {what: getattr(weights, what) for what in ("activation", "layout", "limit", "format", "activations")}
        WrappedExperts(self, Experts(MoELayer, **names, top_k=top_k, **of), top_k, builder).take(self)  # type: ignore[arg-type]

    @property
    def runtime(self) -> LayerRuntime:
        """The LayerRuntime of the weights that the module has now. Raises KernelError if none can be made."""
        return self._experts.current()

    @property
    def dropped(self) -> Mapping[str, str]:
        """Why kernels or single candidates are not used, by their names."""
        return self.runtime.dropped

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know: missing profiles, kernels left out, what another copy of the weights would
        gain."""
        return tuple(dict.fromkeys(self._experts.builder.notes))

    def forward(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        out: Tensor | None = None,
        num_valid: Tensor | int | None = None,
    ) -> Tensor:
        """The layer's output `[T, H]` in the dtype of hidden_states. `LayerRuntime.forward` describes the arguments.

        If topk_ids and topk_weights are None, the router gives them. Raises RoutingError if there is no router, or if
        only one of them is None.
        """
        if topk_ids is None or topk_weights is None:
            if topk_ids is not None or topk_weights is not None or self.router is None:
                raise RoutingError("a MoELayer without a router takes topk_ids and topk_weights; give both")
            topk_ids, topk_weights = pair(self.router(hidden_states), "the router")
        return self._experts.run(hidden_states, topk_ids, topk_weights, out, num_valid)

    def explain(self, tokens: int = 512) -> Explanation:
        """Explain which candidate an eager batch of `tokens` would run, and why. `str` of the result is a text.

        Raises ShapeError for less than one token.
        """
        return explain(self.runtime, tokens)

    def warm_up(self, num_tokens: int, dtype: torch.dtype) -> GraphPlan | None:
        """Prepare the capture of a CUDA graph of `num_tokens`; see `LayerRuntime.warm_up`."""
        return self.runtime.warm_up(num_tokens, dtype)

    def update(self, weights: MoEWeights) -> None:
        """Compute with new weights from now on; see `LayerRuntime.update`."""
        self.runtime.update(weights)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Raises KernelError: a replica would compute with this module's weights, on this module's GPU."""
        raise KernelError("torch.nn.DataParallel cannot replicate a MoELayer; run a process for each GPU")

    def extra_repr(self) -> str:
        found = self._experts.layer
        return f"{found.shape.title} on {found.hardware.name}, kernels={list(found.configs())}"

    @property
    def _experts(self) -> WrappedExperts:
        found = experts_of(self)
        assert found is not None
        return found
