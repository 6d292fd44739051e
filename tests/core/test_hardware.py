from __future__ import annotations

import dataclasses

import pytest
from ramp_moe import Hardware, HardwareError, Registry, UnknownNameError, detect
from ramp_moe.hardware import identify


def test_known_devices(registry: Registry) -> None:
    assert {"h100-sxm", "h100-pcie", "h200", "a100-sxm", "l40s", "b200", "mi300x"} <= registry.hardware.keys()
    assert registry.device("H200").num_sms == 132


def test_unknown_device_suggests(registry: Registry) -> None:
    with pytest.raises(UnknownNameError, match="unknown device 'h20'; did you mean 'h200'"):
        registry.device("h20")


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
    ],
)
def test_identify(registry: Registry, reported: str, sms: int, name: str) -> None:
    assert identify(registry.hardware.values(), reported, sms).name == name


def test_a_slice_is_not_the_whole_gpu(registry: Registry) -> None:
    with pytest.raises(HardwareError, match="reports 16 SMs where h200 has 132"):
        identify(registry.hardware.values(), "NVIDIA H200 MIG 1g.18gb", 16)


def test_unknown_gpu_names_the_remedy(registry: Registry) -> None:
    with pytest.raises(HardwareError, match=r"no constants for GPU 'Voodoo 2'.*ramp_moe_hardware"):
        identify(registry.hardware.values(), "Voodoo 2", 1)


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
