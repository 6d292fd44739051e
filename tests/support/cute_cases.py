"""Torch operations that replace the compiled functions of the fused kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cute_signature import SIGNATURE
from ramp_moe_kernels import reference
from ramp_moe_kernels.cute.config import Config
from torch import Tensor

CONTIGUOUS = {"gate_up": 3, "gate_up_scale": 2, "down": 1, "down_scale": 1}
"""The dimension along which elements are contiguous, if it is not the last."""
INT32 = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "choice")


def check_arguments(config: Config, arguments: dict[str, object]) -> None:
    """Check the arguments as tvm-ffi does, and the alignment that the kernel was compiled for."""
    sizes: dict[str, int] = {}
    element = torch.float8_e4m3fn if config.dtype == "fp8" else torch.bfloat16
    dtypes = dict.fromkeys(("x", "gate_up", "down"), element) | dict.fromkeys(INT32, torch.int32)
    dtypes["out"] = torch.float32 if config.combine == "f32" else torch.bfloat16
    for name, dims in SIGNATURE.items():
        value = arguments[name]
        if not dims:
            assert isinstance(value, int), name
            continue
        assert isinstance(value, Tensor), name
        assert value.dtype == dtypes.get(name, torch.float32), name
        assert value.ndim == len(dims.split()), name
        for dim, size in zip(dims.split(), value.shape, strict=True):
            assert sizes.setdefault(dim, int(dim) if dim.isdigit() else size) == size, f"{name}: {dim}"
        along = CONTIGUOUS.get(name, value.ndim - 1)
        assert value.stride(along) == 1, name
        if name in ("x", "gate_up", "down", "out"):
            others = [s for i, s in enumerate(value.stride()) if i != along]
            assert not any(n * value.itemsize % 16 for n in (*others, value.data_ptr())), name


def emulated(config: Config) -> Callable[..., None]:
    """A stand-in for the compiled function of a configuration, for tensors on any device, with the same roundings."""

    def function(*given: object) -> None:
        named = dict(zip(SIGNATURE, given, strict=True))
        check_arguments(config, named)
        chosen = config
        if config.smaller:
            at = int(named["blocks"]) >> 4 * int(named["choice"]) & 15
            chosen = config.of(config.blocks[at])
        _compute(chosen, **{name: value for name, value in named.items() if name not in ("choice", "blocks")})

    return function


def _compute(
    c: Config, x: Tensor, x_scale: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor,
    out: Tensor, sorted_token_ids: Tensor, expert_ids: Tensor, num_tokens_post_padded: Tensor, routing: Tensor,
    top_k: int, tiles: int, up_first: int,
) -> None:  # fmt: skip
    hidden, inter, _ = down.shape
    fp8, ids = c.dtype == "fp8", len(x) * top_k
    assert not inter % (128 * c.wide)
    x = x.float() * (x_scale.repeat_interleave(128, 1) if fp8 else 1)
    used = int(num_tokens_post_padded) // c.block_m
    assert used <= min(tiles, len(expert_ids), len(sorted_token_ids) // c.block_m)
    for tile in range(used):
        e = int(expert_ids[tile])
        own = sorted_token_ids[tile * c.block_m : (tile + 1) * c.block_m].long()
        own = own[own < ids]
        token, rows = own // top_k, gate_up[..., e].float().permute(1, 2, 0, 3).reshape(2, inter, hidden)
        w2 = down[..., e].float()
        if fp8:
            rows = rows * _blocks(gate_up_scale[..., e])
            w2 = w2 * _blocks(down_scale[..., e])
        gate, up = (x[token] @ rows[i].T for i in (up_first, 1 - up_first))
        h = torch.nn.functional.silu(gate) * up
        if fp8:
            values, scale = reference.quantise_activations(h)
            h = values.float() * scale.repeat_interleave(128, 1)
        else:
            h = h.bfloat16().float()
        for part in range(inter // (128 * c.wide)):
            own_columns = slice(part * 128 * c.wide, (part + 1) * 128 * c.wide)
            y = h[:, own_columns] @ w2[:, own_columns].T * routing[own, None]
            if c.combine == "rows":
                out[part * ids + own] = y.bfloat16()
            else:
                out.index_put_((token,), y.to(out.dtype), accumulate=True)


def _blocks(scale: Tensor) -> Tensor:
    return scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
