"""Names of tables, as vLLM and SGLang spell them: understood whole, or refused with the field at fault."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ramp_moe import Hardware, HardwareError, MoEShape, ProfileError, Registry
from ramp_moe.evaluation.table_names import TableName, device_names, file_names
from ramp_moe.spec.hardware import identify

NAMES = Path(__file__).parents[2] / "data" / "moe_table_names.txt"
NAME = "E=64,N=1024,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"


def shipped() -> list[tuple[str, int, str]]:
    """(whose, how many, name) of every form of name that vLLM and SGLang ship."""
    lines = [line.split(" ", 2) for line in NAMES.read_text().splitlines()[1:]]
    return [(whose, int(count), f"E=64,N=1024,{rest}") for whose, count, rest in lines]


def test_names_are_vllms(registry: Registry, olmoe: MoEShape, h200: Hardware) -> None:
    assert file_names(olmoe, h200) == [NAME]
    for dtype in ("bf16", "fp16"):
        assert file_names(replace(olmoe, dtype=dtype), h200) == ["E=64,N=1024,device_name=NVIDIA_H200.json"]
    names = {name: device_names(registry.device(name)) for name in ("h100-sxm", "h100-pcie", "a100-sxm", "mi325x")}
    assert names == {
        "h100-sxm": ["NVIDIA_H100_80GB_HBM3", "NVIDIA_H100_SXM"],
        "h100-pcie": ["NVIDIA_H100_PCIe"],
        "a100-sxm": ["NVIDIA_A100-SXM4-80GB"],
        "mi325x": ["AMD_Instinct_MI325X", "AMD_Instinct_MI325_OAM"],
    }
    assert device_names(registry.device("h200-nvl")) == ["NVIDIA_H200"]


WORDS = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef0123456789_-()", min_size=1, max_size=30).filter(
    lambda word: not word.endswith("_down")
)
SIZES = st.integers(1, 99_999)


@settings(deadline=None)
@given(
    st.builds(
        TableName,
        num_experts=SIZES,
        intermediate_size=SIZES,
        device=WORDS,
        dtype=st.none() | WORDS,
        block_shape=st.none() | st.tuples(SIZES, SIZES),
        per_channel_quant=st.booleans(),
        down=st.booleans(),
    ),
    st.sampled_from(("", " ")),
)
def test_every_name_is_read_back(name: TableName, space: str) -> None:
    assert TableName.parse(name.format(space)) == name


@settings(deadline=None)
@given(st.sampled_from((NAME, NAME.replace(".json", "_down.json"))), WORDS, WORDS)
def test_every_unknown_field_is_named(name: str, key: str, value: str) -> None:
    key = f"x{key.translate(str.maketrans('', '', '-()'))}"
    stem, ending = name[: name.rindex("]") + 1], name[name.rindex("]") + 1 :]
    with pytest.raises(ProfileError, match=r"a field that is not understood") as e:
        TableName.parse(f"{stem},{key}={value}{ending}")
    assert f"{key}={value}" in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("E=64,N=1024.json", "does not say its device_name"),
        ("E=384,N=128,device_name=,dtype=int4_w4a16.json", "does not say its device_name"),
        ("device_name=NVIDIA_H200.json", "does not say its E and N"),
        ("E=64,N=1024,device_name=NVIDIA_H200", "is not named as a table"),
        ("tuned.json", "is not named as a table: E=...,N=...,device_name=....json"),
        ("E=0,N=1024,device_name=NVIDIA_H200.json", "E=0 is not a positive number"),
        ("E=64,N=1e3,device_name=NVIDIA_H200.json", "N=1e3 is not a positive number"),
        ("E=64,N=1,device_name=A,block_shape=[128].json", "block_shape=[128] is not a pair of numbers"),
        ("E=64,N=1,device_name=A,per_channel_quant=yes.json", "per_channel_quant=yes is neither True nor False"),
        ("E=64,N=1,device_name=A,E=8.json", "has the field E twice"),
        (
            "E=384,N=256,device_name=AMD_Instinct_MI350X,dtype=int4_w4a16,backend=flydsl.json",
            "has a field that is not understood: backend=flydsl",
        ),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ProfileError) as e:
        TableName.parse(name)
    assert message in str(e.value)
    assert name in str(e.value)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ("", ("bf16", "fp16")),
        (",dtype=bf16", ("bf16",)),
        (",dtype=float16", ("fp16",)),
        (",dtype=fp8_w8a8,block_shape=[128,128]", ("fp8",)),
        (",dtype=fp8_w8a8,block_shape=[128, 128]", ("fp8",)),
        (",dtype=fp8_w8a8", "dtype=fp8_w8a8 without block_shape, one scale for each tensor, which is not a format"),
        (",dtype=float8", "dtype=float8 without block_shape, one scale for each tensor"),
        (",dtype=fp8_w8a8,per_channel_quant=True", "per_channel_quant=True, one scale for each output channel"),
        (",dtype=fp8_w8a8,block_shape=[64, 64]", "block_shape=[64, 64], which is not a format of ramp-moe yet"),
        (",block_shape=[128,128]", "block_shape=[128, 128] with no dtype"),
        (",dtype=int8_w8a8,block_shape=[128,128]", "block_shape=[128, 128] with dtype=int8_w8a8"),
        (",dtype=int8_w8a16", "dtype=int8_w8a16, which is not a format of ramp-moe yet"),
        (",dtype=int4_w4a16", "dtype=int4_w4a16"),
        (",dtype=float32", "dtype=float32"),
    ],
)
def test_formats(fields: str, found: tuple[str, ...] | str) -> None:
    for ending in (".json", "_down.json"):
        name = TableName.parse(f"E=64,N=1024,device_name=NVIDIA_H200{fields}{ending}")
        if isinstance(found, tuple):
            assert name.dtypes() == found
        else:
            with pytest.raises(ProfileError) as e:
                name.dtypes()
            assert str(e.value).startswith(found)


def hardware_of(registry: Registry, device: str) -> Hardware | str:
    """The GPU that a table's device_name is, or why it is none."""
    try:
        return identify(registry.hardware.values(), device.replace("_", " "))
    except HardwareError as e:
        return str(e)


def refusal(registry: Registry, text: str) -> str | None:
    """Why a table of this name is not used, whatever the layer; None if it is used and found again by its name."""
    try:
        name = TableName.parse(text)
        dtypes = name.dtypes()
    except ProfileError as e:
        return str(e)
    hardware = hardware_of(registry, name.device)
    if isinstance(hardware, str):
        return hardware
    found = text in (name.format(), name.format(" "))
    return None if found and name.mismatch(MoEShape(64, 1, 2048, 1024, dtypes[0]), hardware) is None else "not found"


def test_every_shipped_name_is_used_or_refused_with_its_reason(registry: Registry) -> None:
    used, refused = Counter[str](), Counter[str]()
    for whose, count, text in shipped():
        said = refusal(registry, text)
        (used if said is None else refused)[whose] += count
        fields = text.removesuffix(".json").removesuffix("_down").split(",", 2)[2].replace("[128,128]", "[128, 128]")
        parts = [p.removeprefix("device_name=").replace("_", " ") for p in fields.split(",")]
        assert said is None or any(p in said.replace("_", " ") for p in parts), f"{text}: {said}"
    assert used == {"vllm": 198, "sglang": 292}
    assert refused == {"vllm": 140, "sglang": 98}


def test_every_shipped_device_is_known_or_refused_by_name(registry: Registry) -> None:
    devices = {
        t.split("device_name=")[1].removesuffix(".json").removesuffix("_down").split(",")[0] for *_, t in shipped()
    }
    unknown = {d for d in devices - {""} if isinstance(hardware_of(registry, d), str)}
    for device in unknown:
        assert repr(device.replace("_", " ")) in str(hardware_of(registry, device))
    assert unknown == {
        "AMD_Instinct_MI308X",
        "AMD_Radeon_Graphics",
        "AMD_Radeon_R9700",
        "Intel(R)_Arc(TM)_Pro_B60_Graphics",
        "Intel(R)_Arc(TM)_Pro_B70_Graphics",
        "NVIDIA_GB10",
        "NVIDIA_GeForce_RTX_4090",
        "NVIDIA_H100",
        "NVIDIA_L20",
        "NVIDIA_L20Y",
        "NVIDIA_RTX_5880_Ada_Generation",
        "NVIDIA_RTX_6000_Ada_Generation",
        "NVIDIA_RTX_PRO_6000_Blackwell_Max-Q_Workstation_Edition",
        "Radeon_8060S_Graphics",
    }
