"""The experts that a wrapped module calls instead of its own: they share its tensors and may record its routing."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import KernelError, RampMoEError, RoutingError
from ..registry.experts_adapter import ExpertsAdapter
from ..spec.launchable import kernel_ids
from .relayout import ROWS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

    from .layer import LayerRuntime
    from .layer_factory import Builder

KEY = "_ramp_moe"
"""Attribute of a wrapped module that holds its WrappedExperts."""


class WrappedExperts:
    """One module's layer, called as frameworks call their experts.

    The layer reads the module's own tensors if it can. Tensors that it holds in another order exist once, in the layer.
    From `take` to `give_back`, the module has placeholders for them (see `placeholder`). Each call checks that the
    module still has the tensors that the layer was made from. If not, it makes a new layer from the present ones.

    The constructor does not change the module. It raises RampMoEError if no layer can be made from its tensors.
    """

    def __init__(self, module: Module, adapter: ExpertsAdapter, top_k: int, builder: Builder) -> None:
        self.adapter, self.top_k = adapter, top_k
        self.recorded: list[tuple[int, Tensor]] | None = None
        """(tokens, expert histogram int64 `[num_experts]` on the device) per batch; None if nothing records."""
        self.builder, self._module = builder, weakref.ref(module)
        self._tensors: dict[str, Tensor] = {}
        """The module's tensors by field of MoEWeights, from `take` to `give_back`."""
        self._expected: list[tuple[str | None, str, Tensor, Any]] = []
        """What `current` expects of each tensor: its dictionary in the module, its name, the tensor, and its place."""
        self._renewing = threading.RLock()
        self._installed = False
        self._before: Any = None
        self._build(module)

    def __call__(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the experts, `[T, H]` in the dtype of hidden_states.

        hidden_states: `[T, H]` of any float dtype. The layer takes them in the dtype of its weights (see `taken`).
        topk_ids: `[T, k]` int32 or int64; num_experts and -1 are skipped.
        topk_weights: `[T, k]` of any float dtype.

        Raises RoutingError for ids that are no integers, and what `LayerRuntime.forward` raises. Raises KernelError in
        a backward pass, and if no layer can be made from tensors that the module was given since.
        """
        import torch

        if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
            raise RoutingError(f"topk_ids are {topk_ids.dtype}, not integers; a route gives (topk_ids, topk_weights)")
        # A conversion to what a tensor is already takes microseconds.
        x, dtype, scores = hidden_states, hidden_states.dtype, topk_weights
        if dtype is not (takes := self.taken(dtype)):
            x = x.to(takes)
        ids = topk_ids
        if ids.dtype is not torch.int32:
            ids = kernel_ids(ids.long(), self.layer.shape.num_experts, None)
        if scores.dtype is not torch.float32:
            scores = scores.float()
        found = self.run(x.contiguous(), ids.contiguous(), scores.contiguous())
        return found if found.dtype is dtype else found.to(dtype)

    def run(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor | None = None,
        num_valid: Tensor | int | None = None,
    ) -> Tensor:
        """`LayerRuntime.forward` with the weights that the module has now. Raises KernelError in a backward pass, too,
        and if the module's tensors have become such that no layer can be made of them."""
        import torch

        layer = self.layer
        if not torch.compiler.is_compiling():
            layer = self.current()
            if self.recorded is not None:
                self._record(topk_ids)
            trains = torch.is_grad_enabled() and any(p.requires_grad for p in self._tensors.values())
            if trains and not getattr(hidden_states, "requires_grad", True):  # the layer refuses what is no tensor
                hidden_states = hidden_states.detach().requires_grad_()  # refuses gradients of weights, too
        return layer(hidden_states, topk_ids, topk_weights, out, num_valid)

    def taken(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the layer takes hidden states of `dtype`.

        It is the dtype of its weights. Quantised weights take bf16 and fp16 as they are, and any other dtype as bf16.
        """
        import torch

        held = self.layer.held[0]
        if held.stored.scale is None:
            return held.gate_up.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16

    def take(self, module: Module, others: Mapping[int, list[tuple[str, Tensor]]] | None = None) -> None:
        """Give the module placeholders for tensors that the layer does not read in place.

        others: names and tensors of the model, by the storage that they are in.

        Raises KernelError for a tensor that shares its memory with another, or that cannot be moved.
        """
        from torch import Tensor

        from .placeholder import Placeholder, Source, become
        from .update import storage

        order, names = self.adapter.order(module), self.adapter.names(module)
        module.__dict__[KEY] = self
        _plain_in_state_dict(module)
        self.layer.owner = weakref.ref(self)
        self._tensors = {field: getattr(module, name) for field, name in names.items()}
        if any(type(module._parameters.get(name)) is Tensor for name in names.values()):
            return  # lent for one call, as by torch.func.functional_call; the next call looks again
        for field, tensor in self._tensors.items():
            name = names[field]
            held = [getattr(h, field) for h in self.layer.held]
            read = any(storage(h) == storage(tensor) for h in held)
            if read and not self.layer.derived and (field not in ROWS or len(held) == 1):
                continue
            if sharing := [n for n, t in (others or {}).get(storage(tensor), ()) if t is not tensor]:
                raise KernelError(
                    f"{name} shares its memory with {', '.join(sharing)}, and would have to be moved; untie them first"
                )
            source = Source(
                self.layer, self.adapter, weakref.ref(module), name, field, order, self._layout, tensor.dtype,
                tensor.detach() if read else None,
            )  # fmt: skip
            source.check(tensor)
            become(tensor, Placeholder(source, tensor if read else _contiguous(tensor)))
        self._expected = [(_where(module, names[f]), names[f], t, _place(t)) for f, t in self._tensors.items()]

    def give_back(self) -> None:
        """Give the module its tensors back, as before `take`. After a failure, a second call continues."""
        from .placeholder import Placeholder, become

        for tensor in self._tensors.values():
            if isinstance(tensor, Placeholder):
                source = tensor._source
                become(tensor, source.read())
                source.gone = True
        self._tensors, self._expected = {}, []

    def install(self, module: Module) -> None:
        self._before = self.adapter.install(module)
        self._installed = True

    def remove(self, module: Module) -> None:
        """Restore the module, except for later changes by others. After a failure, a second call continues."""
        self.give_back()
        if self._installed:
            self.adapter.uninstall(module, self._before)
            self._installed = False
        _plain_in_state_dict(module, remove=True)
        module.__dict__.pop(KEY, None)

    def current(self) -> LayerRuntime:
        """The layer of the module's present tensors, made anew if they changed.

        Raises KernelError, with the reason, if no layer can be made from them.
        """
        module = self._module()
        if module is None:
            raise KernelError(
                "the module that these experts belong to is gone; keep it alive, or copy.deepcopy it before"
            )
        return self.layer if self._other(module) is None else self._renewed(module)

    def _other(self, module: Module) -> str | None:
        """Which of the module's tensors is another than the layer was made of; None if all are the same."""
        state = module.__dict__
        for where, name, tensor, (kind, *place) in self._expected:  # a microsecond each
            if (
                (state if where is None else state[where]).get(name) is not tensor
                or type(tensor) is not kind
                or (place and place != [tensor.data_ptr(), tensor.shape, tensor.stride()])
            ):
                return name
        return None if self._expected else "a weight"

    def _renewed(self, module: Module) -> LayerRuntime:
        """The layer of what the module has now, made once, whichever thread comes first."""
        with self._renewing:
            if (name := self._other(module)) is not None:
                self._renew(module, name)
            return self.layer

    def _renew(self, module: Module, name: str) -> None:
        import torch

        from .refusals import check
        from .torch_op import register

        what = f"{name} of {type(module).__name__} has been replaced since its layer was made"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise KernelError(f"{what}; run the model once before it is captured")
        number = self.layer._number
        try:
            check(module, self.adapter, self.layer)
            self.give_back()
            self._build(module)
            self.take(module)
        except Exception as e:
            remedy = "; ramp_moe.unwrap(model) computes with it as it is" if self._installed else ""
            why = str(e) if isinstance(e, RampMoEError) else f"{type(e).__name__}: {e}"
            raise KernelError(f"{what}: {why}{remedy}") from e
        self.layer._number = register(self.layer, number)

    def _build(self, module: Module) -> None:
        from .refusals import check

        check(module, self.adapter)
        weights = self.adapter.weights(module)
        self._layout = weights.layout
        self.layer = self.builder.layer(weights, self.top_k)

    def _record(self, topk_ids: Tensor) -> None:
        import torch

        if self.recorded is None or (topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        experts = self.layer.shape.num_experts
        ids = topk_ids.flatten().long()
        ids = ids.masked_fill((ids < 0) | (ids > experts), experts)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
        self.recorded.append((len(topk_ids), counts.scatter_add_(0, ids, torch.ones_like(ids))[:experts]))

    def __deepcopy__(self, memo: dict[int, Any]) -> WrappedExperts:
        """Copy for a copy of the module, with a layer of its own. Raises KernelError without a copy of the module."""
        from .placeholder import Placeholder

        original = self._module()
        module = memo.get(id(original))
        if original is None or module is None:
            raise KernelError("a wrapped module's experts cannot be copied without the module")
        changed = self._other(original) is not None  # the copy then makes a layer of its own tensors when it first runs
        found = memo[id(self)] = object.__new__(type(self))
        found.__dict__.update(self.__dict__)
        found.layer = copy.deepcopy(self.layer, memo)
        found._module, found.layer.owner = weakref.ref(module), weakref.ref(found)
        found._tensors = copy.deepcopy(self._tensors, memo)
        for field, tensor in found._tensors.items():
            if not changed and not isinstance(
                tensor, Placeholder
            ):  # the module's copy has memory of its own; it must be the layer's
                old = self._tensors[field]
                held = next(t for h in found.layer.held if (t := getattr(h, field)).shape == old.shape)
                tensor.data = held.as_strided(old.shape, old.stride(), old.storage_offset())
        every = zip(self._expected, found._tensors.values(), strict=False)
        found._expected = [] if changed else [(where, name, t, _place(t)) for (where, name, *_), t in every]
        found.recorded, found._renewing = None, threading.RLock()
        return found

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KernelError("a layer cannot be pickled; save its state_dict(), or ramp_moe.unwrap a wrapped model first")


def pair(found: object, what: str) -> tuple[Tensor, Tensor]:
    """What a router returned, if it is (topk_ids, topk_weights). Raises RoutingError with `what` it is otherwise."""
    import torch

    if not (isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(t, torch.Tensor) for t in found)):
        kinds = [type(t).__name__ for t in found] if isinstance(found, tuple | list) else type(found).__name__
        raise RoutingError(f"{what} must return two tensors, (topk_ids, topk_weights), not {kinds}")
    return found[0], found[1]


def experts_of(module: Module) -> WrappedExperts | None:
    """The experts of a wrapped module; None if it is not wrapped."""
    found = getattr(module, KEY, None)
    return found if isinstance(found, WrappedExperts) else None


def _where(module: Module, name: str) -> str | None:
    """Name of the module's dictionary that has a tensor; None if the tensor is a plain attribute."""
    return next((where for where in ("_parameters", "_buffers") if name in getattr(module, where)), None)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """A value that changes if the tensor gets other memory, or stops being a placeholder."""
    if hasattr(tensor, "_source"):
        return (type(tensor),)
    return type(tensor), tensor.data_ptr(), tensor.shape, tensor.stride()


def _contiguous(tensor: Tensor) -> Tensor:
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _plain_in_state_dict(module: Module, remove: bool = False) -> None:
    hooks = module._state_dict_hooks
    for key in [key for key, hook in hooks.items() if hook is _plain]:
        del hooks[key]
    if not remove:
        module.register_state_dict_post_hook(_plain)  # type: ignore[no-untyped-call]


def _plain(module: Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Replace placeholders in a state dict by plain copies, except the parameters themselves (keep_vars)."""
    from .placeholder import Placeholder

    for key in [key for key in state if key.startswith(prefix)]:
        if isinstance(t := state[key], Placeholder) and t is not getattr(module, key.removeprefix(prefix), None):
            state[key] = t.values().clone()
