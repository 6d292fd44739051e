"""Packing, scales and rounding of every format, against plain arithmetic in numpy."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ramp_moe import MoEShape, ShapeError, UnknownNameError
from ramp_moe.spec.formats import FORMATS

torch = pytest.importorskip("torch")

from moe_cases import batch, error  # noqa: E402
from ramp_moe.profiler.bench import random_weights  # noqa: E402
from ramp_moe.runtime import formats  # noqa: E402
from ramp_moe.runtime.formats import check_symmetric, pack, per_row, powers_of_two, quantise, unpack  # noqa: E402
from ramp_moe.runtime.reference import LIMITS, misfit, reference  # noqa: E402
from ramp_moe.runtime.relayout import relayout  # noqa: E402
from ramp_moe.runtime.update import check_fits  # noqa: E402
from ramp_moe.spec.kernel import LAYOUTS  # noqa: E402
from ramp_moe.spec.launchable import MoEWeights  # noqa: E402

E, K, H, I = 5, 3, 256, 128  # noqa: E741
SCALED = [name for name, f in FORMATS.items() if f.scale is not None]
STORED = [name for name in SCALED if FORMATS[name].weights == name]
PACKED = [name for name in STORED if FORMATS[name].packed]


def drawn(name: str, layout: str = "gate-first", inter: int = I) -> MoEWeights:
    return relayout(random_weights(MoEShape(E, K, H, inter, name), "cpu", 3), layout)


# --- values, by the definitions -------------------------------------------------------------------------------------


def int4(code: int) -> float:
    return code - 8.0


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def values(w: torch.Tensor, name: str) -> np.ndarray:
    """float64 values of one expert's stored weights, element by element."""
    raw = w.view(torch.uint8).numpy()
    if FORMATS[name].element == "e4m3":
        return np.array([e4m3(b) for b in range(256)])[raw]
    of = np.array([(int4 if FORMATS[name].element == "int4" else e2m1)(c) for c in range(16)])
    out = np.empty((raw.shape[0], 2 * raw.shape[1]))
    for column in range(out.shape[1]):
        byte = raw[:, column // 2]
        out[:, column] = of[byte // 16 if column % 2 else byte % 16]
    return out


def plain(w: torch.Tensor, scale: torch.Tensor, name: str, matrices: int) -> np.ndarray:
    """float64 weights of one expert, times the scale of each."""
    out = values(w, name)
    rows, columns = out.shape[0] // matrices, out.shape[1]
    r, c = scale.shape[0] // matrices, scale.shape[1]
    factor = 2.0 ** (scale.numpy().astype(float) - 127) if scale.dtype == torch.uint8 else scale.double().numpy()
    row, column = np.arange(rows)[:, None], np.arange(columns)
    for matrix in range(matrices):
        out[matrix * rows + row, column] *= factor[matrix * r + row * r // rows, column * c // columns]
    return out


def computed(weights: MoEWeights, given: Any, rounded: bool = False) -> np.ndarray:
    """The layer in float64 of gate-first weights, one token and expert after the other."""

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    def fp8(v: np.ndarray) -> np.ndarray:
        """The row after a round trip through e4m3: a scale for 128 columns, or for all."""
        group = 128 if weights.stored.weights in ("fp8", "mxfp4") else len(v)
        out = v.astype(np.float32)
        for start in range(0, len(v), group):
            part = out[start : start + group]
            scale = np.float32(np.abs(part).max()) / np.float32(448)
            out[start : start + group] = torch.tensor(part / scale).to(torch.float8_e4m3fn).float().numpy() * scale
        return out.astype(float)

    name, x = weights.stored.weights, given.hidden_states.double().numpy()
    out = np.zeros_like(x)
    known = {}
    for t, slot in itertools.product(range(len(x)), range(given.topk_ids.shape[1])):
        e = int(given.topk_ids[t, slot])
        if not 0 <= e < E:
            continue
        if e not in known:
            known[e] = (
                plain(weights.gate_up[e], weights.gate_up_scale[e], name, 2),
                plain(weights.down[e], weights.down_scale[e], name, 1),
            )
        gate_up, down = known[e]
        gate, up = np.split(gate_up @ (fp8(x[t]) if rounded else x[t]), 2)
        h = silu(gate) * up
        out[t] += float(given.topk_weights[t, slot]) * (down @ (fp8(h) if rounded else h))
    return out


# --- packing ----------------------------------------------------------------------------------------------------------


def test_every_pair_of_codes_has_its_byte() -> None:
    pairs = torch.tensor(list(itertools.product(range(16), range(16))))
    packed = pack(pairs)
    assert packed.dtype == torch.uint8
    assert packed.flatten().tolist() == [first + 16 * second for first, second in pairs.tolist()]
    assert torch.equal(unpack(packed), pairs.to(torch.uint8))
    assert unpack(torch.arange(256, dtype=torch.uint8)[:, None]).tolist() == [[b % 16, b // 16] for b in range(256)]


def test_eight_in_an_int32_are_the_same_bytes() -> None:
    """compressed-tensors' pack-quantized order: the i-th of eight codes in bits 4 i to 4 i + 3."""
    codes = np.random.default_rng(0).integers(0, 16, (6, 64))
    words = np.zeros((6, 8), np.uint32)
    for i in range(8):
        words |= codes[:, i::8].astype(np.uint32) << np.uint32(4 * i)
    assert torch.equal(torch.from_numpy(words.view(np.int32)).view(torch.uint8), pack(torch.from_numpy(codes)))


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[1, 16]]), torch.tensor([[-1, 3]]), torch.ones(2, 3).int(), torch.ones(2)]
)
def test_what_cannot_be_packed(wrong: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"codes lie in|an even number of columns"):
        pack(wrong)


def test_every_code_has_its_value() -> None:
    for name, by_definition in (("int4", int4), ("e2m1", e2m1)):
        assert list(formats.CODES[name]) == [by_definition(code) for code in range(16)]
    assert math.copysign(1, formats.E2M1[8]) == -1
    every = torch.arange(256, dtype=torch.uint8)
    assert powers_of_two(every)[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert powers_of_two(every)[255].isnan()
    w = every.view(torch.float8_e4m3fn).float().tolist()
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(w, map(e4m3, range(256)), strict=True))


@pytest.mark.parametrize("name", STORED)
def test_weights_are_codes_times_their_scales(name: str) -> None:
    weights = drawn(name)
    stored = formats.format_of(weights)
    for w, scale, matrices in (
        (weights.gate_up[1], weights.gate_up_scale[1], 2),
        (weights.down[1], weights.down_scale[1], 1),
    ):
        got = formats.plain(w, scale, stored, matrices)
        assert np.allclose(got.double().numpy(), plain(w, scale, name, matrices), rtol=1e-6, atol=0)
        assert 0.5 < float(got.std()) * got.shape[1] ** 0.5 < 2, "as large as a trained layer's"


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_reference_is_the_layer_of_these_weights(name: str, rounded: bool) -> None:
    weights = drawn(name)
    for routing in ("skewed", "padded", "duplicates"):
        given = batch(4, K, E, H, routing, "cpu", torch.bfloat16)
        got = reference(weights, given, "fp8" if rounded else "bf16")
        wanted = torch.from_numpy(computed(weights, given, rounded))
        # A value between two fp8 numbers may go to either side, by the last bit of its sum.
        assert error(got, wanted) < (5e-3 if rounded else 1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_rounded_activations_keep_within_the_limits_of_formats_that_round(name: str) -> None:
    weights, given = drawn(name), batch(33, K, E, H, "uniform", "cpu", torch.bfloat16)
    exact, rounded = reference(weights, given), reference(weights, given, "fp8")
    assert 0.02 < error(rounded, exact) < LIMITS["fp8"]
    assert (misfit(rounded, exact, name) is None) == FORMATS[name].rounds, "A8 does not pass for A16"
    assert misfit(exact.bfloat16(), exact, name) is None
    with pytest.raises(UnknownNameError, match="rounding of activations"):
        reference(weights, given, "int8")


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_of_rows_is_the_same_layer(name: str, layout: str) -> None:
    given = batch(4, K, E, H, "uniform", "cpu", torch.bfloat16)
    weights = drawn(name, layout)
    assert torch.equal(reference(weights, given), reference(drawn(name), given))
    back = relayout(weights, "gate-first")
    assert torch.equal(back.gate_up.view(torch.uint8), drawn(name).gate_up.view(torch.uint8))
    assert torch.equal(back.gate_up_scale, drawn(name).gate_up_scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_for_each_row_instead_of_the_matrix(layout: str) -> None:
    weights, given = drawn("fp8-tensor", layout), batch(4, K, E, H, "uniform", "cpu", torch.bfloat16)
    rows = per_row(weights)
    assert rows.stored.name == "fp8-channel"
    assert rows.gate_up is weights.gate_up
    assert torch.equal(reference(rows, given), reference(weights, given))
    assert per_row(drawn("fp8-channel")).stored.name == "fp8-channel"
    assert per_row(replace(weights, activations="bf16")).stored.name == "fp8-channel-a16"


# --- rounding weights -------------------------------------------------------------------------------------------------

# Largest error of normal weights, relative to their root mean square; half of the first is too little for a mistake.
LOSSES = {"fp8": 0.03, "fp8-channel": 0.03, "fp8-tensor": 0.03, "int4-g32": 0.1, "int4-g128": 0.13, "mxfp4": 0.13}


@pytest.mark.parametrize("name", STORED)
def test_quantised_weights_are_the_nearest(name: str) -> None:
    w = torch.randn(2, 96, 256, generator=torch.Generator().manual_seed(1))
    stored, scale = quantise(w, name)
    assert scale.shape[-2:] == FORMATS[name].scale_shape(96, 256)
    got = torch.stack([formats.plain(stored[e], scale[e], FORMATS[name]) for e in range(2)])
    assert LOSSES[name] / 2 < error(got, w) < LOSSES[name]
    again, same = quantise(got, name)
    if name != "mxfp4":  # whose largest may have become 4, which has another power of two
        assert error(torch.stack([formats.plain(again[e], same[e], FORMATS[name]) for e in range(2)]), got) < 0.01
    if name in PACKED:
        codes = [float(v) for v in formats.CODES[FORMATS[name].element]]
        factor = powers_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
        each = 256 // scale.shape[-1]
        choices = torch.tensor(codes)[:, None] * factor[0, 5].repeat_interleave(each)
        assert torch.equal((got[0, 5] - w[0, 5]).abs(), (choices - w[0, 5]).abs().amin(0))


def test_zeros_and_formats_without_scales() -> None:
    for name in STORED:
        stored, scale = quantise(torch.zeros(1, 128, 128), name)
        assert not formats.plain(stored[0], scale[0], FORMATS[name]).any()
    with pytest.raises(ShapeError, match="bf16 has no scales"):
        quantise(torch.zeros(4, 4), "bf16")
    with pytest.raises(ShapeError, match="the number of columns 48 is not a multiple of the 32"):
        quantise(torch.zeros(4, 48), "mxfp4")


# --- bad input --------------------------------------------------------------------------------------------------------


def given(name: str, **changed: Any) -> dict[str, Any]:
    w = drawn(name)
    fields = {f: getattr(w, f) for f in ("gate_up", "down", "gate_up_scale", "down_scale")}
    return {**fields, "format": name, **changed}


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


WRONG = {
    "no format": (given("int4-g32", format=None), "gate_up is torch.uint8, packed weights; say what they are: format="),
    "floats as int4": (
        given("int4-g32", gate_up=torch.zeros(E, 2 * I, H).bfloat16()),
        "int4-g32 weights are packed in uint8 or int32, gate_up is torch.bfloat16; pack codes of 0 to 15 with",
    ),
    "unpacked": (
        given("mxfp4", gate_up=torch.zeros(E, 2 * I, H, dtype=torch.uint8)),
        "down must be [5, 512, 64], not [5, 256, 64]",
    ),
    "packed as fp8": (given("mxfp4", format="fp8-channel"), "fp8-channel weights are e4m3, gate_up is torch.uint8"),
    "group of 64": (
        given("int4-g32", gate_up_scale=scales(E, 2 * I, 4)),
        "gate_up_scale must be [5, 256, 8], not [5, 256, 4]; these scales are of 64 columns each: no format has them",
    ),
    "group of 128 as 32": (
        given("int4-g128", format="int4-g32"),
        "gate_up_scale must be [5, 256, 8], not [5, 256, 2]; these scales are of 128 columns each: give "
        "format='int4-g128'",
    ),
    "scales transposed": (
        given("int4-g32", gate_up_scale=scales(E, 8, 2 * I)),
        "gate_up_scale must be [5, 256, 8], not [5, 8, 256]; call .transpose(1, 2) on it",
    ),
    "channel scales without an axis": (
        given("fp8-channel", gate_up_scale=torch.ones(E, 2 * I)),
        "gate_up_scale must be [5, 256, 1], not [5, 256]; call .unsqueeze(-1) on it",
    ),
    "one scale for gate and up": (
        given("fp8-tensor", gate_up_scale=torch.ones(E, 1, 1)),
        "gate_up_scale must be [5, 2, 1], not [5, 1, 1]; gate and up have a scale each: repeat it",
    ),
    "flat tensor scale": (
        given("fp8-tensor", down_scale=torch.ones(E)),
        "down_scale must be [5, 1, 1], not [5]; view it so",
    ),
    "float scales of mxfp4": (
        given("mxfp4", gate_up_scale=scales(E, 2 * I, 8)),
        "gate_up_scale must be uint8 or float8_e8m0fnu, not torch.bfloat16",
    ),
    "e4m3 scales": (
        given("mxfp4", gate_up_scale=scales(E, 2 * I, 8).to(torch.float8_e4m3fn)),
        "gate_up_scale must be uint8 or float8_e8m0fnu, not torch.float8_e4m3fn",
    ),
    "integer scales of int4": (
        given("int4-g32", down_scale=scales(E, H, 4, dtype=torch.uint8)),
        "down_scale must be float32, bf16 or fp16, not torch.uint8",
    ),
    "half-quantised": (
        given("int4-g32", down=torch.zeros(E, H, I).bfloat16()),
        "gate_up is torch.uint8, down torch.bfloat16: a layer's weights are of one format; quantise or dequantise one",
    ),
    "packed in two ways": (
        given("int4-g32", down=torch.zeros(E, H, I // 8, dtype=torch.int32)),
        "gate_up is torch.uint8, down torch.int32: a layer's weights are of one format",
    ),
    "no scale": (given("mxfp4", down_scale=None), "mxfp4 weights need down_scale, e8m0 [5, 256, 4]"),
    "uneven groups": (
        {
            "gate_up": torch.zeros(E, 96, 64, dtype=torch.uint8),
            "down": torch.zeros(E, 128, 24, dtype=torch.uint8),
            "format": "mxfp4",
        },
        "mxfp4 weights: intermediate_size 48 is not a multiple of the 32 weights that share a scale",
    ),
    "activations of bf16": (
        {"gate_up": torch.zeros(E, 2 * I, H).bfloat16(), "down": torch.zeros(E, H, I).bfloat16(), "activations": "fp8"},
        "bf16 weights take activations as they are",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit(case: str) -> None:
    fields, message = WRONG[case]
    with pytest.raises(ShapeError, match="^" + re.escape(message)):
        MoEWeights(**fields)


@pytest.mark.parametrize("name", PACKED)
def test_int32_and_e8m0_are_views_of_the_same_memory(name: str) -> None:
    bytes_ = drawn(name)
    words = [t.view(torch.int32) for t in (bytes_.gate_up, bytes_.down)]
    scale = bytes_.gate_up_scale, bytes_.down_scale
    if name == "mxfp4":
        scale = tuple(s.view(torch.float8_e8m0fnu) for s in scale)
    made = MoEWeights(*words, *scale, format=name)
    assert made.gate_up.dtype == torch.uint8
    assert made.gate_up.data_ptr() == bytes_.gate_up.data_ptr()
    assert made.shape(K) == bytes_.shape(K) == MoEShape(E, K, H, I, name)
    assert torch.equal(made.gate_up_scale, bytes_.gate_up_scale)


@pytest.mark.parametrize("name", SCALED)
def test_the_shape_says_what_activations_may_be_rounded_to(name: str) -> None:
    weights = drawn(name)
    assert weights.stored is FORMATS[name]
    assert weights.shape(K) == MoEShape(E, K, H, I, name)
    other = "bf16" if FORMATS[name].rounds else "fp8"
    assert replace(weights, activations=other).shape(K) != weights.shape(K)


def test_new_weights_of_another_format_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="the layer holds int4-g32 weights, the new ones are mxfp4"):
        check_fits(drawn("int4-g32"), drawn("mxfp4"))
    check_fits(drawn("int4-g32-a8"), drawn("int4-g32"))


def test_zero_points_and_reordered_columns_are_refused() -> None:
    eight = torch.full((E, H // 8, 4), 0x88888888 - 2**32, dtype=torch.int32)
    order = torch.arange(H).repeat(E, 1) // 32
    check_symmetric("w2", 32, eight, order)
    check_symmetric("w2", 32, None, torch.empty(E, 0))
    with pytest.raises(ShapeError, match="w2 has zero points other than 8"):
        check_symmetric("w2", 32, eight + 1)
    with pytest.raises(ShapeError, match="w2 has its columns reordered"):
        check_symmetric("w2", 32, None, order.flip(-1))
