from __future__ import annotations

import pytest
from ramp_moe import MoEShape, Registry, ShapeError, UnknownNameError


def test_bytes_of_an_expert() -> None:
    shape = MoEShape(8, 2, hidden_size=256, intermediate_size=128, dtype="bf16")
    assert shape.gate_up_bytes == 2 * 128 * 256 * 2
    assert shape.down_bytes == 256 * 128 * 2
    fp8 = MoEShape(8, 2, hidden_size=256, intermediate_size=128, dtype="fp8")
    # one byte an element, and a float32 scale for each of 2 x 2 and 2 x 1 blocks
    assert fp8.gate_up_bytes == 256 * 256 + 4 * 4
    assert fp8.down_bytes == 256 * 128 + 4 * 2
    assert fp8.expert_bytes == fp8.gate_up_bytes + fp8.down_bytes


def test_name_does_not_distinguish_shapes() -> None:
    assert MoEShape(8, 2, 256, 128, name="a") == MoEShape(8, 2, 256, 128, name="b")
    assert MoEShape(8, 2, 256, 128, "fp8") != MoEShape(8, 2, 256, 128, "bf16")


def test_slug_tells_shapes_apart() -> None:
    assert MoEShape(8, 2, 256, 128).slug == "E8-k2-h256-i128-fp8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a positive integer, not 0"),
        ({"hidden_size": 2.5}, "hidden_size must be a positive integer, not 2.5"),
        ({"top_k": True}, "top_k must be a positive integer, not True"),
        ({"top_k": 9}, "top_k 9 exceeds num_experts 8"),
    ],
)
def test_impossible_shapes(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"num_experts": 8, "top_k": 2, "hidden_size": 256, "intermediate_size": 128}
    with pytest.raises(ShapeError, match=message):
        MoEShape(**(fields | change))  # type: ignore[arg-type]


def test_unknown_dtype() -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype 'fp9'; did you mean 'fp8'"):
        MoEShape(8, 2, 256, 128, dtype="fp9")


def test_named_models(registry: Registry) -> None:
    assert len(registry.models) >= 12
    assert all(model.source for model in registry.models.values())
    qwen = registry.shape("qwen3-30b-a3b")
    assert (qwen.num_experts, qwen.top_k, qwen.hidden_size, qwen.intermediate_size) == (128, 8, 2048, 768)


def test_tensor_parallel_shards_the_intermediate_size(registry: Registry) -> None:
    shape = registry.shape("DeepSeek-V3-tp8")
    assert shape.intermediate_size == 256
    assert shape.name == "deepseek-v3-tp8"
    assert registry.shape("mixtral-8x7b-tp1") == registry.shape("mixtral-8x7b")
    with pytest.raises(ShapeError, match="intermediate_size 1024 does not divide over tensor parallel 3"):
        registry.shape("olmoe-1b-7b-tp3")
    with pytest.raises(ShapeError, match="tensor parallel 0"):
        registry.shape("olmoe-1b-7b-tp0")


def test_unknown_model_suggests_the_nearest(registry: Registry) -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'olmo-1b-7b'; did you mean 'olmoe-1b-7b'"):
        registry.shape("olmo-1b-7b-tp2")


def test_a_shape_by_its_slug(registry: Registry) -> None:
    shape = MoEShape(16, 4, 64, 32, "bf16")
    for name in (shape.slug, shape.slug.lower()):
        for dtype, default in ((None, None), ("bf16", "fp8"), (None, "fp8")):
            assert registry.shape(name, dtype, default) == shape, "the slug says the dtype"
        with pytest.raises(ShapeError, match="is of dtype bf16, not fp8"):
            registry.shape(name, "fp8")
    assert registry.shape("olmoe-1b-7b", None, "fp8").dtype == "fp8"
    assert registry.shape("olmoe-1b-7b", "fp16", "fp8").dtype == "fp16"
    assert registry.shape("olmoe-1b-7b").dtype == "bf16", "as it was released"
    assert registry.shape(f"{shape.slug}-tp2") == MoEShape(16, 4, 64, 16, "bf16")
    for name in ("E16-k4-h64", "E16-k4-h64-i32-bf16-x"):
        with pytest.raises(UnknownNameError):
            registry.shape(name)
    with pytest.raises(UnknownNameError, match="dtype"):
        registry.shape("E16-k4-h64-i32-int4")
