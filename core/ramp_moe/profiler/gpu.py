"""What the driver says of the GPU, read from nvidia-smi, and whether a profile fits into its memory.

No torch here: the process that starts and watches the measurements must not have a CUDA context of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import HardwareError
from ..spec.kernel import WeightLayout
from ..spec.shapes import SCALE_BLOCK, MoEShape

TIMEOUT_SECONDS = 30.0
"""nvidia-smi answers in tens of milliseconds; without the persistence daemon it first starts the driver, in seconds."""

BUSY_BYTES = 2**30
"""Memory in use from which on somebody computes here. A desktop, or a context that nothing runs in (0.5 GiB on an
H200), takes less; an idle server GPU reports none."""

BUSY_UTILISATION = 0.05
"""Share of the last sampling period (1/6 to 1 s) in which kernels ran; a desktop's odd redraw stays below."""

L2_FLUSH_BYTES = 256 * 2**20
"""Several times the largest L2 cache, so that writing it leaves no weights there."""

CONTEXT_BYTES = 3 * 2**29
"""The CUDA context (0.5 GiB on an H200) and the code of several hundred compiled kernels."""

WORKSPACE_GROWTH = 4
"""device.Workspace gives buffers of a power of two bytes and keeps those that it outgrew: up to four times the need."""


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU at one moment. `total_bytes` leaves out what the driver keeps for itself; `utilisation` is a fraction, 0
    where the GPU does not count it; `processes` are (pid, bytes) of the other processes that compute there, as far as
    the driver shows them (a container may hide them), with 0 bytes where it does not say."""

    name: str
    driver: str
    uuid: str
    total_bytes: int
    used_bytes: int
    utilisation: float
    processes: tuple[tuple[int, int], ...]

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def busy(self) -> str | None:
        """What shows that somebody else uses the GPU, for a person to read; None where it is idle."""
        signs = [f"process {pid}" + (f" with {_gib(b)} GiB" if b else "") for pid, b in self.processes]
        if self.used_bytes >= BUSY_BYTES:
            signs.append(f"{_gib(self.used_bytes)} GiB of memory in use")
        if self.utilisation > BUSY_UTILISATION:
            signs.append(f"utilisation {self.utilisation:.0%}")
        if not signs:
            return None
        return (
            f"{self.name} is in use by others ({', '.join(signs)}), so times will be off; "
            "wait, or choose another GPU with CUDA_VISIBLE_DEVICES"
        )


def installed_gpus() -> list[tuple[str, str]]:
    """(name, driver version) of every GPU that nvidia-smi lists, whatever CUDA_VISIBLE_DEVICES hides.

    Raises HardwareError if nvidia-smi is missing, fails, hangs or is not understood.
    """
    return [(name, driver) for driver, name in _query("--query-gpu=driver_version,name", 2)]


def gpu_state(index: int = 0) -> GpuState:
    """The state of CUDA device `index`, among those that CUDA_VISIBLE_DEVICES leaves.

    Raises HardwareError where nvidia-smi is missing, fails, hangs or is not understood, or there is no such GPU.
    """
    gpus = _query("--query-gpu=uuid,driver_version,memory.used,memory.free,utilization.gpu,name", 6)
    row = gpus[_physical(index, [row[0] for row in gpus])]
    uuid, driver, used, free, utilisation, name = row
    try:
        used_bytes, free_bytes = int(used) * 2**20, int(free) * 2**20
        busy = int(utilisation) / 100 if utilisation.isdecimal() else 0.0
        processes = tuple(
            (int(pid), int(mib) * 2**20 if mib.isdecimal() else 0)
            for gpu, pid, mib in _query("--query-compute-apps=gpu_uuid,pid,used_gpu_memory", 3)
            if gpu == uuid and int(pid) != os.getpid()
        )
    except ValueError as e:
        raise HardwareError(f"nvidia-smi does not give a number for {name} ({e}); update the NVIDIA driver") from None
    return GpuState(name, driver, uuid, used_bytes + free_bytes, used_bytes, busy, processes)


def _query(query: str, columns: int) -> list[list[str]]:
    """The rows of one nvidia-smi query; its last column may contain commas."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise HardwareError(
            f"nvidia-smi does not answer within {TIMEOUT_SECONDS:g} s; the driver hangs: look at dmesg, reset the GPU"
        ) from None
    except OSError as e:
        raise HardwareError(
            f"cannot run nvidia-smi ({e.strerror}); measuring needs an NVIDIA GPU whose driver's tools are on the PATH"
        ) from None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split()) or "no message"
        raise HardwareError(f"nvidia-smi fails with exit code {done.returncode} ({said}); mend the NVIDIA driver")
    rows = [[cell.strip() for cell in line.split(",", columns - 1)] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        if len(row) != columns:
            raise HardwareError(f"nvidia-smi answers {line!r} to {query}; update the NVIDIA driver")
    return rows


def _physical(index: int, uuids: list[str]) -> int:
    """Which of the GPUs in nvidia-smi's order is CUDA device `index`.

    As in CUDA, the first entry of CUDA_VISIBLE_DEVICES that names no GPU ends the list (-1 and an empty one, too).
    """
    visible = list(range(len(uuids)))
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is not None:
        visible = []
        for entry in (e.strip() for e in setting.split(",")):
            # CUDA counts in nvidia-smi's order (the PCI bus's) with CUDA_DEVICE_ORDER=PCI_BUS_ID only. By default it
            # puts the fastest first, which is the same order where all GPUs of the machine are of one model.
            if entry.isdecimal():
                found = [int(entry)] if int(entry) < len(uuids) else []
            else:  # a UUID may be cut short
                found = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
            if len(found) != 1:
                break
            visible += found
    if not 0 <= index < len(visible):
        which = "" if setting is None else f" with CUDA_VISIBLE_DEVICES={setting!r}"
        raise HardwareError(f"there is no GPU {index}: nvidia-smi lists {len(uuids)}, CUDA sees {len(visible)}{which}")
    return visible[index]


def memory_needed(shape: MoEShape, layouts: Collection[WeightLayout], max_tokens: int) -> dict[str, int]:
    """Bytes of GPU memory that profiling kernels with these weight layouts on up to `max_tokens` takes, by purpose.

    The weights as given are gate-first; each further layout is a copy. The workspace is an upper estimate.
    """
    hidden, inter = shape.hidden_size, shape.intermediate_size
    needed = {"weights": shape.num_experts * shape.expert_bytes}
    for layout in layouts:
        if layout.key != "gate-first":
            needed[f"weights as {layout.key}"] = layout.bytes
    # A token: input and output in bf16; workspace for a float32 sum, and for fp8 values with their scales.
    batch = (2 + 2) * hidden
    token = 4 * hidden + hidden + 4 * hidden // SCALE_BLOCK
    # A routed id: gate and up in float32 (split-K sums more of them, but of small batches only), their product in bf16
    # and in fp8 with scales, the expert's output in bf16, and a gathered input in fp8.
    routed = 4 * 2 * inter + 2 * inter + inter + 4 * inter // SCALE_BLOCK + 2 * hidden + hidden
    workspace = WORKSPACE_GROWTH * (token + shape.top_k * routed)
    needed["batch and workspace"] = max_tokens * (batch + workspace)
    needed["L2 flush buffer"] = L2_FLUSH_BYTES
    needed["CUDA context and compiled kernels"] = CONTEXT_BYTES
    return needed


def check_memory(shape: MoEShape, layouts: Collection[WeightLayout], max_tokens: int, state: GpuState) -> None:
    """Raises HardwareError where what `memory_needed` lists does not fit into the GPU's free memory."""
    needed = memory_needed(shape, layouts, max_tokens)
    total = sum(needed.values())
    if total <= state.free_bytes:
        return
    what = f"{shape.name} {shape.dtype}" if shape.name else shape.slug
    remedy = "free memory, or profile fewer tokens"
    if shape.name and "-tp" not in shape.name:
        remedy = f"free memory, or profile a shard such as {shape.name}-tp2"
    raise HardwareError(
        f"{what} needs {_gib(total)} GiB on the GPU ({', '.join(f'{k} {_gib(b)}' for k, b in needed.items())}), "
        f"{_gib(state.free_bytes)} of {_gib(state.total_bytes)} are free; {remedy}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
