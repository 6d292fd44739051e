"""Permuting tokens by expert, the activation on them and their weighted sum, against plain Python; interpreted without
a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_cases import ROUTINGS, batch
from ramp_moe.errors import KernelError
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels import reference
from ramp_moe_kernels.permute.permute import FUSED_IDS, PermutedTokens, capacity, permute
from ramp_moe_kernels.permute.unpermute import activate, unpermute
from test_quantise_combine import same_bits
from tiers import slow_except

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, HIDDEN = 6, 384
SIZES = [(1, 2), (17, 3)] + ([(700, 4), (4096, 2)] if DEVICE == "cuda" else [])


def poisoned() -> Workspace:
    """Whose buffers begin as NaN and as -1."""

    class Poisoned(Workspace):
        def get(self, name, shape, dtype, device):  # type: ignore[no-untyped-def]
            known = {key for key, _ in self._buffers}
            out = super().get(name, shape, dtype, device)
            if name not in known:
                (out.view(torch.uint8) if out.numel() else out).fill_(255)
            return out

    return Poisoned()


def rows_by_hand(given: Batch, block: int) -> tuple[dict[int, int], list[int]]:
    """(row by routed id, ends) as the docstring says."""
    ids = given.topk_ids.flatten().tolist()
    rows, ends, first = {}, [], 0
    for expert in range(EXPERTS):
        own = [i for i, e in enumerate(ids) if e == expert]
        rows.update({i: first + rank for rank, i in enumerate(own)})
        ends.append(first + len(own))
        first += -(-len(own) // block) * block
    return rows, ends


def check(given: Batch, block: int, fp8: bool) -> PermutedTokens:
    found = permute(given.hidden_states, given.topk_ids, EXPERTS, block, fp8, poisoned())
    rows, ends = rows_by_hand(given, block)
    assert found.ends.tolist() == ends
    index = found.row_of_id.tolist()
    assert {i: index[i] for i in rows} == rows
    assert found.values.shape[0] == capacity(given.topk_ids.numel(), EXPERTS, block) >= (max(ends) if rows else 0)
    tokens = torch.tensor([i // given.top_k for i in rows], device=DEVICE, dtype=torch.int64)
    at = torch.tensor(list(rows.values()), device=DEVICE, dtype=torch.int64)
    if fp8:
        q, scale = reference.quantise_activations(given.hidden_states)
        same_bits(found.values[at], q[tokens])
        assert found.scale is not None
        same_bits(found.scale.T[at], scale[tokens])
        untouched = torch.ones(len(found.values), dtype=torch.bool, device=DEVICE)
        untouched[at] = False
        assert (found.values.view(torch.uint8)[untouched] == 255).all()
    else:
        assert torch.equal(found.values[at], given.hidden_states[tokens])
    return found


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("routing", slow_except(["padded"], ROUTINGS))
@pytest.mark.parametrize(("tokens", "top_k"), SIZES)
def test_dispatch(tokens: int, top_k: int, routing: str, fp8: bool) -> None:
    given = batch(tokens, top_k, EXPERTS, HIDDEN, routing, DEVICE, torch.bfloat16)
    check(given, 64 if fp8 else 128, fp8)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [True, False])
def test_dispatch_of_many_ids(fp8: bool) -> None:
    tokens = FUSED_IDS // 8 + 3
    given = batch(tokens, 8, EXPERTS + 3, 128, "padded", DEVICE, torch.bfloat16)
    check(Batch(given.hidden_states, given.topk_ids, given.topk_weights), 64, fp8)


def test_no_id_is_in_range() -> None:
    given = batch(3, 2, EXPERTS, HIDDEN, "uniform", DEVICE, torch.bfloat16)
    found = check(Batch(given.hidden_states, torch.full_like(given.topk_ids, -1), given.topk_weights), 64, True)
    assert found.ends.tolist() == [0] * EXPERTS


def test_capacity() -> None:
    assert capacity(1, 64, 128) == 128
    assert capacity(64 * 8, 64, 64) == (64 + (512 - 64) // 64) * 64
    for ids, experts in ((0, 4), (2**21, 4), (4, 0), (4, 2000)):
        with pytest.raises(KernelError):
            capacity(ids, experts, 64)


LAYOUTS = ("gate-first", "gate-up-interleaved-8", "up-first")


def reordered(gate: torch.Tensor, up: torch.Tensor, layout: str) -> torch.Tensor:
    """Columns of gate and up in the order of a layout."""
    if layout == "gate-first":
        return torch.cat([gate, up], -1)
    if layout == "up-first":
        return torch.cat([up, gate], -1)
    parts = [t.unflatten(-1, (-1, 8)) for t in (gate, up)]
    return torch.stack(parts, -2).flatten(-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("layout", slow_except(LAYOUTS[1:2], LAYOUTS))
@pytest.mark.parametrize("inter", [128, 384])
def test_activate(inter: int, layout: str, fp8: bool, bias: bool) -> None:
    given = batch(9, 2, EXPERTS, HIDDEN, "padded", DEVICE, torch.bfloat16)
    rows = permute(given.hidden_states, given.topk_ids, EXPERTS, 64, False, Workspace())
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(len(rows.values), inter, generator=generator).bfloat16() for _ in range(2))
    b_gate, b_up = (torch.randn(EXPERTS, inter, generator=generator) for _ in range(2))
    values = reordered(gate, up, layout).to(DEVICE)
    biases = reordered(b_gate, b_up, layout).to(DEVICE) if bias else None
    act, scale = activate(values, biases, given.topk_ids, rows, fp8, layout, "swiglu", None, poisoned())
    by_hand, _ = rows_by_hand(given, 64)
    experts = given.topk_ids.flatten().tolist()
    for i, row in by_hand.items():
        g, u = gate[row].float(), up[row].float()
        if bias:
            g, u = g + b_gate[experts[i]], u + b_up[experts[i]]
        expected = g * torch.sigmoid(g) * u
        if fp8:
            assert scale is not None
            spread = act[row].float().cpu().view(-1, 128) * scale[:, row].cpu()[:, None]
            assert (spread.flatten() - expected).norm() < 0.04 * expected.norm()
        else:
            assert torch.allclose(act[row].float().cpu(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_combine(routing: str, bias: bool) -> None:
    given = batch(7, 3, EXPERTS, HIDDEN, routing, DEVICE, torch.bfloat16)
    rows = permute(given.hidden_states, given.topk_ids, EXPERTS, 64, False, Workspace())
    values = torch.full(rows.values.shape, torch.nan, dtype=torch.bfloat16)
    by_hand, _ = rows_by_hand(given, 64)
    generator = torch.Generator().manual_seed(0)
    biases = torch.randn(EXPERTS, HIDDEN, generator=generator) if bias else None
    expected = torch.zeros(7, HIDDEN)
    for i, row in by_hand.items():
        values[row] = torch.randn(HIDDEN, generator=generator).bfloat16()
        v = values[row].float()
        if biases is not None:
            v = v + biases[given.topk_ids.flatten()[i]]
        expected[i // 3] += given.topk_weights.flatten()[i].cpu() * v
    skipped = (given.topk_ids < 0) | (given.topk_ids >= EXPERTS)
    given.topk_weights[skipped] = torch.nan  # of an id that is skipped, nothing counts
    out = torch.full((7, HIDDEN), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    unpermute(values.to(DEVICE), None if biases is None else biases.to(DEVICE), given, rows, out)
    assert torch.allclose(out.float().cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_they_compile_for_an_h200() -> None:
    """In a process that knows nothing of the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_permute.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    assert all(of_kernel["bytes"] > 0 and of_kernel["shared"] <= 16384 for of_kernel in found.values())
