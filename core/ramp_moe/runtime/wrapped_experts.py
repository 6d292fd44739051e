"""What a wrapped module calls instead of its own experts, how its tensors become the layer's, and what it records."""

from __future__ import annotations

import copy
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

    from .layer import MoELayer
    from .layer_factory import Builder

KEY = "_ramp_moe"
"""Attribute of a wrapped module that holds its WrappedExperts."""


class WrappedExperts:
    """One module's layer, called as frameworks call their experts.

    The layer reads the module's own tensors where it can. Of those that it holds in another order there is one copy,
    the layer's: from `take` to `give_back` the module's tensors are placeholders (see `placeholder`). Each call checks
    that the module still has the tensors that the layer is of. If not, it makes a layer of those that it has.

    Making one changes nothing. Raises RampMoEError if the module's tensors cannot be a layer's.
    """

    def __init__(self, module: Module, adapter: ExpertsAdapter, top_k: int, builder: Builder) -> None:
        self.adapter, self.top_k = adapter, top_k
        self.recorded: list[tuple[int, Tensor]] | None = None
        """Tokens and expert histogram int64 `[num_experts]` of each batch, on the device, while something records."""
        self._builder, self._module = builder, weakref.ref(module)
        self._tensors: dict[str, Tensor] = {}
        """By field of MoEWeights, the module's, from `take` to `give_back`."""
        self._expected: list[tuple[str | None, str, Tensor, Any]] = []
        """What `current` finds: in which of the module's dictionaries, under which name, the tensor, and its place."""
        self._installed = False
        self._before: Any = None
        self._build(module)

    def __call__(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum of the experts `[T, H]` in the dtype of hidden_states `[T, H]`, any float, which the layer
        takes in the dtype of its weights, as Transformers does: topk_ids `[T, k]` int32 or int64, where num_experts and
        -1 are skipped, topk_weights `[T, k]` of any float. Raises what `MoELayer.forward` does; KernelError in a
        backward pass, and if the module's tensors have become such that no layer can be made of them."""
        import torch

        if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
            raise RoutingError(f"topk_ids are {topk_ids.dtype}, not integers; a route gives (topk_ids, topk_weights)")
        layer = self.layer
        if not torch.compiler.is_compiling():
            layer = self.current()
            self._record(topk_ids)
            trains = torch.is_grad_enabled() and any(p.requires_grad for p in self._tensors.values())
            if trains and not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_()  # their gradients, too, are refused
        x = hidden_states.to(self.taken(hidden_states.dtype)).contiguous()
        ids = topk_ids if topk_ids.dtype == torch.int32 else kernel_ids(topk_ids.long(), layer.shape.num_experts, None)
        ids = ids.contiguous()
        return layer(x, ids, topk_weights.float().contiguous()).to(hidden_states.dtype)

    def taken(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the layer takes hidden states of this one: its weights', or bf16 if fp8 weights come with
        neither bf16 nor fp16."""
        import torch

        weights = self.layer.held[0].gate_up.dtype
        if weights.itemsize > 1:
            return weights
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16

    def take(self, module: Module, others: Mapping[int, list[tuple[str, Tensor]]] | None = None) -> None:
        """Have the module hold placeholders for what the layer does not read where it is. others: by storage, the
        model's tensors that are in it. Raises KernelError for a tensor that is shared, or cannot be moved."""
        from torch import Tensor

        from .placeholder import Placeholder, Source, become
        from .update import storage

        order, names = self.adapter.order(module), self.adapter.names(module)
        module.__dict__[KEY] = self
        _plain_in_state_dict(module)
        self.layer.owner = weakref.ref(self)
        self._tensors = {field: getattr(module, name) for field, name in names.items()}
        if any(type(module._parameters.get(name)) is Tensor for name in names.values()):
            return  # lent for one call, as by torch.func.functional_call: the next one looks again
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
        """Have the module hold its tensors itself, as before `take`. Again, after a failure, it goes on."""
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
        """Leave the module as it was, but for what has been done to it since. Again, after a failure, it goes on."""
        self.give_back()
        if self._installed:
            self.adapter.uninstall(module, self._before)
            self._installed = False
        _plain_in_state_dict(module, remove=True)
        module.__dict__.pop(KEY, None)

    def current(self) -> MoELayer:
        """The layer, once the module's tensors are known to be those that it is of. Raises RampMoEError with the reason
        if they are others, of which no layer can be made."""
        module = self._module()
        assert module is not None
        state = module.__dict__
        for where, name, tensor, place in self._expected:  # a microsecond each
            if (state if where is None else state[where]).get(name) is not tensor or _place(tensor) != place:
                return self._renewed(module, name)
        return self.layer if self._expected else self._renewed(module)

    def _renewed(self, module: Module, name: str = "") -> MoELayer:
        import torch

        from .refusals import check
        from .torch_op import register

        what = f"{name or 'a weight'} of {type(module).__name__} is another than when it was wrapped"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise KernelError(f"{what}; run the model once before it is captured")
        number = self.layer._number
        try:
            check(module, self.adapter, self.layer)
            self.give_back()
            self._build(module)
            self.take(module)
        except Exception as e:
            why = str(e) if isinstance(e, RampMoEError) else f"{type(e).__name__}: {e}"
            raise KernelError(f"{what}: {why}; ramp_moe.unwrap(model) computes with it as it is") from e
        self.layer._number = register(self.layer, number)
        return self.layer

    def _build(self, module: Module) -> None:
        from .refusals import check

        check(module, self.adapter)
        weights = self.adapter.weights(module)
        self._layout = weights.layout
        self.layer = self._builder.layer(weights, self.top_k)

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
        """Of a copy of the module, which has a layer of its own."""
        from .placeholder import Placeholder

        module = memo.get(id(self._module()))
        if module is None:
            raise KernelError("a wrapped module's experts cannot be copied without the module")
        found = memo[id(self)] = object.__new__(type(self))
        found.__dict__.update(self.__dict__)
        found.layer = copy.deepcopy(self.layer, memo)
        found._module, found.layer.owner = weakref.ref(module), weakref.ref(found)
        found._tensors = copy.deepcopy(self._tensors, memo)
        for field, tensor in found._tensors.items():
            if not isinstance(tensor, Placeholder):  # parameters copy their memory, but the layer must read theirs
                old = self._tensors[field]
                held = next(t for h in found.layer.held if (t := getattr(h, field)).shape == old.shape)
                tensor.data = held.as_strided(old.shape, old.stride(), old.storage_offset())
        found._expected = [
            (where, name, t, _place(t))
            for (where, name, *_), t in zip(self._expected, found._tensors.values(), strict=False)
        ]
        found.recorded = None
        return found

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KernelError("a wrapped model cannot be pickled; save its state_dict(), or ramp_moe.unwrap(model) first")


def experts_of(module: Module) -> WrappedExperts | None:
    """Those of a wrapped module."""
    found = getattr(module, KEY, None)
    return found if isinstance(found, WrappedExperts) else None


def _where(module: Module, name: str) -> str | None:
    """Which of the module's dictionaries has a tensor; None if it is a plain attribute."""
    return next((where for where in ("_parameters", "_buffers") if name in getattr(module, where)), None)


def _place(tensor: Tensor) -> Any:
    """What changes if the tensor is given other memory, or is no placeholder any more."""
    if hasattr(tensor, "_source"):
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride()


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
    """A state has plain tensors, copies, in the module's own order; but for the parameters themselves (keep_vars)."""
    from .placeholder import Placeholder

    for key in [key for key in state if key.startswith(prefix)]:
        if isinstance(t := state[key], Placeholder) and t is not getattr(module, key.removeprefix(prefix), None):
            state[key] = t.values().clone()
