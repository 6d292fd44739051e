"""This machine's GPU, for the commands that measure on it: which it is, what runs there, and a run's progress."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..dispatch.load_model import nothing_recorded
from ..dispatch.profile_store import ProfileStore
from ..errors import KernelError, ProfileError, RampMoEError
from ..measurements.sweep import PATH
from ..profiler.gpu import GpuState, check_memory, gpu_state, memory_needed
from ..profiler.settings import Environment, MakeBench, default_warmers
from ..profiler.worker import BenchLike, make_gpu_bench
from ..registry.detect import detect
from ..registry.registry import Registry, get_registry
from ..spec.hardware import Hardware, confirm, identify
from ..spec.kernel import WeightLayout, known_version
from ..spec.launchable import LaunchableKernel
from ..spec.shapes import MoEShape
from .listing import describe_kernel, why_unavailable
from .output import error_console

UUID_START = 12
"""Characters of a GPU's UUID ("GPU-" and eight digits) that tell one from another."""
STEPS = {"compile": "launches", "check": "configurations", "probe": "batches", "measure": "batches at most"}
"""What a step is, in each phase of a run."""


@dataclass(frozen=True)
class Setup:
    """Settings of a run on this machine: `warmers` processes compile, `make_bench` makes a bench in a worker."""

    environment: Environment
    warmers: int
    make_bench: MakeBench


def find_gpu(registry: Registry, device: str = "auto") -> tuple[GpuState, Hardware]:
    """The GPU's state and constants. device: its registered name, or `auto` to identify it by its reported name.

    Raises HardwareError if there is no GPU, if it is not registered, or if it contradicts `device`.
    """
    named = None if device == "auto" else registry.device(device)
    state, known = gpu_state(), registry.hardware.values()
    # The SM count would need a CUDA context. The worker has one, and refuses a MIG slice.
    return state, identify(known, state.name) if named is None else confirm(named, known, state.name)


def recorded_kernels(
    registry: Registry, store: ProfileStore, shape: MoEShape, hardware: Hardware
) -> tuple[list[str], list[str]]:
    """Kernels with recorded times of whole paths, and why other recorded kernels are left out.

    Kernels of plugins are left out if the library's own have times. Raises ProfileError if no kernel has any.
    """
    names: list[str] = []
    left_out: list[str] = []
    for name in sorted(registry.kernels, key=lambda name: name in registry.third_party):
        try:
            found = store.find(name, shape, hardware)
        except RampMoEError as e:
            left_out.append(f"{name} left out: {e}")
            continue
        if found is not None and names and name in registry.third_party:
            left_out.append(f"{name} left out: it is a plugin's; name it with --kernel")
        elif found is not None and PATH in found[1].stages:
            names.append(name)
        elif found is not None:
            left_out.append(f"{name} left out: {found[0]} has no times of whole paths; run `ramp-moe profile`")
    if not names:
        if left_out:
            raise ProfileError("; ".join(left_out))
        raise nothing_recorded(registry, store, list(registry.kernels), shape, hardware)
    return names, left_out


def choose_kernels(
    registry: Registry, asked: Sequence[str], among: Iterable[str], shape: MoEShape, hardware: Hardware
) -> tuple[list[LaunchableKernel], list[str]]:
    """The kernels to measure, and why others are left out.

    Takes the kernels that were asked for, or else those of `among` that run here. Raises KernelError if one that was
    asked for cannot be measured, or if none can.
    """
    chosen, left_out = [], []
    for name in dict.fromkeys(asked) or among:
        kernel = registry.kernel(name)
        if not isinstance(kernel, LaunchableKernel):
            reason: str | None = "it is only described; there is nothing to launch"
        else:
            reason = describe_kernel(kernel, shape, hardware)[2] or why_unavailable(kernel) or _why_unnamed(kernel)
            if reason is None:
                chosen.append(kernel)
                continue
        if asked:
            raise KernelError(f"kernel {name} cannot be measured for {shape.title} on {hardware.name}: {reason}")
        left_out.append(f"{name} left out: {reason}")
    if not chosen:
        raise KernelError(f"no kernel can be measured for {shape.title} on {hardware.name}: {'; '.join(left_out)}")
    return chosen, left_out


def _why_unnamed(kernel: LaunchableKernel) -> str | None:
    """Why a profile of the kernel could not name the code that was measured; None if it can."""
    try:
        known_version(kernel)
    except KernelError as e:
        return f"broken: {e}"
    return None


def set_up(
    shape: MoEShape,
    hardware: Hardware,
    state: GpuState,
    kernels: Sequence[LaunchableKernel],
    max_tokens: int,
    note: Callable[[str], None],
) -> Setup:
    """Check the memory for batches of up to `max_tokens`, and note if other processes use the GPU.

    Raises HardwareError if the memory does not suffice.
    """
    check_memory(shape, _layouts(kernels, shape), max_tokens, state)
    busy = state.busy()
    if busy:
        note(f"warning: {busy}")
    environment = Environment(state.name, state.driver, state.uuid[:UUID_START], _software(), [busy] if busy else [])
    bench = functools.partial(_make_bench, shape, hardware.name, [k.name for k in kernels])
    return Setup(environment, _warmers(kernels, shape, max_tokens, state), bench)


def _make_bench(shape: MoEShape, hardware: str, kernels: Sequence[str]) -> BenchLike:
    """Make a bench, in the worker, after checking that this GPU is the one that the profile will be stored for."""
    registry = get_registry()
    detect(registry.hardware.values(), named=registry.device(hardware))
    return make_gpu_bench(shape, hardware, kernels)


def _layouts(kernels: Iterable[LaunchableKernel], shape: MoEShape) -> list[WeightLayout]:
    layouts = [k.weight_layout(shape) for k in kernels]
    return list({layout.key: layout for layout in layouts}.values())


def _warmers(kernels: Sequence[LaunchableKernel], shape: MoEShape, max_tokens: int, state: GpuState) -> int:
    """Number of processes that compile: no more than fit into the GPU's memory beside the one that measures."""
    needed = sum(memory_needed(shape, _layouts(kernels, shape), max_tokens).values())
    return max(1, min(default_warmers(), state.free_bytes // needed - 1))


def _software() -> dict[str, str]:
    """Versions of the software that affects the times."""
    import torch

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
    }
    for name in ("triton", "ramp-moe"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


class Display:
    """Shows a run's progress on stderr: a bar on a terminal, else a line per phase.

    minutes: time limit of the run; None without a limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._console = error_console(soft_wrap=True)
        self._seconds = None if minutes is None else minutes * 60
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} [dim]{task.fields[doing]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", visible=False, left="", doing="")

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str, steps: int) -> None:
        if self._console.is_terminal:
            self._bar.reset(self._task, description=name, total=steps, visible=True, left="", doing="")
        else:
            self._console.print(f"{name}: {steps} {STEPS[name]}")

    def at(self, done: int, doing: str, spent: float) -> None:
        if self._seconds is None:
            clock = ""
        else:
            left = self._seconds - spent
            clock = "time is up" if left <= 0 else f"{left / 60:.1f} minutes left"
        self._bar.update(self._task, completed=done, doing=escape(doing), left=clock)

    def note(self, text: str) -> None:
        self._console.print(escape(text))
