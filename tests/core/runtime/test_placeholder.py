"""Wrapped weights that a layer holds otherwise than the module: whatever torch does to them, they are those of a plain
module of which the same was done, and so is what the layer computes with."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ramp_moe import KernelError
from ramp_moe.runtime.placeholder import Placeholder
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from wrap_cases import CASES, IDS, SCORES, TENSORS, Bank, Case, X

aten = torch.ops.aten
SOME = torch.tensor([3, 1, 7])

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda p, n: p.copy_(n),
    "data.copy_": lambda p, n: p.data.copy_(n),
    "detach": lambda p, n: p.detach().copy_(n),
    "data =": lambda p, n: setattr(p, "data", n.clone()),
    "another dtype": lambda p, n: p.copy_(n.double()),
    "broadcast": lambda p, n: p.copy_(n[:1]),
    "expert": lambda p, n: p.data[3].copy_(n[3]),
    "last expert": lambda p, n: p.data[-1].copy_(n[0]),
    "experts": lambda p, n: p.data[2:5].copy_(n[7:10]),
    "open slice": lambda p, n: p.data[-4:].copy_(n[:4]),
    "every third": lambda p, n: p.data[1::3].copy_(n[1::3]),
    "no expert": lambda p, n: p.data[5:5].copy_(n[5:5]),
    "narrow": lambda p, n: p.data.narrow(0, 1, 2).mul_(2),
    "narrow rows": lambda p, n: p.data.narrow(1, 1, 2).zero_(),
    "part of an expert": lambda p, n: p.data[1][2:4].add_(1),
    "part of experts": lambda p, n: p.data[2:9][1:3][:, 2:5].copy_(n[:2, 2:5]),
    "each": lambda p, n: [e.mul_(i) for i, e in enumerate(p.data)],
    "unbind": lambda p, n: [e.fill_(i) for i, e in enumerate(p.data.unbind(1))],
    "chunk": lambda p, n: p.data.chunk(2, 1)[1].copy_(n.chunk(2, 1)[0]),
    "split": lambda p, n: p.data.split([3, 13])[0].neg_(),
    "transpose": lambda p, n: p.data.transpose(0, 1)[2].fill_(0.5),
    "movedim": lambda p, n: p.data.movedim(0, -1)[..., 0].zero_(),
    "view": lambda p, n: p.data.view(-1)[5:900:3].fill_(2),
    "view as bytes": lambda p, n: p.data.view(torch.int16).bitwise_xor_(1),
    "reshape": lambda p, n: p.data.reshape(16, -1)[1].zero_(),
    "flatten": lambda p, n: p.data.flatten().index_fill_(0, SOME, 9),
    "diagonal": lambda p, n: p.data.diagonal(dim1=0, dim2=1).fill_(1),
    "unsqueeze": lambda p, n: p.data[:, None].squeeze(1).copy_(n),
    "expand": lambda p, n: p.data.expand(1, *p.shape)[0].copy_(n),
    "index": lambda p, n: p.data.__setitem__(SOME, n[SOME]),
    "mask": lambda p, n: p.data.__setitem__(n > 0, 0.0),
    "setitem": lambda p, n: p.data.__setitem__((slice(None), 2), 1.5),
    "index_copy_": lambda p, n: p.index_copy_(0, SOME, n[SOME]),
    "scatter": lambda p, n: p.data.index_add_(1, SOME, n[:, :3]),
    "out": lambda p, n: torch.add(n, 1, out=p.data),
    "out of a part": lambda p, n: torch.mul(n[2], 3, out=p.data[2]),
    "iadd": lambda p, n: p.data.__iadd__(n),
    "lerp_": lambda p, n: p.lerp_(n, 0.25),
    "addcmul_": lambda p, n: p.addcmul_(n, n, value=0.5),
    "itself": lambda p, n: p.copy_(p.flip(0)),
    "of itself": lambda p, n: p.data[0].copy_(p.data[1]),
    "overlapping": lambda p, n: p.data[1:].add_(p.data[:-1].clone()),
    "foreach": lambda p, n: torch._foreach_mul_([p.data[0], p.data[0], p.data[1][1:]], 2.0),
    "foreach copy": lambda p, n: torch._foreach_copy_(list(p.data), list(n)),
    "init": lambda p, n: nn.init.constant_(p, 0.125),
    "where": lambda p, n: p.copy_(torch.where(n > 0, p, n)),
}


def values(seed: int, turned: bool) -> dict[str, Tensor]:
    bank = Bank(seed, turned)
    return {name: getattr(bank, name).detach() for name in TENSORS}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_write(case: Case, mode: Any) -> None:
    bank, plain = case.wrapped(), values(0, case.turned)
    assert any(isinstance(p, Placeholder) for p in bank.parameters())
    for seed, write in enumerate(WRITES.values(), 1):
        new = values(seed, case.turned)
        with mode():
            for name in TENSORS:
                write(getattr(bank, name), new[name])
                write(plain[name], new[name])
                assert torch.equal(getattr(bank, name).clone(), plain[name]), (seed, name)
    case.check(bank, {name: tensor.clone() for name, tensor in plain.items()})


@pytest.mark.parametrize("write", WRITES)
def test_each_write_reaches_the_kernels(write: str) -> None:
    case = CASES["all of it"]
    bank, plain, new = case.wrapped(), values(0, True), values(1, True)
    with torch.no_grad():
        for name in TENSORS:
            WRITES[write](getattr(bank, name), new[name])
            WRITES[write](plain[name], new[name])
    case.check(bank, plain)


def overloads(*, view: bool) -> Iterator[Any]:
    """Operators of torch's that change a tensor, or make a view of it, and need to be given nothing else."""
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            needed = [a for a in op._schema.arguments if not a.has_default_value()]
            first = op._schema.arguments[0] if op._schema.arguments else None
            alone = len(needed) == 1 and first in needed and str(first.type) == "Tensor"
            changes = first is not None and first.alias_info is not None and first.alias_info.is_write
            random = torch.Tag.nondeterministic_seeded in op.tags or "rand" in name or name.startswith("_fused")
            if alone and not random and (op.is_view if view else changes):
                yield op


def result(op: Any, t: Tensor) -> Any:
    try:
        return op(t)
    except Exception as e:  # whatever torch raises of arguments that do not suit it
        return e


def test_torchs_own_list_of_operators_that_write() -> None:
    case, done = CASES["turned"], 0
    for op in overloads(view=False):
        bank, plain = case.wrapped(), values(0, True)["w13"]
        with torch.no_grad():
            wanted, found = result(op, plain), result(op, bank.w13.data)
        if isinstance(found, Exception):
            assert isinstance(wanted, Exception) or isinstance(found, KernelError), (op, found)
            plain = values(0, True)["w13"]
        done += not isinstance(found, Exception)
        torch.testing.assert_close(bank.w13.values(), plain, rtol=0, atol=0, equal_nan=True, msg=str(op))
    assert done > 40


def test_torchs_own_list_of_views() -> None:
    case, done = CASES["turned"], 0
    for op in overloads(view=True):
        bank, plain = case.wrapped(), values(0, True)
        with torch.no_grad():
            wanted, found = result(op, plain["w13"]), result(op, bank.w13.data)
            if isinstance(wanted, Exception) or isinstance(found, KernelError):
                assert isinstance(found, Exception), op
                continue
            assert not isinstance(found, Exception), (op, found)
            for i, (a, b) in enumerate(zip(tree_leaves(found), tree_leaves(wanted), strict=True)):
                assert a.shape == b.shape, op
                if (
                    a.is_floating_point()
                    and b.untyped_storage().data_ptr() == plain["w13"].untyped_storage().data_ptr()
                ):
                    a.fill_(i)
                    b.fill_(i)
                    done += 1
        assert torch.equal(bank.w13.values(), plain["w13"]), op
    assert done > 5


# --- States, files, copies --------------------------------------------------------------------------------------------


def test_states(case: Case) -> None:
    bank, new = case.wrapped(), values(1, case.turned)
    state = bank.state_dict()
    assert {type(t) for t in state.values()} == {Tensor}
    assert all(torch.equal(state[name], tensor) for name, tensor in values(0, case.turned).items())
    assert {type(t) for t in nn.Sequential(bank).state_dict().values()} == {Tensor}
    assert all(t is getattr(bank, name) for name, t in bank.state_dict(keep_vars=True).items())
    parameters = dict(bank.named_parameters())
    assert not bank.load_state_dict(new).missing_keys
    case.check(bank, new)
    assert all(parameters[name] is p for name, p in bank.named_parameters())
    assert bank._ramp_moe.layer is bank._ramp_moe.current(), "in place"


def test_states_that_are_assigned(case: Case) -> None:
    """New parameters, of which a new layer is made at the next call."""
    bank, new = case.wrapped(), values(1, case.turned)
    bank.load_state_dict({name: tensor.clone() for name, tensor in new.items()}, assign=True)
    case.check(bank, new)


def test_files(case: Case) -> None:
    bank = case.wrapped()

    def saved(x: Any) -> Any:
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        return torch.load(file)

    for found in (
        saved(bank.state_dict()),
        saved(bank.state_dict(keep_vars=True)),
        saved(dict(bank.named_parameters())),
    ):
        assert not any(isinstance(t, Placeholder) for t in found.values())
        assert all(torch.equal(found[name], tensor) for name, tensor in values(0, case.turned).items())
    assert type(pickle.loads(pickle.dumps(bank.w13))) is nn.Parameter
    for dump in (saved, pickle.dumps):
        with pytest.raises(KernelError, match="cannot be pickled"):
            dump(bank)


def test_copies_of_the_module(case: Case) -> None:
    bank, before = case.wrapped(), values(0, case.turned)
    bank.w13.noted = "kept"
    other, new = copy.deepcopy(bank), values(1, case.turned)
    assert other.w13.noted == "kept"
    assert other._ramp_moe.layer is other._ramp_moe.current(), "nothing is built again"
    bank.load_state_dict(new)
    case.check(bank, new)
    case.check(other, before)
    other.load_state_dict(values(2, case.turned))
    case.check(other, values(2, case.turned))
    case.check(bank, new)
    other._ramp_moe.remove(other)
    assert [type(p) for p in other.parameters()] == [nn.Parameter] * 4
    assert all(torch.equal(getattr(other, n), t) for n, t in values(2, case.turned).items())
    case.check(bank, new)


def test_copies_of_a_parameter(case: Case) -> None:
    bank = case.wrapped()
    for alone in (copy.deepcopy(bank.w13), copy.copy(bank.w13)):
        assert type(alone) is nn.Parameter
        assert torch.equal(alone, values(0, case.turned)["w13"])
        with torch.no_grad():
            alone.zero_()
    case.check(bank, values(0, case.turned))


# --- Reads ------------------------------------------------------------------------------------------------------------


def test_reads(case: Case) -> None:
    bank, plain = case.wrapped(), values(0, case.turned)["w13"]
    p = bank.w13
    assert isinstance(p, nn.Parameter)
    assert (p.shape, p.dtype, p.device, p.requires_grad, p.is_leaf) == (
        plain.shape,
        plain.dtype,
        plain.device,
        True,
        True,
    )
    assert p.stride() == plain.stride()
    assert (p.is_meta, p.is_cpu, p.nbytes, p.element_size()) == (False, True, plain.nbytes, 2)
    for read in (
        lambda t: t.float(), lambda t: t @ t.transpose(1, 2), lambda t: t[3], lambda t: t[1:4, 2], lambda t: t.sum(0),
        lambda t: t.clone(), lambda t: torch.stack([t, t]), lambda t: t.to(torch.float16), lambda t: t[SOME],
        lambda t: torch.cat([t, t]), lambda t: t.contiguous().view(-1), lambda t: t.abs().max().item(),
        lambda t: torch.nn.functional.linear(X, t[2].reshape(-1, X.shape[1])), lambda t: t.detach().float().numpy(),
        lambda t: t.tolist(), lambda t: np.asarray(t.detach().float()),
    ):  # fmt: skip
        found, wanted = read(p), read(plain)
        found, wanted = (torch.as_tensor(x) for x in (found, wanted))
        assert torch.equal(found.detach().clone(), wanted)
    with pytest.raises(ValueError, match="read-only"):
        case.wrapped().w13.view(torch.int16).numpy()[:] = 0
    assert repr(p).startswith("Parameter(Placeholder(")


def test_gradients_of_what_is_computed_without_the_layer(case: Case) -> None:
    bank, plain = case.wrapped(), nn.Parameter(values(0, case.turned)["w13"])
    for p in (bank.w13, plain):
        (p[2].float() ** 2).sum().backward()
    assert bank.w13.grad is not None
    assert torch.equal(bank.w13.grad, plain.grad)
    for step, parameter in ((torch.optim.SGD, 0.5), (torch.optim.AdamW, 0.01)):
        for p in (bank.w13, plain):
            step([p], lr=parameter, foreach=True).step()
    assert torch.equal(bank.w13.detach().clone(), plain)
    case.check(bank, values(0, case.turned) | {"w13": plain.detach().clone()})


def test_what_cannot_be_followed_is_refused(case: Case) -> None:
    bank, before = case.wrapped(), values(0, case.turned)
    p, other = bank.w13, torch.zeros_like(before["w13"])
    for refused in (
        lambda: p.data_ptr(), lambda: p.untyped_storage(), lambda: p.storage(), lambda: p.share_memory_(),
        lambda: torch.from_dlpack(p.detach()), lambda: p.data.set_(other), lambda: p.data.resize_(0),
        lambda: p.data.as_strided((2,), (1,)), lambda: p.data.transpose_(0, 1), lambda: p.data.t_(),
        lambda: p.data.squeeze_(), lambda: setattr(p.data[0], "data", other[0, 0]),
        lambda: setattr(nn.Parameter(other), "data", p.data),
    ):  # fmt: skip
        with pytest.raises((KernelError, RuntimeError), match=r"of w13|share|t_\(\) expects|incompatible"):
            refused()
    case.check(bank, before)


def test_collectives_are_refused(case: Case) -> None:
    import torch.distributed as dist

    bank = case.wrapped()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(KernelError, match=r"c10d::broadcast_ needs the memory of w13: .* Read or write it with"):
            dist.broadcast(bank.w13.data, 0)
    finally:
        dist.destroy_process_group()


def test_views_of_a_model_that_was_unwrapped_since(case: Case) -> None:
    bank = case.wrapped()
    kept, part = bank.w13.data, bank.w13.data[2]
    bank._ramp_moe.remove(bank)
    for use in (lambda: kept.zero_(), lambda: part.copy_(part), lambda: kept.sum()):
        with pytest.raises(KernelError, match="w13 belongs to a model that was unwrapped"):
            use()


def test_a_call_computes_with_what_was_written(case: Case) -> None:
    bank = case.wrapped()
    with torch.no_grad():
        bank.w2.zero_()
        assert not bank(X, IDS, SCORES).any()
