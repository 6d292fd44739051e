"""Formats of weights: their names, sizes in bytes, and what a shape of each is called."""

from __future__ import annotations

import pytest
from ramp_moe import Hardware, MoEShape, Registry, ShapeError, UnknownNameError
from ramp_moe.spec.formats import FORMATS, find_format
from ramp_moe.spec.kernel import Kernel, KernelConfig, WeightLayout, why_unsupported
from ramp_moe.spec.shapes import DEFAULT_DTYPE, Model, resolve_shape

SIZES = 64, 8, 2048, 1024
# Bytes of one expert's gate projection [1024, 2048], weights and scales, counted by hand.
GATE = {
    "bf16": 1024 * 2048 * 2,
    "fp16": 1024 * 2048 * 2,
    "fp8": 1024 * 2048 + 4 * 8 * 16,
    "fp8-channel": 1024 * 2048 + 4 * 1024,
    "fp8-tensor": 1024 * 2048 + 4,
    "int4-g32": 1024 * 1024 + 2 * 1024 * 64,
    "int4-g128": 1024 * 1024 + 2 * 1024 * 16,
    "mxfp4": 1024 * 1024 + 1024 * 64,
}
DEFAULTS = dict.fromkeys(("bf16", "fp16", "int4-g32", "int4-g128", "mxfp4"), "bf16") | dict.fromkeys(
    ("fp8", "fp8-channel", "fp8-tensor"), "fp8"
)


def test_the_formats_are_these_and_their_variants() -> None:
    endings = {"bf16": "-a8", "fp8": "-a16"}
    scaled = [name for name in DEFAULTS if name not in ("bf16", "fp16")]
    assert set(FORMATS) == {*DEFAULTS, *(name + endings[DEFAULTS[name]] for name in scaled)}
    for name, stored in FORMATS.items():
        assert stored.name == name
        assert FORMATS[stored.weights].activations == DEFAULTS[stored.weights]
        assert stored.rounds == (name.endswith("-a8") or (stored.weights == name and DEFAULTS[name] == "fp8"))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    shape = MoEShape(*SIZES, name)
    gate = GATE[shape.format.weights]
    assert shape.matrix_bytes(1024, 2048) == gate
    assert shape.gate_up_bytes == 2 * gate
    assert shape.expert_bytes == 2 * gate + shape.matrix_bytes(2048, 1024)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 4])
def test_a_slug_names_its_shape(name: str, shards: int) -> None:
    shape = MoEShape(*SIZES, name)
    label = shape.slug if shards == 1 else f"{shape.slug}-tp{shards}"
    assert shape.slug == f"E64-k8-h2048-i1024-{name}"
    for text in (label, label.lower()):
        assert resolve_shape({}, text) == shape.shard(shards)
        assert resolve_shape({}, text, name) == shape.shard(shards)
    with pytest.raises(ShapeError, match="leave out the dtype"):
        resolve_shape({}, label, "bf16" if name != "bf16" else "fp16")


@pytest.mark.parametrize("name", ["int4", "int4-g64", "mxfp4-a16", "bf16-a8", "fp8-a8", "nvfp4", ""])
def test_an_unknown_format_is_named_with_the_known(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype"):
        MoEShape(*SIZES, name)
    with pytest.raises(UnknownNameError, match="unknown"):
        resolve_shape({}, f"E64-k8-h2048-i1024-{name}")


def test_a_word_on_activations() -> None:
    for name, stored in FORMATS.items():
        assert find_format(name) is find_format(name, stored.activations) is stored
        if stored.scale is None:
            with pytest.raises(ShapeError, match="take activations as they are"):
                find_format(name, "fp8")
        else:
            other = find_format(name, "bf16" if stored.rounds else "fp8")
            assert (other.weights, other.rounds) == (stored.weights, not stored.rounds)
            assert find_format(other.name, stored.activations) is stored
    with pytest.raises(UnknownNameError, match="unknown rounding of activations 'int8'"):
        find_format("mxfp4", "int8")


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale_columns and f.scale_rows == 1])
def test_sizes_that_groups_do_not_divide(name: str) -> None:
    group = FORMATS[name].scale_columns
    assert group is not None
    assert FORMATS[name].misfit(2 * group, group) is None
    assert f"hidden_size {group + 16} is not a multiple of the {group}" in (
        FORMATS[name].misfit(group + 16, group) or ""
    )
    assert "intermediate_size" in (FORMATS[name].misfit(group, group // 2) or "")


def test_a_model_is_in_the_format_of_its_release(registry: Registry) -> None:
    """A model that is published in 16 bits runs in fp8 unless another word is said, as most servers run it."""
    for model in registry.models.values():
        released = model.shape.dtype
        assert registry.shape(model.name).dtype == released
        usual = registry.shape(model.name, None, DEFAULT_DTYPE).dtype
        assert usual == (DEFAULT_DTYPE if released in ("bf16", "fp16") else released)
        for name in FORMATS:
            assert registry.shape(f"{model.name}-tp2", name, DEFAULT_DTYPE).dtype == name
    assert registry.shape("gpt-oss-120b").dtype == registry.shape("deepseek-v4-pro").dtype == "mxfp4"
    assert registry.models["kimi-k2"].formats == ("int4-g32",)
    with pytest.raises(UnknownNameError, match="unknown dtype 'int3'"):
        Model(MoEShape(4, 2, 256, 128, name="tiny"), "a test", ("int3",))


class Asked(Kernel):
    """A kernel that says of every shape that it can compute it, as one written before a format might."""

    name = "asked"

    def configs(self, shape: MoEShape, hardware: Hardware) -> tuple[KernelConfig, ...]:
        return ()

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", 1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_kernel_is_not_asked_about_formats_that_it_does_not_name(name: str, h200: Hardware) -> None:
    reason = why_unsupported(Asked(), MoEShape(*SIZES, name), h200)
    if name in ("fp8", "bf16", "fp16"):
        assert reason is None
    else:
        assert reason == f"takes weights in fp8 or bf16 or fp16, not in {name}"


@pytest.mark.parametrize("name", FORMATS)
def test_every_kernel_refuses_the_formats_that_it_does_not_take(name: str, registry: Registry, h200: Hardware) -> None:
    for kernel in registry.kernels.values():
        reason = why_unsupported(kernel, MoEShape(256, 8, 7168, 2048, name), h200)
        assert (reason is not None) if name not in kernel.formats else True, kernel.name


def test_peaks_are_those_of_the_activations(h200: Hardware) -> None:
    assert h200.peak_flops("mxfp4") == h200.peak_flops("int4-g32") == h200.peak_flops("fp8-a16") == h200.bf16_flops
    assert h200.peak_flops("mxfp4-a8") == h200.peak_flops("fp8-channel") == h200.fp8_flops
