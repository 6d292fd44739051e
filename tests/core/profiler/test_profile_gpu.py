from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ramp_moe import HardwareError, MoEShape, Registry, WeightLayout
from ramp_moe.profiler import gpu
from ramp_moe.profiler.gpu import GpuState, check_memory, gpu_state, memory_needed

IDLE = "GPU-ba472954-3346-a526-5f21-80d3a76f2d73, 580.159.04, 0, 143156, 0, NVIDIA H200\n"
SECOND = "GPU-bb000000-0000-0000-0000-000000000002, 580.159.04, 51200, 91956, 87, NVIDIA H200\n"
THIRD = "GPU-cc000000-0000-0000-0000-000000000003, 580.159.04, 3, 143153, 0, NVIDIA H200\n"
ALL = IDLE + SECOND + THIRD
GIB = 2**30

Smi = Callable[..., None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts an nvidia-smi on the PATH that lists these GPUs and compute processes."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(gpus: str = IDLE, processes: str = "", code: int = 0, instead: str = "") -> None:
        (tmp_path / "gpus").write_text(gpus)
        (tmp_path / "processes").write_text(processes)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f"#!/bin/sh\ncd {tmp_path}\n{instead}\n"
            f'case "$1" in --query-gpu=*) cat gpus ;; *) cat processes ;; esac\nexit {code}\n'
        )
        script.chmod(0o755)

    return install


def uuid(line: str) -> str:
    return line.split(",")[0]


def test_an_idle_gpu(smi: Smi) -> None:
    smi()
    state = gpu_state()
    assert state == GpuState("NVIDIA H200", "580.159.04", uuid(IDLE), 143156 * 2**20, 0, 0.0, ())
    assert state.free_bytes == state.total_bytes
    assert state.busy() is None


def test_a_busy_gpu_says_who_uses_it(smi: Smi) -> None:
    processes = f"{uuid(SECOND)}, 416, 51100\n{uuid(SECOND)}, 417, [N/A]\n{uuid(IDLE)}, 9, 100\n"
    smi(ALL, processes + f"{uuid(SECOND)}, {os.getpid()}, 100\n")
    state = gpu_state(1)
    assert state.processes == ((416, 51100 * 2**20), (417, 0))
    assert (state.utilisation, state.used_bytes, state.free_bytes) == (0.87, 50 * GIB, 91956 * 2**20)
    assert state.busy() == (
        "NVIDIA H200 is in use by others (process 416 with 49.9 GiB, process 417, 50.0 GiB of memory in use, "
        "utilisation 87%), so times will be off; wait, or choose another GPU with CUDA_VISIBLE_DEVICES"
    )
    assert gpu_state(2).busy() is None


@pytest.mark.parametrize(
    ("used_mib", "utilisation", "sign"),
    [(1023, 5, None), (1024, 0, "1.0 GiB of memory in use"), (0, 6, "utilisation 6%")],
)
def test_hidden_processes_show_in_memory_and_utilisation(
    smi: Smi, used_mib: int, utilisation: int, sign: str | None
) -> None:
    smi(f"GPU-1, 580, {used_mib}, 90000, {utilisation}, NVIDIA H200\n")
    busy = gpu_state().busy()
    assert busy is None if sign is None else f"({sign})" in str(busy)


def test_utilisation_that_is_not_counted_and_a_name_with_a_comma(smi: Smi) -> None:
    smi("GPU-1, 580, 10, 90, [N/A], Voodoo 2, the second\n")
    state = gpu_state()
    assert (state.name, state.utilisation) == ("Voodoo 2, the second", 0.0)


@pytest.mark.parametrize(
    ("visible", "index", "found"),
    [
        ("2,0", 0, THIRD),
        ("2,0", 1, IDLE),
        (" 1 , 2", 1, THIRD),
        (uuid(SECOND), 0, SECOND),
        (f"{uuid(THIRD)},{uuid(IDLE)}", 1, IDLE),
        ("GPU-cc", 0, THIRD),
        ("1,-1,2", 0, SECOND),
    ],
)
def test_visible_devices(smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str, index: int, found: str) -> None:
    smi(ALL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_state(index).uuid == uuid(found)


@pytest.mark.parametrize(
    ("visible", "index", "seen"),
    [
        ("", 0, 0),
        ("-1", 0, 0),
        ("1", 1, 1),
        ("1,-1,2", 1, 1),
        ("7", 0, 0),
        ("GPU-ffff", 0, 0),
        ("GPU-", 0, 0),  # which of the three?
        ("MIG-ba472954", 0, 0),
        ("0,1", -1, 2),
    ],
)
def test_no_such_gpu(smi: Smi, monkeypatch: pytest.MonkeyPatch, visible: str, index: int, seen: int) -> None:
    smi(ALL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(HardwareError) as e:
        gpu_state(index)
    assert str(e.value) == (
        f"there is no GPU {index}: nvidia-smi lists 3, CUDA sees {seen} with CUDA_VISIBLE_DEVICES={visible!r}"
    )


def test_too_large_an_index(smi: Smi) -> None:
    smi()
    with pytest.raises(HardwareError, match=r"there is no GPU 1: nvidia-smi lists 1, CUDA sees 1$"):
        gpu_state(1)


@pytest.mark.parametrize(
    ("gpus", "code", "message"),
    [
        ("No devices were found\n", 6, r"fails with exit code 6 \(No devices were found\); mend"),
        ("", 9, r"exit code 9 \(no message\)"),
        ("No devices were found\n", 0, "answers 'No devices were found' to --query-gpu"),
        ("GPU-1, 580, [N/A], [N/A], 0, NVIDIA GB10\n", 0, r"no.* a number for NVIDIA GB10 .*\[N/A\].*; update"),
        ("", 0, "there is no GPU 0: nvidia-smi lists 0"),
    ],
)
def test_answers_that_are_not_understood(smi: Smi, gpus: str, code: int, message: str) -> None:
    smi(gpus, code=code)
    with pytest.raises(HardwareError, match=message) as e:
        gpu_state()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("processes", ["No running processes found\n", "GPU-1, [N/A], 3\n"])
def test_processes_that_are_not_understood(smi: Smi, processes: str) -> None:
    smi("GPU-1, 580, 0, 90, 0, NVIDIA H200\n", processes)
    with pytest.raises(HardwareError, match=r"nvidia-smi .*; update the NVIDIA driver"):
        gpu_state()


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HardwareError, match=r"cannot run nvidia-smi \(No such file or directory\); measuring needs"):
        gpu_state()


def test_a_driver_that_hangs(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(instead="exec sleep 20")
    monkeypatch.setattr(gpu, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(HardwareError, match=r"does not answer within 0\.2 s"):
        gpu_state()


@pytest.mark.gpu
def test_this_gpu() -> None:
    import torch

    state, properties = gpu_state(), torch.cuda.get_device_properties(0)
    assert state.name == properties.name
    assert state.uuid == f"GPU-{properties.uuid}"
    assert state.total_bytes == pytest.approx(properties.total_memory, rel=0.01)


def state_with(total_gib: float, free_gib: float) -> GpuState:
    total = int(total_gib * GIB)
    return GpuState("NVIDIA H200", "580", "GPU-1", total, total - int(free_gib * GIB), 0.0, ())


def test_memory_by_purpose(registry: Registry) -> None:
    shape = registry.shape("mixtral-8x7b")
    weights = 8 * 3 * 4096 * 14336 * 2
    layouts = [WeightLayout("gate-first", weights), WeightLayout("tiled", 123), WeightLayout("tiled", 123)]
    needed = memory_needed(shape, layouts, 8192)
    assert list(needed) == [
        "weights",
        "weights as tiled",
        "batch and workspace",
        "L2 flush buffer",
        "CUDA context and compiled kernels",
    ]
    assert needed["weights"] == weights
    assert needed["weights as tiled"] == 123
    # At the least: what a pass reads and writes, and the float32 gate and up of every routed id.
    assert needed["batch and workspace"] > 8192 * (2 * 2 * 4096 + 2 * 4 * 2 * 14336)
    assert memory_needed(shape, layouts, 4096)["batch and workspace"] * 2 == needed["batch and workspace"]
    assert memory_needed(shape, [], 8192).keys() == needed.keys() - {"weights as tiled"}


def test_memory_that_suffices_to_the_byte(olmoe: MoEShape) -> None:
    needed = sum(memory_needed(olmoe, [], 8192).values())
    check_memory(olmoe, [], 8192, GpuState("NVIDIA H200", "580", "GPU-1", needed + 1, 1, 0.0, ()))
    with pytest.raises(HardwareError):
        check_memory(olmoe, [], 8192, GpuState("NVIDIA H200", "580", "GPU-1", needed, 1, 0.0, ()))


def test_memory_that_does_not_suffice_names_a_shard(registry: Registry) -> None:
    shape = registry.shape("mixtral-8x7b")
    with pytest.raises(HardwareError) as e:
        check_memory(shape, [WeightLayout("tiled", GIB)], 1, state_with(141, 3.1))
    assert str(e.value) == (
        "mixtral-8x7b bf16 needs 5.4 GiB on the GPU (weights 2.6, weights as tiled 1.0, batch and workspace 0.0, "
        "L2 flush buffer 0.2, CUDA context and compiled kernels 1.5), 3.1 of 141.0 are free; "
        "free memory, or profile a shard such as mixtral-8x7b-tp2"
    )


def test_a_shard_or_a_shape_without_a_name_gets_no_shard_proposed(registry: Registry) -> None:
    for shape, name in (
        (registry.shape("mixtral-8x7b-tp4", "fp8"), "mixtral-8x7b-tp4 fp8"),
        (MoEShape(8, 2, 4096, 14336, "bf16"), "E8-k2-h4096-i14336-bf16"),
    ):
        with pytest.raises(HardwareError, match=f"^{name} needs .* are free; free memory, or profile fewer tokens$"):
            check_memory(shape, [], 8192, state_with(80, 1))
