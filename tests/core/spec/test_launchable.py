"""What tensors a kernel is never given: each mistake is refused with the tensor's name and what it must be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from layer_cases import FakeKernel
from moe_cases import LIMITS
from ramp_moe import (
    Hardware,
    KernelConfig,
    KernelError,
    MoEShape,
    RampMoEError,
    RoutingError,
    ShapeError,
    UnknownNameError,
    WeightLayout,
)
from ramp_moe.spec.launchable import ACTIVATIONS, Batch, LaunchableKernel, MoEWeights, Workspace, obstacle
from ramp_moe.spec.shapes import scale_blocks
from ramp_moe.spec.weights import _note_copy

E, H, I, T, K = 4, 256, 128, 5, 2  # noqa: E741
FP8 = torch.float8_e4m3fn
META = torch.device("meta")


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def half(**changed: Any) -> dict[str, Any]:
    return {"gate_up": zeros(E, 2 * I, H), "down": zeros(E, H, I), **changed}


def fp8(**changed: Any) -> dict[str, Any]:
    return {
        "gate_up": zeros(E, 2 * I, H, dtype=FP8),
        "down": zeros(E, H, I, dtype=FP8),
        "gate_up_scale": torch.ones(E, 2 * I // 128, H // 128),
        "down_scale": torch.ones(E, H // 128, I // 128),
        **changed,
    }


def straddling(inter: int, gate_up_scale: torch.Tensor, down_scale: torch.Tensor) -> dict[str, Any]:
    """fp8 of an intermediate size that 128 does not divide."""
    weights = {"gate_up": zeros(E, 2 * inter, H, dtype=FP8), "down": zeros(E, H, inter, dtype=FP8)}
    return {**weights, "gate_up_scale": gate_up_scale, "down_scale": down_scale}


def strided(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The right shape in the wrong order."""
    tensor = zeros(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
    assert tuple(tensor.shape) == shape
    assert not tensor.is_contiguous()
    return tensor


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (FP8, "fp8")], ids=["bf16", "fp16", "fp8"]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_weights_that_fit(dtype: torch.dtype, name: str, activation: str, bias: torch.dtype | None) -> None:
    given = fp8() if dtype == FP8 else {k: v.to(dtype) for k, v in half().items()}
    if bias is not None:
        given |= {"gate_up_bias": zeros(E, 2 * I, dtype=bias), "down_bias": zeros(E, H, dtype=bias)}
    weights = MoEWeights(**given, activation=activation, limit=LIMITS.get(activation))
    assert weights.shape(K) == MoEShape(E, K, H, I, name)
    assert weights.shape(K, "mine").label == "mine"
    with pytest.raises(ShapeError, match="top_k 5 exceeds num_experts 4"):
        weights.shape(5)


WRONG_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "flat": (half(gate_up=zeros(2 * I, H)), "gate_up must be [E, 2 I, H], not [256, 256]"),
    "odd rows": (half(gate_up=zeros(E, 255, H)), "gate_up must be [E, 2 I, H], not [4, 255, 256]"),
    "float32": (
        half(gate_up=zeros(E, 2 * I, H, dtype=torch.float32)),
        "gate_up is torch.float32; weights must be bf16, fp16 or float8_e4m3fn",
    ),
    "other fp8": (
        half(gate_up=zeros(E, 2 * I, H, dtype=torch.float8_e5m2)),
        "gate_up is torch.float8_e5m2; weights must be bf16, fp16 or float8_e4m3fn",
    ),
    "int8": (half(gate_up=zeros(E, 2 * I, H, dtype=torch.int8)), "gate_up is torch.int8; weights must be bf16"),
    "down transposed": (half(down=zeros(E, I, H)), "down must be [4, 256, 128], not [4, 128, 256]"),
    "down flat": (half(down=zeros(H, I)), "down must be [4, 256, 128], not [256, 128]"),
    "fewer experts": (half(down=zeros(E - 1, H, I)), "down must be [4, 256, 128], not [3, 256, 128]"),
    "mixed halves": (
        half(down=zeros(E, H, I, dtype=torch.float16)),
        "down must be torch.bfloat16, not torch.float16",
    ),
    "half and fp8": (fp8(down=zeros(E, H, I)), "down must be torch.float8_e4m3fn, not torch.bfloat16"),
    "scales of bf16": (
        half(gate_up_scale=torch.ones(E, 2, 2)),
        "scales belong to quantised weights, these are bf16",
    ),
    "one scale of bf16": (half(down_scale=torch.ones(E, 2, 1)), "scales belong to quantised weights"),
    "no scale": (fp8(gate_up_scale=None), "fp8 weights need gate_up_scale, float32 [4, 2, 2]"),
    "no down scale": (fp8(down_scale=None), "fp8 weights need down_scale, float32 [4, 2, 1]"),
    "scale a tensor": (fp8(gate_up_scale=torch.ones(E)), "gate_up_scale must be [4, 2, 2], not [4]"),
    "scale a row": (fp8(down_scale=torch.ones(E, H, 1)), "down_scale must be [4, 2, 1], not [4, 256, 1]"),
    "scale dtype": (
        fp8(gate_up_scale=zeros(E, 2, 2)),
        "gate_up_scale must be torch.float32, not torch.bfloat16",
    ),
    "fp8 hidden": (
        fp8(gate_up=zeros(E, 2 * I, 192, dtype=FP8)),
        "fp8 weights need a hidden size in multiples of 128, not 192",
    ),
    "blocks that hold gate and up": (
        straddling(192, torch.ones(E, 3, 2), torch.ones(E, 2, 2)),
        "gate_up_scale must be [4, 4, 2], not [4, 3, 2]; gate and up have scale blocks of their own, of 128 or 64",
    ),
    "blocks of two sizes": (
        straddling(192, torch.ones(E, 6, 4), torch.ones(E, 2, 2)),
        "down_scale must be [4, 4, 3], not [4, 2, 2]",
    ),
    "blocks that divide nothing": (
        straddling(80, torch.ones(E, 10, 16), torch.ones(E, 16, 5)),
        "gate_up_scale must be [4, 2, 2], not [4, 10, 16]; gate and up have scale blocks of their own, of 128",
    ),
    "small blocks of whole ones": (
        fp8(gate_up_scale=torch.ones(E, 4, 4)),
        "gate_up_scale must be [4, 2, 2], not [4, 4, 4]",
    ),
    "bias shape": (half(gate_up_bias=zeros(E, I)), "gate_up_bias must be [4, 256], not [4, 128]"),
    "down bias shape": (half(down_bias=zeros(H)), "down_bias must be [4, 256], not [256]"),
    "bias dtype": (
        half(down_bias=zeros(E, H, dtype=torch.int32)),
        "down_bias must be float32, bf16 or fp16, not torch.int32",
    ),
    "fp8 bias": (
        half(gate_up_bias=zeros(E, 2 * I, dtype=FP8)),
        "gate_up_bias must be float32, bf16 or fp16, not torch.float8_e4m3fn",
    ),
    "down elsewhere": (half(down=zeros(E, H, I, device=META)), "down is on meta, gate_up on cpu; move it there"),
    "scale elsewhere": (fp8(down_scale=torch.ones(E, 2, 1, device=META)), "down_scale is on meta, gate_up on cpu"),
    "bias elsewhere": (half(down_bias=zeros(E, H, device=META)), "down_bias is on meta, gate_up on cpu"),
}


@pytest.mark.parametrize("inter", [16, 32, 80, 96, 192, 320, 384])
def test_scale_blocks_that_straddle(inter: int) -> None:
    """Engines hold scales of checkpoints' blocks, or of the smaller ones that divide a shard."""
    for block in scale_blocks(inter):
        deep = -(-inter // block)
        scales = torch.ones(E, 2 * deep, H // block), torch.ones(E, H // block, deep)
        weights = MoEWeights(**straddling(inter, *scales))
        assert weights.scale_block == block
        assert weights.shape(K) == MoEShape(E, K, H, inter)
    assert scale_blocks(inter) == {32: (128, 32), 96: (128, 32), 192: (128, 64), 320: (128, 64)}.get(inter, (128,))
    assert MoEWeights(**half()).scale_block is None


@pytest.mark.parametrize(("name", "eight"), [
    *((n, False) for n in ("gate_up", "down", "gate_up_bias", "down_bias")),
    *((n, True) for n in ("gate_up", "down", "gate_up_scale", "down_scale")),
])  # fmt: skip
def test_weights_of_any_strides_are_copied_once(name: str, eight: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Padded rows, transposed, expanded: the values stay, and one line says that memory is taken twice."""
    given = fp8() if eight else half()
    given |= {"gate_up_bias": zeros(E, 2 * I, dtype=torch.float32), "down_bias": zeros(E, H, dtype=torch.float32)}
    dense = given[name] = torch.randn(given[name].shape).to(given[name].dtype)
    wide = torch.empty(*dense.shape[:-1], 2 * dense.shape[-1], dtype=dense.dtype)
    padded = wide[..., : dense.shape[-1]].copy_(dense)
    transposed = dense.transpose(-1, -2).contiguous().transpose(-1, -2)
    _note_copy.cache_clear()
    different = [t for t in (padded, transposed, dense[:1].expand(dense.shape)) if not t.is_contiguous()]
    for strided_one in different:
        for _ in range(2):
            made = getattr(MoEWeights(**given | {name: strided_one}), name)
            assert made.is_contiguous()
            assert torch.equal(made.view(torch.uint8), strided_one.contiguous().view(torch.uint8))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == len(different) >= 2
    assert all(s.startswith(f"ramp_moe: {name} {list(dense.shape)} has the strides") for s in said)
    assert getattr(MoEWeights(**given), name) is dense, "what is contiguous stays the same tensor"


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(case: str) -> None:
    given, message = WRONG_WEIGHTS[case]
    with pytest.raises(ShapeError, match="^" + re.escape(message)):
        MoEWeights(**given)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown activation 'swigul'; did you mean 'swiglu'"):
        MoEWeights(**half(), activation="swigul")


@pytest.mark.parametrize("limit", [None, 0.0, -7.0, float("nan"), float("inf")])
def test_a_clamp_without_a_limit_is_refused(limit: float | None) -> None:
    with pytest.raises(KernelError, match=r"swiglu_clamped needs a positive limit, as limit=10\.0, not"):
        MoEWeights(**half(), activation="swiglu_clamped", limit=limit)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in LIMITS])
def test_a_limit_that_nothing_would_apply_is_refused(activation: str) -> None:
    with pytest.raises(KernelError, match=f"{activation} takes no limit, here 10.0; swiglu_clamped does"):
        MoEWeights(**half(), activation=activation, limit=10.0)


def batch(**changed: Any) -> dict[str, Any]:
    return {
        "hidden_states": zeros(T, H),
        "topk_ids": zeros(T, K, dtype=torch.int32),
        "topk_weights": zeros(T, K, dtype=torch.float32),
        **changed,
    }


def test_a_batch_that_fits() -> None:
    assert (Batch(**batch()).num_tokens, Batch(**batch()).top_k) == (T, K)
    empty = {name: tensor[:0] for name, tensor in batch().items()}
    assert (Batch(**empty).num_tokens, Batch(**empty).top_k) == (0, K)


X, IDS, WEIGHTS = (
    "hidden_states must be contiguous bf16 or fp16 [T, H], not ",
    "topk_ids must be contiguous int32 [5, k], not ",
    "topk_weights must be contiguous float32 [5, 2], not ",
)
WRONG_BATCHES: dict[str, tuple[dict[str, Any], type[RampMoEError], str]] = {
    "float32": ({"hidden_states": zeros(T, H, dtype=torch.float32)}, ShapeError, X + "torch.float32 [5, 256]"),
    "fp8": ({"hidden_states": zeros(T, H, dtype=FP8)}, ShapeError, X + "torch.float8_e4m3fn"),
    "one token flat": ({"hidden_states": zeros(H)}, ShapeError, X + "torch.bfloat16 [256]"),
    "sequences": ({"hidden_states": zeros(1, T, H)}, ShapeError, X + "torch.bfloat16 [1, 5, 256]"),
    "strided": ({"hidden_states": strided(T, H)}, ShapeError, X),
    "every other": ({"hidden_states": zeros(T, 2 * H)[:, ::2]}, ShapeError, X),
    "int64 ids": ({"topk_ids": zeros(T, K, dtype=torch.int64)}, RoutingError, IDS + "torch.int64 [5, 2]"),
    "float ids": ({"topk_ids": zeros(T, K, dtype=torch.float32)}, RoutingError, IDS + "torch.float32 [5, 2]"),
    "bool ids": ({"topk_ids": zeros(T, K, dtype=torch.bool)}, RoutingError, IDS + "torch.bool"),
    "flat ids": ({"topk_ids": zeros(T * K, dtype=torch.int32)}, RoutingError, IDS + "torch.int32 [10]"),
    "ids of others": ({"topk_ids": zeros(T + 1, K, dtype=torch.int32)}, RoutingError, IDS + "torch.int32 [6, 2]"),
    "strided ids": ({"topk_ids": strided(T, K, dtype=torch.int32)}, RoutingError, IDS),
    "half weights": ({"topk_weights": zeros(T, K)}, RoutingError, WEIGHTS + "torch.bfloat16 [5, 2]"),
    "double weights": ({"topk_weights": zeros(T, K, dtype=torch.float64)}, RoutingError, WEIGHTS + "torch.float64"),
    "more weights": (
        {"topk_weights": zeros(T, K + 1, dtype=torch.float32)},
        RoutingError,
        WEIGHTS + "torch.float32 [5, 3]",
    ),
    "strided weights": ({"topk_weights": strided(T, K, dtype=torch.float32)}, RoutingError, WEIGHTS),
    "ids elsewhere": (
        {"topk_ids": zeros(T, K, dtype=torch.int32, device=META)},
        RoutingError,
        "topk_ids is on meta, hidden_states on cpu; move it there",
    ),
    "weights elsewhere": (
        {"topk_weights": zeros(T, K, dtype=torch.float32, device=META)},
        RoutingError,
        "topk_weights is on meta, hidden_states on cpu; move it there",
    ),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_batches_that_do_not_fit(case: str) -> None:
    changed, error, message = WRONG_BATCHES[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        Batch(**batch(**changed))


CPU = torch.device("cpu")


def test_a_buffer_is_used_again_and_grows() -> None:
    workspace = Workspace()
    first = workspace.get("a", (4, 8), torch.float32, CPU)
    assert (first.shape, first.dtype, first.device) == ((4, 8), torch.float32, CPU)
    assert first.is_contiguous()
    assert workspace.bytes == 256  # the least
    same = workspace.get("a", (4, 8), torch.float32, CPU)
    smaller = workspace.get("a", (3, 5), torch.bfloat16, CPU)
    assert first.data_ptr() == same.data_ptr() == smaller.data_ptr()
    assert (smaller.shape, smaller.dtype) == ((3, 5), torch.bfloat16)
    grown = workspace.get("a", (9, 9), torch.float32, CPU)
    # 512 for 324, and the outgrown one, which a captured graph may still use.
    assert workspace.bytes == 512 + 256
    first.fill_(1)
    grown.fill_(2)
    assert first.unique().tolist() == [1]


def test_each_name_has_a_buffer() -> None:
    workspace = Workspace()
    a, b = (workspace.get(name, (16,), torch.int32, CPU) for name in "ab")
    a.fill_(1)
    b.fill_(2)
    assert (a.unique().tolist(), b.unique().tolist()) == ([1], [2])
    workspace.get("a", (320,), torch.int32, CPU)
    assert workspace.get("b", (16,), torch.int32, CPU).data_ptr() == b.data_ptr()
    # Two workspaces share nothing.
    assert Workspace().get("b", (16,), torch.int32, CPU).data_ptr() != b.data_ptr()


def test_a_buffer_follows_its_device() -> None:
    workspace = Workspace()
    workspace.get("a", (4,), torch.float32, CPU)
    assert workspace.get("a", (4,), torch.float32, META).device == META


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8, torch.int32])
def test_empty_and_scalar_buffers(dtype: torch.dtype) -> None:
    workspace = Workspace()
    assert workspace.get("a", (0, 7), dtype, CPU).shape == (0, 7)
    assert workspace.get("a", (), dtype, CPU).shape == ()
    assert workspace.get("a", [3], dtype, CPU).shape == (3,)


@pytest.mark.gpu
def test_each_stream_has_a_buffer() -> None:
    workspace, device = Workspace(), torch.device("cuda", torch.cuda.current_device())
    first = workspace.get("a", (4,), torch.float32, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert workspace.get("a", (4,), torch.float32, device).data_ptr() != first.data_ptr()
    assert workspace.get("a", (4,), torch.float32, device).data_ptr() == first.data_ptr()


def test_a_launchable_kernel_is_available_unless_it_says_otherwise() -> None:
    class Described(LaunchableKernel):
        name = "described"

        def configs(self, shape: Any, hardware: Any) -> list[KernelConfig]:
            return []

        def weight_layout(self, shape: MoEShape) -> WeightLayout:
            return WeightLayout("none", 0)

        def prepare(self, weights: MoEWeights) -> None: ...

        def default_config(self, shape: MoEShape, hardware: object, num_tokens: int) -> KernelConfig:
            return KernelConfig("only", ())

        def run(self, *args: Any) -> None: ...

    assert Described().unavailable() is None
    assert Described().graph_safe

    class Lacking(Described):
        requires = ("torch", "no_such_package", "nor_this")

    class Comma(Described):
        requires = "triton"  # type: ignore[assignment]

    assert Lacking().unavailable() == ("no_such_package and nor_this missing: pip install no_such_package nor_this")
    assert Comma().unavailable() == "requires = 'triton' names no packages; write requires = ('triton',)"
    with pytest.raises(TypeError, match="abstract"):
        LaunchableKernel()  # type: ignore[abstract]


def test_a_plan_is_made_again_for_another_key() -> None:
    workspace, made = Workspace(), []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    def plan(name: str, *key: object) -> int:
        return workspace.plan(name, key, CPU, make)

    assert [plan("a", 1), plan("a", 1), plan("b", 1), plan("a", 2), plan("b", 1), plan("a", 1)] == [0, 0, 1, 2, 1, 3]


@pytest.mark.parametrize("asked", ["unsupported", "unavailable"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("no  such\nGPU", "no such GPU"),
        ("", "without a reason"),
        (False, "bool"),
        (OSError("gone"), "broken: .*OSError: gone"),
        (KernelError("half installed"), "broken: half installed"),
        (None, None),
    ],
)
def test_a_kernel_that_fails_to_answer_has_an_obstacle(
    monkeypatch: pytest.MonkeyPatch, asked: str, answer: object, reason: str | None, h200: Hardware
) -> None:
    def answers(*_: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    kernel = FakeKernel()
    monkeypatch.setattr(kernel, asked, answers)
    found = obstacle(kernel, MoEShape(8, 2, 256, 128, "bf16"), h200)
    assert (found is None) if reason is None else re.search(reason, str(found))
