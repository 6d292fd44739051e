"""The oracle itself, against loops in float64 that share no code with it, and against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ramp_moe import KernelError, RoutingError, ShapeError, UnknownNameError
from ramp_moe.spec.launchable import ACTIVATIONS

torch = pytest.importorskip("torch")
formats = pytest.importorskip("ramp_moe.runtime.formats")
reference = pytest.importorskip("ramp_moe_kernels.reference")

NAN, INF = math.nan, math.inf


def relative_error(out, expected) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


# --- fp8: a table of its values, and a search in it ------------------------------------------------------------------


def e4m3_values() -> list[float]:
    """The 127 numbers >= 0, in order of their codes: 4 exponent bits of bias 7, 3 mantissa bits, 0x7F is NaN."""
    codes = ((code >> 3, code & 7) for code in range(127))
    return [(8 + m) * 2.0 ** (e - 10) if e else m * 2.0**-9 for e, m in codes]


def e4m3_round(x: np.ndarray) -> np.ndarray:
    table, codes = np.array(e4m3_values()), np.arange(127)
    distance = np.abs(np.abs(x)[:, None] - table)
    nearest = distance == distance.min(1, keepdims=True)  # two of them on a tie, which goes to the even code
    return np.copysign(table[np.where(nearest, codes % 2, 2).argmin(1)], x)


def through_fp8(row: np.ndarray) -> np.ndarray:
    out = np.empty(len(row))
    for start in range(0, len(row), 128):
        group = row[start : start + 128]
        scale = max(np.abs(group).max(), 1e-10) / 448
        out[start : start + 128] = e4m3_round(group / scale) * scale
    return out


def test_rounding_is_to_nearest_even_and_saturates() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.float().tolist() == e4m3_values()
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([448.0, 17, 19, -17, 2.0**-10, 3 * 2.0**-10, 1.0625, 440])
    values, scale = reference.quantise_activations(x)
    assert scale.tolist() == [[1.0]]
    assert values.float()[0, :8].tolist() == [448, 16, 20, -16, 0, 2.0**-8, 1, 448]


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6])
def test_activations_follow_the_table(spread: float) -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * spread
    x[1, :128] = 0
    values, scale = reference.quantise_activations(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (3, 2)
    assert scale.dtype == torch.float32
    expected = np.stack([through_fp8(row) for row in x.double().numpy()])
    assert relative_error(values.float() * scale.repeat_interleave(128, -1), expected) < 1e-6
    assert not values[1, :128].float().any()


def test_a_nan_or_inf_spoils_its_own_group_only() -> None:
    x = torch.randn(3, 384)
    clean, clean_scale = reference.quantise_activations(x)
    x[0, 130], x[2, 5] = NAN, INF
    values, scale = reference.quantise_activations(x)
    spoilt = torch.zeros(3, 3, dtype=torch.bool)
    spoilt[0, 1] = spoilt[2, 0] = True
    plain = (values.float().reshape(3, 3, 128) * scale[..., None]).isnan().any(-1)
    assert torch.equal(plain, spoilt)
    assert torch.equal(scale[~spoilt], clean_scale[~spoilt])
    same = values.float().reshape(3, 3, 128) == clean.float().reshape(3, 3, 128)
    assert same[~spoilt].all()


def test_weights_have_a_scale_a_block() -> None:
    w = torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(1))
    w[1, 128:, :128] *= 100
    values, scale = reference.quantise_weights(w)
    assert values.shape == w.shape
    assert scale.shape == (2, 2, 3)
    plain = formats.dequantise(values, scale)
    assert plain.dtype == torch.float32
    for e, r, c in np.ndindex(2, 2, 3):
        block = w[e, 128 * r : 128 * (r + 1), 128 * c : 128 * (c + 1)]
        out = plain[e, 128 * r : 128 * (r + 1), 128 * c : 128 * (c + 1)]
        assert float(scale[e, r, c]) == pytest.approx(float(block.abs().max()) / 448)
        # half a step of three mantissa bits, or of the smallest exponent
        assert ((out - block).abs() <= block.abs() / 16 * 1.0001 + 2.0**-10 * scale[e, r, c]).all()
        assert float(out.abs().max()) == pytest.approx(float(block.abs().max()))
    flat, flat_scale = reference.quantise_weights(w[1])
    assert torch.equal(flat.float(), values[1].float())
    assert torch.equal(formats.dequantise(flat, flat_scale), plain[1])


@pytest.mark.parametrize(("block", "last_row", "last_column"), [(128, 128, 0), (64, 192, 64)])
def test_the_last_block_may_be_short(block: int, last_row: int, last_column: int) -> None:
    w = torch.randn(2, 200, 80, generator=torch.Generator().manual_seed(1))
    values, scale = reference.quantise_weights(w, block)
    assert scale.shape == (2, -(-200 // block), -(-80 // block))
    assert torch.equal(scale[:, -1, -1], w[:, last_row:, last_column:].abs().amax((1, 2)) / 448)
    plain = formats.dequantise(values, scale, block)
    assert ((plain - w).abs() <= w.abs() / 16 * 1.0001 + 2.0**-10 * scale.amax()).all()
    of_groups = reference.quantise_activations(w[0], block)[1]
    assert of_groups.shape == (200, -(-80 // block))
    assert torch.equal(of_groups[:, -1], w[0, :, last_column:].abs().amax(1) / 448)


def test_a_scale_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"must be \[1, 2\], not \[2, 1\]"):
        formats.dequantise(torch.zeros(128, 256).to(torch.float8_e4m3fn), torch.ones(2, 1))


# --- Routing ---------------------------------------------------------------------------------------------------------


def brute_route(row, top_k, scoring, bias, num_groups, topk_groups, renormalise, scale):
    """ids and weights of one token, in Python floats."""
    logits = [float(v) for v in row]
    size = len(logits) // num_groups
    if scoring == "softmax":
        total = sum(math.exp(v - max(logits)) for v in logits)
        scores = [math.exp(v - max(logits)) / total for v in logits]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    merit = scores if bias is None else [s + float(b) for s, b in zip(scores, bias, strict=True)]
    worth = []
    for g in range(num_groups):
        members = sorted(merit[g * size : (g + 1) * size], reverse=True)
        worth.append(members[0] if bias is None else sum(members[:2]))
    groups = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:topk_groups]
    candidates = [e for e in range(len(logits)) if e // size in groups]
    ids = sorted(candidates, key=lambda e: (-merit[e], e))[:top_k]
    weights = [scores[e] for e in ids]
    if renormalise:
        weights = [w / sum(weights) for w in weights]
    return ids, [w * scale for w in weights]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, 1), (4, 2), (4, 4), (6, 5), (24, 9)])
@pytest.mark.parametrize("renormalise", [False, True])
def test_route_against_a_loop(scoring, biased, num_groups, topk_groups, renormalise) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 24, generator=generator) * 2
    bias = torch.randn(24, generator=generator) / 4 if biased else None
    groups = {"num_groups": num_groups, "topk_groups": topk_groups}
    how = {"scoring": scoring, "renormalise": renormalise, "scale": 2.5, **groups}
    ids, weights = reference.route(logits, 7, bias=bias, **how)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    for row, got, got_weights in zip(logits, ids, weights, strict=True):
        expected, expected_weights = brute_route(row, 7, bias=bias, **how)
        assert got.tolist() == expected
        assert got_weights.tolist() == pytest.approx(expected_weights, rel=1e-5)


def one(logits, top_k, **how):
    ids, weights = reference.route(torch.tensor([logits]), top_k, **how)
    return ids[0].tolist(), weights[0].tolist()


def test_softmax_by_hand() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert one(logits, 2, renormalise=False) == ([1, 3], pytest.approx([0.4, 0.3]))
    assert one(logits, 2) == ([1, 3], pytest.approx([4 / 7, 3 / 7]))
    assert one(logits, 2, scale=7.0) == ([1, 3], pytest.approx([4, 3]))


def test_sigmoid_and_bias_by_hand() -> None:
    logits = [math.log(p / (1 - p)) for p in (0.8, 0.5, 0.6, 0.1)]
    assert one(logits, 2, scoring="sigmoid", renormalise=False) == ([0, 2], pytest.approx([0.8, 0.6]))
    # the bias lifts expert 3 to first place, whose weight stays 0.1
    biased = one(logits, 2, scoring="sigmoid", bias=torch.tensor([0.0, 0, 0, 1]), renormalise=False)
    assert biased == ([3, 0], pytest.approx([0.1, 0.8]))
    renormalised = one(logits, 2, scoring="sigmoid", bias=torch.tensor([0.0, 0, 0, 1]), scale=2.0)
    assert renormalised == ([3, 0], pytest.approx([2 / 9, 16 / 9]))


def test_a_group_is_worth_its_best_or_with_a_bias_its_two_best() -> None:
    logits = [math.log(p / (1 - p)) for p in (0.9, 0.1, 0.2, 0.6, 0.7, 0.3)]
    how = {"scoring": "sigmoid", "num_groups": 2, "topk_groups": 1, "renormalise": False}
    assert one(logits, 2, **how) == ([0, 2], pytest.approx([0.9, 0.2]))  # 0.9 against 0.7
    assert one(logits, 2, bias=torch.zeros(6), **how) == ([4, 3], pytest.approx([0.7, 0.6]))  # 1.1 against 1.3


def test_ties_go_to_the_lowest_index() -> None:
    assert one([1.0, 2, 2, 1, 2, 1], 5)[0] == [1, 2, 4, 0, 3]
    assert one([0.0, -0.0, 0.0], 3)[0] == [0, 1, 2]
    assert one([0.0] * 8, 3, num_groups=4, topk_groups=2, bias=torch.zeros(8))[0] == [0, 1, 2]
    # groups 1 and 2 tie for the second place
    assert one([9.0, 0, 5, 1, 5, 2], 3, num_groups=3, topk_groups=2)[0] == [0, 2, 3]
    # sigmoid(20) and sigmoid(30) are one number in float32, as they are to torch.topk in the models' code
    assert one([20.0, 30.0, 0.0], 2, scoring="sigmoid")[0] == [0, 1]
    assert one([0.0, 20.0, 30.0], 2, scoring="sigmoid")[0] == [1, 2]


def test_nan_stays_in_its_token_and_ids_stay_distinct() -> None:
    clean = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    for scoring in ("softmax", "sigmoid"):
        for bias in (None, torch.zeros(8)):
            for groups in ({}, {"num_groups": 4, "topk_groups": 2}):
                logits = clean.clone()
                logits[1, 5] = NAN
                expected, expected_weights = reference.route(clean, 3, scoring=scoring, bias=bias, **groups)
                ids, weights = reference.route(logits, 3, scoring=scoring, bias=bias, **groups)
                assert torch.equal(ids[[0, 2]], expected[[0, 2]])
                assert torch.equal(weights[[0, 2]], expected_weights[[0, 2]])
                assert len(set(ids[1].tolist())) == 3
                assert 0 <= int(ids.min()) <= int(ids.max()) < 8
                assert weights[1].isnan().any()
    assert one([NAN] * 4, 4)[0] == [0, 1, 2, 3]


def test_experts_outside_the_chosen_groups_stay_out_behind_minus_infinity() -> None:
    bias = torch.tensor([0.0, 0, 5, -INF, 0, 0])
    assert one([0.0] * 6, 2, num_groups=3, topk_groups=1, bias=bias)[0] == [0, 1]
    assert one([0.0] * 6, 4, num_groups=3, topk_groups=2, bias=bias)[0] == [0, 1, 4, 5]
    only = torch.tensor([-INF, -INF, -INF, 0.0])
    assert one([0.0] * 4, 2, num_groups=2, topk_groups=1, bias=only)[0] == [0, 1]  # both worth -inf: the first
    assert one([-INF, -INF, 1.0], 3)[0] == [2, 0, 1]


def test_weights_that_underflow_are_zero_when_renormalised() -> None:
    assert one([-200.0, -300.0], 2, scoring="sigmoid") == ([0, 1], [0.0, 0.0])


def test_route_of_no_tokens_is_empty() -> None:
    ids, weights = reference.route(torch.zeros(0, 8), 2, num_groups=4, topk_groups=2)
    assert ids.shape == weights.shape == (0, 2)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"top_k": 9}, ShapeError, r"\[1, 8\]"),
        ({"top_k": 0}, ShapeError, r"\[1, 8\]"),
        ({"num_groups": 3}, ShapeError, "do not divide into 3 groups"),
        ({"num_groups": 4, "topk_groups": 5}, ShapeError, "topk_groups"),
        ({"num_groups": 4, "topk_groups": 1, "top_k": 3}, ShapeError, "exceeds the 2 experts of 1 groups"),
        ({"bias": "wrong"}, ShapeError, r"must be \[8\], not \[7\]"),
        ({"scoring": "sigmod"}, UnknownNameError, "sigmoid"),
    ],
)
def test_route_refuses(how, error, message) -> None:
    how = {"top_k": 2} | how
    if "bias" in how:
        how["bias"] = torch.zeros(7)
    with pytest.raises(error, match=message):
        reference.route(torch.zeros(3, 8), **how)


# --- Experts ---------------------------------------------------------------------------------------------------------


LIMIT = 2.5
"""Of swiglu_clamped."""


def limit_of(activation: str) -> dict[str, float]:
    return {"limit": LIMIT} if activation == "swiglu_clamped" else {}


def brute_activation(gate: float, up: float, kind: str) -> float:
    if kind == "swiglu":
        return gate / (1 + math.exp(-gate)) * up
    if kind == "gelu_tanh":
        return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if kind == "swiglu_clamped":
        return brute_activation(min(gate, LIMIT), max(-LIMIT, min(up, LIMIT)), "swiglu")
    gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
    return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)


def brute_experts(x, gate_up, down, ids, weights, activation, gate_up_bias, down_bias, quantise) -> np.ndarray:
    """One token, one expert, one intermediate after the other; float64; weights already dequantised."""
    inter, num_experts = down.shape[2], len(down)
    out = np.zeros(x.shape)
    for t, slot in np.ndindex(ids.shape):
        e = ids[t, slot]
        if e in (-1, num_experts):
            continue
        row = through_fp8(x[t]) if quantise else x[t]
        h = np.empty(inter)
        for i in range(inter):
            gate, up = gate_up[e, i] @ row, gate_up[e, inter + i] @ row
            if gate_up_bias is not None:
                gate, up = gate + gate_up_bias[e, i], up + gate_up_bias[e, inter + i]
            h[i] = brute_activation(gate, up, activation)
        y = down[e] @ (through_fp8(h) if quantise else h)
        if down_bias is not None:
            y = y + down_bias[e]
        out[t] += weights[t, slot] * y
    return out


def layer(tokens, num_experts, top_k, hidden, inter, dtype, seed=0):
    """x, gate_up, down, ids with skipped and repeated experts, weights, and the two biases."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    # large enough for the clamps of swiglu_oai and swiglu_clamped to bite
    gate_up = (torch.randn(num_experts, 2 * inter, hidden, generator=g) * 5 / hidden**0.5).to(dtype)
    down = (torch.randn(num_experts, hidden, inter, generator=g) / inter**0.5).to(dtype)
    ids = torch.randint(0, num_experts, (tokens, top_k), generator=g).int()
    weights = torch.rand(tokens, top_k, generator=g)
    biases = torch.randn(num_experts, 2 * inter, generator=g), torch.randn(num_experts, hidden, generator=g)
    return x, gate_up, down, ids, weights, *biases


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_experts_against_loops(activation, dtype, biased) -> None:
    x, gate_up, down, ids, weights, gate_up_bias, down_bias = layer(9, 5, 3, 12, 10, dtype)
    ids[0, 1], ids[3], ids[4, 0], ids[5, 2] = -1, torch.tensor([5, -1, 5]), 5, -1
    weights[0, 1] = NAN  # the weight of a skipped id is not looked at
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias} if biased else {}
    out = reference.experts(x, gate_up, down, ids, weights, activation=activation, **limit_of(activation), **biases)
    as_64 = [None if b is None else b.double().numpy() for b in (biases.get("gate_up_bias"), biases.get("down_bias"))]
    plain = [t.double().numpy() for t in (x, gate_up, down)]
    expected = brute_experts(*plain, ids.numpy(), weights.double().numpy(), activation, *as_64, quantise=False)
    assert (out.dtype, out.shape) == (torch.float32, x.shape)
    assert relative_error(out, expected) < 2e-6
    assert not out[3].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_experts_against_loops(activation, quantise, biased) -> None:
    x, gate_up, down, ids, weights, gate_up_bias, down_bias = layer(3, 3, 2, 256, 128, torch.bfloat16, seed=1)
    ids[1, 0] = 3
    gate_up, gate_up_scale = reference.quantise_weights(gate_up)
    down, down_scale = reference.quantise_weights(down)
    biases = (gate_up_bias, down_bias) if biased else (None, None)
    scales = {"gate_up_scale": gate_up_scale, "down_scale": down_scale}
    how = {"activation": activation, "gate_up_bias": biases[0], "down_bias": biases[1], "quantise": quantise}
    out = reference.experts(x, gate_up, down, ids, weights, **scales, **how, **limit_of(activation))
    plain = [
        values.double().numpy() * np.kron(scale.double().numpy(), np.ones((1, 128, 128)))
        for values, scale in ((gate_up, gate_up_scale), (down, down_scale))
    ]
    as_64 = [None if b is None else b.double().numpy() for b in biases]
    tail = (ids.numpy(), weights.double().numpy(), activation, *as_64)
    expected = brute_experts(x.double().numpy(), *plain, *tail, quantise=quantise)
    # an intermediate on the edge between two fp8 values may fall either way
    assert relative_error(out, expected) < (1e-3 if quantise else 2e-6)
    if quantise:
        exact = brute_experts(x.double().numpy(), *plain, *tail, quantise=False)
        assert 1e-3 < relative_error(out, exact) < 6e-2


def test_ids_of_64_bits_and_duplicates_add_up() -> None:
    x, gate_up, down, _, _, _, _ = layer(4, 3, 2, 8, 6, torch.float32)
    twice = reference.experts(x, gate_up, down, torch.full((4, 2), 1), torch.tensor([[0.25, 0.5]] * 4))
    once = reference.experts(x, gate_up, down, torch.full((4, 1), 1, dtype=torch.int32), torch.full((4, 1), 0.75))
    assert relative_error(twice, once) < 1e-6


def test_nan_inputs_stay_in_their_tokens() -> None:
    x, gate_up, down, ids, weights, _, _ = layer(6, 3, 2, 128, 128, torch.float32)
    clean = reference.experts(x, gate_up, down, ids, weights, quantise=True)
    x[2, 7] = NAN
    out = reference.experts(x, gate_up, down, ids, weights, quantise=True)
    others = [0, 1, 3, 4, 5]
    assert out[2].isnan().all()
    assert relative_error(out[others], clean[others]) < 1e-6


def test_experts_of_no_tokens_is_empty() -> None:
    _, gate_up, down, _, _, _, _ = layer(1, 3, 2, 8, 6, torch.float32)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    assert reference.experts(torch.zeros(0, 8), gate_up, down, ids, torch.zeros(0, 2)).shape == (0, 8)


@pytest.mark.parametrize("bad", [-2, 4, 1 << 30])
def test_experts_refuse_ids_out_of_range(bad) -> None:
    x, gate_up, down, ids, weights, _, _ = layer(4, 3, 2, 8, 6, torch.float32)
    ids[2, 1] = bad
    with pytest.raises(RoutingError, match=rf"expert id {bad} is outside \[0, 3\)"):
        reference.experts(x, gate_up, down, ids, weights)
    with pytest.raises(RoutingError, match="integers"):
        reference.experts(x, gate_up, down, ids.float(), weights)


def test_experts_refuse_tensors_that_do_not_fit() -> None:
    x, gate_up, down, ids, weights, gate_up_bias, down_bias = layer(4, 3, 2, 128, 128, torch.float32)
    good = {"x": x, "gate_up": gate_up, "down": down, "topk_ids": ids, "topk_weights": weights}
    fp8, scale = reference.quantise_weights(gate_up)
    wrong = [
        ({"x": x[:, :64]}, ShapeError, "do not fit"),
        ({"x": x[:3]}, ShapeError, r"topk_ids must be \[3, top_k\]"),
        ({"x": x[0]}, ShapeError, "x must be"),
        ({"down": down[:2]}, ShapeError, "do not fit"),
        ({"topk_weights": weights[:, :1]}, ShapeError, r"topk_weights must be \[4, 2\]"),
        ({"gate_up_bias": gate_up_bias[:, 1:]}, ShapeError, "gate_up_bias"),
        ({"down_bias": down_bias[:2]}, ShapeError, "down_bias"),
        ({"gate_up": fp8}, KernelError, "pass gate_up_scale"),
        ({"gate_up": fp8, "gate_up_scale": scale[:2]}, ShapeError, r"gate_up_scale must be \[3, 2, 1\]"),
        ({"activation": "swigloo"}, UnknownNameError, "swiglu"),
        ({"activation": "swiglu_clamped"}, KernelError, "swiglu_clamped needs a limit"),
        ({"layout": "up-fist"}, UnknownNameError, "up-first"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            reference.experts(**(good | change))


def test_shared_expert() -> None:
    x, gate_up, down, _, _, _, _ = layer(4, 1, 1, 8, 6, torch.bfloat16)
    for activation in ACTIVATIONS:
        plain = [t.double().numpy() for t in (x, gate_up, down)]
        ones = np.ones((4, 1))
        expected = brute_experts(*plain, np.zeros((4, 1), int), ones, activation, None, None, quantise=False)
        out = reference.shared(x, gate_up[0], down[0], activation, **limit_of(activation))
        assert relative_error(out, expected) < 2e-6
        gate_weight = torch.linspace(-1, 1, 8)
        how = {"activation": activation, **limit_of(activation)}
        gated = reference.shared(x, gate_up[0], down[0], gate_weight=gate_weight, **how)
        gate = 1 / (1 + np.exp(-(plain[0] @ gate_weight.double().numpy())))
        assert relative_error(gated, gate[:, None] * expected) < 2e-6
        assert torch.equal(gated, reference.shared(x, gate_up[0], down[0], gate_weight=gate_weight[None], **how))
    with pytest.raises(ShapeError, match="gate_weight"):
        reference.shared(x, gate_up[0], down[0], gate_weight=torch.zeros(7))
    with pytest.raises(ShapeError, match=r"gate_up_scale must have as many rows for each of 2, not \[3, 1\]"):
        reference.shared(x, gate_up[0], down[0], gate_up_scale=torch.ones(3, 1))


def test_shared_expert_in_fp8_is_an_expert_of_weight_one() -> None:
    x, gate_up, down, _, _, _, _ = layer(4, 1, 1, 128, 128, torch.bfloat16)
    (gate_up, gate_up_scale), (down, down_scale) = map(reference.quantise_weights, (gate_up, down))
    ids, weights = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
    scales = {"gate_up_scale": gate_up_scale, "down_scale": down_scale}
    routed = reference.experts(x, gate_up, down, ids, weights, **scales, quantise=True)
    scales = {"gate_up_scale": gate_up_scale[0], "down_scale": down_scale[0]}
    assert relative_error(reference.shared(x, gate_up[0], down[0], **scales, quantise=True), routed) < 1e-6
