"""Placeholders for a wrapped module's tensors that a layer holds in another order, or derives something from.

A `Placeholder` has the shape, dtype and device of the module's tensor. Reading it computes the values in the module's
order. Writing to it, or to a view of it, writes to all that the layer holds. Operations that can do neither, such as
taking its address, raise KernelError.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import KernelError
from .relayout import ROWS, copy_rows
from .update import put, storage, writing

if TYPE_CHECKING:
    from torch.nn import Module

    from ..registry.experts_adapter import ExpertsAdapter
    from .layer import LayerRuntime

aten = torch.ops.aten
ALL = slice(None)
_writing = threading.RLock()
"""Held while values are read, changed and written back: engines load parts of one expert from several threads."""
MINE = ("_source", "_steps")
"""Attributes of a Placeholder that an ordinary tensor does not have."""


@dataclass(eq=False)
class Source:
    """The place of the values of one of a module's tensors.

    name: the module's attribute.
    field: the field of MoEWeights that it becomes.
    order: see `ExpertsAdapter.order`.
    layout: order of the rows that the adapter gives, one of LAYOUTS.
    dtype: the module's dtype.
    memory: the module's own memory, if the layer reads it there and holds other copies or derived tensors besides.
    gone: True once the model is unwrapped.
    """

    layer: LayerRuntime
    adapter: ExpertsAdapter
    module: weakref.ref[Module]
    name: str
    field: str
    order: Any
    layout: str
    dtype: torch.dtype
    memory: Tensor | None = None
    gone: bool = False

    def read(self, experts: slice = ALL) -> Tensor:
        """The values of these experts in the module's order: a copy that nothing else uses, or the module's own memory.

        Raises KernelError if the model was unwrapped.
        """
        if self.gone:
            raise KernelError(f"{self.name} belongs to a model that was unwrapped since; take it from the model again")
        if self.memory is not None:
            return self.memory[experts]
        held = self.layer.held[0]
        t: Tensor = getattr(held, self.field)[experts]
        if self.field in ROWS and held.layout != self.layout:
            out, inter = torch.empty_like(t), self.layer.shape.intermediate_size
            t = copy_rows(t, held.layout, out, self.layout, inter)
        found = _converted(self.adapter.own(self.order, self.field, t), self.dtype).contiguous()
        return found.clone() if storage(found) == storage(getattr(held, self.field)) else found

    def write(self, values: Tensor, experts: slice = ALL) -> None:
        """Have the layer hold these values for these experts. values: in the module's order."""
        held: Tensor = getattr(self.layer.held[0], self.field)
        with writing(self.layer):
            given = _converted(self.adapter.given(self.order, self.field, values), held.dtype)
            put(self.layer, self.field, given, self.layout, experts)

    def check(self, tensor: Tensor) -> None:
        """Raises KernelError unless reading and writing the first expert give what the module's tensor holds."""
        first = tensor.detach()[:1].contiguous()
        written = self.adapter.own(self.order, self.field, self.adapter.given(self.order, self.field, first))
        for found in (self.read(slice(0, 1)), _converted(written, self.dtype).contiguous()):
            if found.shape != first.shape or not torch.equal(found.view(torch.uint8), first.view(torch.uint8)):
                raise KernelError(
                    f"{type(self.adapter).__name__}.given and .own disagree about how {self.name} becomes {self.field}"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        import copy

        found = memo[id(self)] = copy.copy(self)
        found.layer, found.memory = copy.deepcopy((self.layer, self.memory), memo)
        found.module = weakref.ref(memo[id(self.module())])
        return found


def _converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a dtype. Packed weights and e8m0 scales, which are held as uint8, keep their bytes."""
    return t.contiguous().view(dtype) if torch.uint8 in (t.dtype, dtype) else t.to(dtype)


@dataclass(frozen=True)
class Step:
    """One view of a tensor: `function(tensor, *args, **kwargs)`, or its element `index` if that is given."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None

    def __call__(self, t: Tensor) -> Tensor:
        found = self.function(t, *self.args, **self.kwargs)
        result: Tensor = found if self.index is None else found[self.index]
        return result


class Placeholder(Tensor):
    """The tensor of a Source, or the view of it that `_steps` lead to."""

    _source: Source
    _steps: tuple[Step, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: Source, like: Tensor, steps: tuple[Step, ...] = ()) -> Placeholder:
        """Make one. like: a tensor with its shape, strides and dtype, on any device."""
        with torch.inference_mode(False):  # a view of an inference tensor would be one, too
            # On meta, so that torch gives its data, which does not exist, to no plain tensor. `device` is dispatched.
            made = Tensor._make_wrapper_subclass(
                cls, like.shape, like.stride(), dtype=like.dtype, device=torch.device("meta"), dispatch_device=True
            )
        made._source, made._steps = source, steps
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0]._source.layer.held[0].down.device
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return func.decompose(*args, **kwargs)  # torch does this above us, except in inference mode
        if func.namespace == "c10d" or torch.Tag.inplace_view in func.tags or func is aten.as_strided.default:
            _refuse(_all(args)[0], f"torch's {func.name()} needs the memory of")
        if func in (aten.detach.default, aten.alias.default):
            return Placeholder(args[0]._source, args[0], args[0]._steps)
        if func.is_view and isinstance(args[0], Placeholder):
            return args[0]._view(func, args[1:], kwargs)
        return _computed(func, args, kwargs)

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like = func(torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta"), *args, **kwargs)
        if isinstance(like, Tensor):
            return Placeholder(self._source, like, (*self._steps, Step(func, args, kwargs)))
        steps = [(*self._steps, Step(func, args, kwargs, i)) for i in range(len(like))]
        return [Placeholder(self._source, t, s) for t, s in zip(like, steps, strict=True)]

    def _part(self) -> tuple[slice, tuple[Step, ...]]:
        """The experts that the view covers, and the steps that lead from these to the view."""
        if not self._steps:
            return ALL, ()
        first, *rest = self._steps
        given = dict(zip(("dim", *_NAMES.get(first.function, ())), first.args, strict=False)) | first.kwargs
        if given.get("dim", 0) != 0 or first.function not in _NAMES:
            return ALL, self._steps
        experts = self._source.layer.shape.num_experts
        if first.function is aten.slice.Tensor:
            start, end, step = slice(given.get("start"), given.get("end"), given.get("step", 1)).indices(experts)
            if start >= end:
                return ALL, self._steps
            return slice(start, end), (Step(aten.slice.Tensor, (0, 0, None, step), {}), *rest)
        index = (given["index"] if first.index is None else first.index) % experts
        return slice(index, index + 1), (Step(aten.select.int, (0, 0), {}), *rest)

    def values(self) -> Tensor:
        """Read the values as a plain tensor."""
        with torch.no_grad():
            experts, steps = self._part()
            return _through(steps, self._source.read(experts))

    # --- what torch does beside its operators --------------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        """Set the data. Values that fit are copied, so that captured graphs stay valid.

        Otherwise this becomes a plain tensor, which the layer's next call notices. Raises KernelError for a view, if
        the values do not fit.
        """
        if isinstance(new, Placeholder) and new._source is self._source and new.shape == self.shape:
            return
        if (new.shape, new.dtype, new.device) == (self.shape, self.dtype, self.device):
            with torch.no_grad():
                self.detach().copy_(new)
        elif self._steps:
            _refuse(self, "other data cannot take the place of a view of")
        else:
            become(self, new)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        import copy

        found: Tensor
        if id(self) in memo:
            found = memo[id(self)]
            return found
        if id(self._source.module()) in memo and not self._steps:  # with its module
            found = Placeholder(copy.deepcopy(self._source, memo), self)
        else:
            found = self.values().clone()
        if isinstance(self, torch.nn.Parameter):
            found = torch.nn.Parameter(found, self.requires_grad)
        found.__dict__.update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in MINE})
        memo[id(self)] = found
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a plain tensor: files hold no placeholders."""
        return _like(self, self.values().clone()).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        """A copy that is read-only."""
        found = self.values().clone().numpy(force=force)
        found.flags.writeable = False
        return found

    def tolist(self) -> Any:
        return self.values().tolist()

    def data_ptr(self) -> NoReturn:
        _refuse(self, "there is no address of")

    def untyped_storage(self) -> NoReturn:
        _refuse(self, "there is no storage of")

    def storage(self) -> NoReturn:
        _refuse(self, "there is no storage of")

    def share_memory_(self) -> NoReturn:
        _refuse(self, "other processes cannot share")

    def __dlpack__(self, *args: Any, **options: Any) -> NoReturn:
        _refuse(self, "other libraries cannot share the memory of")


_NAMES: dict[Any, Sequence[str]] = {
    aten.select.int: ("index",),
    aten.slice.Tensor: ("start", "end", "step"),
    aten.unbind.int: (),
}
"""Views that may select some experts, with the names of their arguments after the dimension."""


def become(t: Tensor, new: Tensor) -> None:
    """Turn the object `t` into the tensor `new`, for all who hold `t`. It stays a parameter and keeps its attributes.

    Raises KernelError if something in torch depends on what `t` was.
    """
    noted = {name: value for name, value in vars(t).items() if name not in (*MINE, "_is_param")}
    other = _like(t, new)
    other.__dict__.update(noted)
    if (
        t.is_leaf
        and t.grad is not None
        and (t.grad.shape, t.grad.dtype, t.grad.device) == (new.shape, new.dtype, new.device)
    ):
        other.grad = t.grad
    try:
        torch.utils.swap_tensors(t, other)  # type: ignore[no-untyped-call]
    except RuntimeError as e:
        raise KernelError(f"its weights cannot be moved while something else refers to them ({e})") from e


def _like(t: Tensor, new: Tensor) -> Tensor:
    """`new`, made a parameter if `t` is one."""
    return torch.nn.Parameter(new, t.requires_grad) if isinstance(t, torch.nn.Parameter) else new


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, and write back what it writes to."""
    written = {id(t) for value in _written(func, args, kwargs) for t in _all(value)}
    if not written:
        return _on_values(func, args, kwargs, written)
    with _writing:
        return _on_values(func, args, kwargs, written)


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: set[int]) -> Any:
    groups: dict[Source, list[Placeholder]] = {}
    for t in {id(t): t for t in _all((args, kwargs))}.values():
        groups.setdefault(t._source, []).append(t)
    plain: dict[int, Tensor] = {}
    back: list[tuple[Source, Tensor, slice]] = []
    for source, group in groups.items():
        # Views of one tensor may overlap, so here, too, they are made from the same values.
        experts, steps = group[0]._part() if len(group) == 1 else (ALL, None)
        values = source.read(experts)
        for t in group:
            plain[id(t)] = _through(t._steps if steps is None else steps, values)
        if any(id(t) in written for t in group):
            back.append((source, values, experts))
    out = func(*_swapped(plain, args), **_swapped(plain, kwargs))
    for source, values, experts in back:
        source.write(values, experts)
    given = {id(plain[id(t)]): t for group in groups.values() for t in group if id(t) in written}
    return _swapped(given, out)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    return [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]


def _through(steps: Sequence[Step], t: Tensor) -> Tensor:
    for step in steps:
        t = step(t)
    return t


def _all(x: Any) -> list[Placeholder]:
    return [t for t in tree_leaves(x) if isinstance(t, Placeholder)]


def _swapped(by_id: dict[int, Any], x: Any) -> Any:
    return tree_map(lambda t: by_id.get(id(t), t), x)


def _refuse(t: Placeholder, why: str) -> NoReturn:
    raise KernelError(
        f"{why} {t._source.name}: its values are held in another order while the model is wrapped. Read or write it "
        "with torch's operators (copy_, load_state_dict, clone), or ramp_moe.unwrap(model) first"
    )
