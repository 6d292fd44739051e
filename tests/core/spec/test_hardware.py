from __future__ import annotations

import dataclasses
import types

import pytest
from ramp_moe import Hardware, HardwareError, Registry, UnknownNameError
from ramp_moe.registry.detect import detect
from ramp_moe.registry.gpus import GPUS
from ramp_moe.spec.hardware import confirm, identify


def test_known_devices(registry: Registry) -> None:
    assert {h.name for h in GPUS} <= registry.hardware.keys()
    assert registry.device("H200").num_sms == 132


def test_a_device_is_known_by_the_name_that_its_driver_reports(registry: Registry) -> None:
    for hardware in GPUS:
        if len(hardware.device_names) == 1 and " " in hardware.device_names[0]:
            assert registry.device(hardware.device_names[0]).name == hardware.name
    assert registry.device("NVIDIA H200").name == "h200"
    with pytest.raises(UnknownNameError, match="unknown device 'NVIDIA H2000'"):
        registry.device("NVIDIA H2000")


def test_unknown_device_suggests(registry: Registry) -> None:
    with pytest.raises(UnknownNameError, match="unknown device 'h2000'; did you mean 'h200'"):
        registry.device("h2000")


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("h100", "h100-nvl (H100 NVL), h100-pcie (H100 PCIe), h100-sxm (H100 80GB HBM3)"),
        ("A100", "a100-40gb (A100-SXM4-40GB), a100-80gb-pcie (A100 80GB PCIe), a100-pcie (A100-PCIE-40GB), a100-sxm"),
    ],
)
def test_a_model_of_several_devices_offers_them(registry: Registry, name: str, listed: str) -> None:
    with pytest.raises(HardwareError) as e:
        registry.device(name)
    assert f"device {name!r} is one of several: name {listed}" in str(e.value)


@pytest.mark.parametrize(
    ("reported", "sms", "name"),
    [
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA H100 80GB HBM3", 132, "h100-sxm"),
        ("NVIDIA H100 PCIe", 114, "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", 108, "a100-sxm"),
        ("NVIDIA L40S", 142, "l40s"),
        ("NVIDIA B200", 148, "b200"),
        ("AMD Instinct MI300X", 304, "mi300x"),
        ("NVIDIA H100 NVL", 132, "h100-nvl"),
        ("NVIDIA H200 NVL", 132, "h200-nvl"),
        ("NVIDIA H20", 78, "h20"),
        ("NVIDIA H20-3e", 78, "h20-3e"),
        ("NVIDIA H800", 132, "h800"),
        ("NVIDIA GH200 480GB", 132, "gh200"),
        ("NVIDIA A100-SXM4-40GB", 108, "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", 108, "a100-pcie"),
        ("NVIDIA A100 80GB PCIe", 108, "a100-80gb-pcie"),
        ("NVIDIA A800-SXM4-80GB", 108, "a800"),
        ("NVIDIA GB200", 152, "gb200"),
        ("NVIDIA B300 SXM6 AC", 148, "b300"),
        ("NVIDIA GB300", 152, "gb300"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 188, "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, "rtx-pro-6000-workstation"),
        ("AMD Instinct MI325X", 304, "mi325x"),
        ("AMD Instinct MI350X", 256, "mi350x"),
        ("AMD Instinct MI355X", 256, "mi355x"),
    ],
)
def test_identify(registry: Registry, reported: str, sms: int, name: str) -> None:
    assert identify(registry.hardware.values(), reported, sms).name == name


def test_a_slice_is_not_the_whole_gpu(registry: Registry) -> None:
    with pytest.raises(HardwareError, match="reports 16 SMs where h200 has 132"):
        identify(registry.hardware.values(), "NVIDIA H200 MIG 1g.18gb", 16)


@pytest.mark.parametrize(
    ("reported", "related"),
    [
        ("Voodoo 2", ""),
        ("NVIDIA H100", ", such as h100-sxm, h100-pcie, h100-nvl"),
        ("NVIDIA H100 64GB HBM2", ", such as h100-sxm, h100-pcie, h100-nvl"),
        ("NVIDIA GH200 144G HBM3e", ", such as gh200"),
        ("NVIDIA H2", ""),
        ("NVIDIA L20", ""),
    ],
)
def test_unknown_gpu_names_the_remedy(registry: Registry, reported: str, related: str) -> None:
    """A part of a word is no name: an H2 is none of the H20s, nor a GPU of which only the model is known."""
    with pytest.raises(HardwareError) as e:
        identify(registry.hardware.values(), reported, 1)
    assert str(e.value) == (
        f"no constants for GPU {reported!r}; register them with the ramp_moe_hardware hook, "
        f"or name the nearest device with --device{related}"
    )


# Dense bf16 FLOP of one SM in a cycle, and the clock in GHz that the GPUs of that architecture boost to at most.
CYCLE = {
    "sm_80": (2048, 1.5),
    "sm_89": (1024, 2.6),
    "sm_90": (4096, 2.0),
    "sm_100": (8192, 2.1),
    "sm_103": (8192, 2.1),
    "sm_120": (1024, 2.7),
    "gfx942": (2048, 2.2),
    "gfx950": (4096, 2.5),
}
SHARED_KIB = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_103": 228, "sm_120": 100} | {
    "gfx942": 64,
    "gfx950": 160,
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_constants_are_plausible(gpu: Hardware) -> None:
    """Peaks are dense: what a data sheet gives with sparsity would need a clock above the highest boost. Of H20s, whose
    tensor cores are throttled, the lowest clock is the bound."""
    flop, boost = CYCLE[gpu.arch]
    clock = gpu.bf16_flops / (gpu.num_sms * flop) / 1e9
    assert (0.45 < clock < 0.5) if gpu.name.startswith("h20-") or gpu.name == "h20" else (0.6 * boost < clock <= boost)
    assert (
        gpu.fp8_flops is None if gpu.arch == "sm_80" else gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=0.02)
    )
    assert 5e9 < gpu.hbm_bytes_per_s / gpu.num_sms < 65e9
    assert 0.8e12 < gpu.hbm_bytes_per_s <= 8e12
    assert 30 * 2**20 < gpu.l2_bytes < 140 * 2**20
    assert gpu.smem_per_sm_bytes == SHARED_KIB[gpu.arch] * 1024
    assert gpu.source.split()[0] == ("AMD" if gpu.arch.startswith("gfx") else "NVIDIA")


def test_names_of_the_constants() -> None:
    """Each GPU is found by each of its own names, and is no other."""
    for gpu in GPUS:
        for name in gpu.device_names:
            assert identify(GPUS, name) is gpu
    assert len({h.name for h in GPUS}) == len(GPUS)


def test_a_named_device_must_not_contradict_the_gpu(registry: Registry) -> None:
    known = registry.hardware.values()
    h100, h200 = registry.device("h100-sxm"), registry.device("h200")
    assert confirm(h200, known, "NVIDIA H200", 132, "sm_90") is h200
    assert confirm(h100, known, "NVIDIA H100 64GB HBM2", 132, "sm_90") is h100
    own = dataclasses.replace(h200, name="my-h200")
    assert confirm(own, [*known, own], "NVIDIA H200", 132, "sm_90") is own, "two entries of one name"
    for reported, sms, arch, message in (
        ("NVIDIA H200", None, None, "this machine's GPU is h200 (NVIDIA H200), not h100-sxm; name --device h200"),
        ("NVIDIA H100 64GB HBM2", 114, "sm_90", "reports 114 SMs where h100-sxm has 132"),
        ("NVIDIA Rubin", 132, "sm_110", "GPU 'NVIDIA Rubin' is sm_110, h100-sxm is sm_90"),
    ):
        with pytest.raises(HardwareError) as e:
            confirm(h100, known, reported, sms, arch)
        assert message in str(e.value)


@pytest.mark.parametrize(
    ("hip", "properties", "named"),
    [
        (None, {"name": "NVIDIA H100 64GB HBM2", "major": 9, "minor": 0, "multi_processor_count": 132}, "h100-sxm"),
        (
            "7.0",
            {"name": "AMD Radeon Graphics", "gcnArchName": "gfx942:sramecc+", "multi_processor_count": 304},
            "mi300x",
        ),
    ],
)
def test_detect_takes_a_name(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, hip: str | None, properties: dict[str, object], named: str
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = types.SimpleNamespace(**{"gcnArchName": properties["name"]} | properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    known = registry.hardware.values()
    with pytest.raises(HardwareError, match="no constants for GPU"):
        detect(known)
    assert detect(known, named=registry.device(named)).name == named
    with pytest.raises(HardwareError, match=rf"reports {properties['multi_processor_count']} SMs where b200 has 148"):
        detect(known, named=registry.device("b200"))


def test_peak_by_dtype(registry: Registry) -> None:
    a100 = registry.device("a100-sxm")
    assert a100.peak_flops("fp8") is None
    assert a100.peak_flops("fp16") == a100.bf16_flops


def test_impossible_constants(h200: Hardware) -> None:
    with pytest.raises(HardwareError, match="num_sms must be positive"):
        dataclasses.replace(h200, num_sms=0)


@pytest.mark.gpu
def test_detect_this_gpu(registry: Registry) -> None:
    import torch

    properties = torch.cuda.get_device_properties(0)
    found = detect()
    assert detect(named=found) == found
    with pytest.raises(HardwareError, match="this machine's GPU is"):
        detect(named=registry.device("mi300x"))
    assert any(n.lower() in properties.name.lower() for n in found.device_names)
    assert found.num_sms == properties.multi_processor_count
    assert found.l2_bytes == properties.L2_cache_size
    assert found.smem_per_sm_bytes == properties.shared_memory_per_multiprocessor
    with pytest.raises(HardwareError, match="there is no GPU 99"):
        detect(registry.hardware.values(), 99)


@pytest.mark.gpu
def test_histogram_of_ids_on_the_gpu() -> None:
    import torch
    from ramp_moe import expert_histogram, generate

    ids = generate("zipf1.2", 300, 64, 8, seed=3)
    assert expert_histogram(torch.from_numpy(ids).cuda().int(), 64).tolist() == expert_histogram(ids, 64).tolist()
