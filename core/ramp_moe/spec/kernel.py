"""The contract between the library and a kernel: configurations, stages with their grids, weight layouts, refusals."""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from ..errors import KernelError, RampMoEError, describe, shown
from .geometry import GridGeometry
from .hardware import Hardware
from .shapes import SCALE_BLOCK, MoEShape

StageKind = Literal["quantise", "schedule", "zero", "gemm", "activation", "combine"]
STAGE_KINDS: tuple[str, ...] = get_args(StageKind)
PREPARATION: frozenset[str] = frozenset({"quantise", "schedule", "zero"})
"""Kinds of stages before the GEMMs, which kernels largely share. Kernels are comparable if their times leave out no
other kinds: not if one was timed without a GEMM, or without an activation that another fuses."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One launch of a kernel's path. Candidates that share a `key` share the launch: it is measured and fitted once.

    A "gemm" stage has a `geometry`. The other kinds (quantise, schedule, zero, activation, combine) work token by token
    and have none. Raises KernelError for an unknown kind, and for a geometry that is missing or out of place.
    """

    kind: StageKind
    key: str
    geometry: GridGeometry | None = None

    def __post_init__(self) -> None:
        if self.kind not in STAGE_KINDS:
            raise KernelError(f"stage {self.key!r}: kind {self.kind!r} is not one of {', '.join(STAGE_KINDS)}")
        if (self.kind == "gemm") != (self.geometry is not None):
            raise KernelError(f"stage {self.key!r}: a gemm stage needs a geometry, and only a gemm stage has one")


ParamValue = int | float | str | bool


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One way to run a kernel: its stages in launch order, and parameters that only the kernel interprets."""

    name: str
    stages: tuple[Stage, ...]
    params: tuple[tuple[str, ParamValue], ...] = ()

    @property
    def gemms(self) -> tuple[GridGeometry, ...]:
        return tuple(s.geometry for s in self.stages if s.geometry is not None)


LAYOUTS = ("gate-first", "gate-up-interleaved-8", "up-first")
"""Orders in which weights can hold the rows of the gate and up projections:

gate-first: all gate rows, then all up rows.
gate-up-interleaved-8: 8 gate rows, the 8 up rows that belong to them, the next 8 gate rows, and so on.
up-first: all up rows, then all gate rows.

`ramp_moe.runtime.relayout` converts one into another.
"""


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a kernel wants the experts' weights in memory: one of LAYOUTS, or a format of its own.

    Kernels of equal `key` share one copy. `bytes` is the size of all experts' weights and scales in this layout.
    """

    key: str
    bytes: int


class Kernel(ABC):
    """A MoE kernel, described by the CTA grids that it launches. The description needs no GPU."""

    name: str
    formats: tuple[str, ...] = ("fp8", "bf16", "fp16")
    """Formats of weights that it may take, names in `spec.formats.FORMATS`. It is not asked about any other."""
    counts_repeats = True
    """True if an expert that a token names twice computes the token twice, as the histogram counts it.

    If False, batches with such tokens are not profiled: the kernel computes less than their histograms say.
    """

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        """Why this kernel cannot compute `shape` on `hardware`, for a person to read; None if it can."""
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int | None:
        """The most tokens that the configuration computes in one launch; None if any number.

        A layer computes longer batches in several launches.
        """
        return None

    @abstractmethod
    def configs(self, shape: MoEShape, hardware: Hardware) -> Iterable[KernelConfig]:
        """All valid configurations for a supported shape, always in the same order, with distinct names."""

    @abstractmethod
    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        """The layout that the kernel wants the weights in."""

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        """Keys of the layouts that the kernel reads without a copy; its own comes first, and is the default."""
        return (self.weight_layout(shape).key,)

    def version(self) -> str:
        """Version of the code that runs. A profile of another version is not extended.

        By default, the version of the distribution that the class comes from.
        """
        return version_of(type(self).__module__.partition(".")[0])


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a build in `folder`; configurations are listed by name.

    compiled, reused: compiled by this build, and found in the cache; usable, and `bytes` large in all.
    dropped: configurations that cannot be used, each with its reason.
    notes: remarks for a person to read.
    """

    folder: Path
    compiled: tuple[str, ...]
    reused: tuple[str, ...]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    bytes: int
    seconds: float
    cpu_seconds: float


Progress = Callable[[int, int, str], None]
"""Called with the parts of a build that are done, the number of all parts, and the last one's name.

A part is a configuration if each is compiled by itself. The name may be empty.
"""


class BuildableKernel(Kernel):
    """A kernel compiled ahead of time, without a GPU, into a cache on disk; `ramp-moe kernels build` does it."""

    @abstractmethod
    def build(self, shape: MoEShape, hardware: Hardware, report: Progress, jobs: int | None = None) -> Built:
        """Compile what the cache lacks for a supported shape, in `jobs` processes (None: the kernel decides).

        Raises KernelError if something needed is missing, or if the cache cannot be written.
        """

    def built(self, configs: Sequence[KernelConfig]) -> dict[str, str | None]:
        """Those of the configurations that need no compiling, by name: None if a launch can load it, else the reason
        why it can never run. By default all can be launched.

        Raises KernelError if that cannot be said.
        """
        return dict.fromkeys((c.name for c in configs), None)

    def build_each(
        self, configs: Iterable[KernelConfig], jobs: int | None = None, nice: int = 0
    ) -> Iterator[tuple[str, str | None]]:
        """Compile what the cache lacks of a few configurations, each of which takes seconds. Yields each as it is done,
        as `built` describes it.

        configs: asked for the next one, in another thread, whenever a process is free. jobs: processes; None: the
        kernel decides. nice: by how much the processes stand back behind others, as in `os.nice`.

        By default nothing is compiled. Raises KernelError as `build` does.
        """
        for config in configs:
            yield config.name, None

    @abstractmethod
    def prune(self) -> int:
        """Delete what other versions of the kernel left in the cache, and return the bytes freed."""


@functools.cache  # a search reads the list of files of every distribution: most of a second
def version_of(package: str) -> str:
    """Version of the distribution that provides a top-level package; "?" if none does."""
    found = metadata.packages_distributions().get(package)
    if found is None:  # an editable installation lists no packages, but its entry points name one
        entries = (e for e in metadata.entry_points(group="ramp_moe") if e.module.partition(".")[0] == package)
        found = [e.dist.name for e in entries if e.dist]
    return metadata.version(found[0]) if found else "?"


def known_version(kernel: Kernel) -> str:
    """The kernel's version. Raises KernelError if it fails to say one, or says something else."""
    try:
        found: object = kernel.version()
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(f"version() raised {type(e).__name__}: {describe(e)}; correct the kernel") from e
    if not isinstance(found, str) or not found.strip():
        raise KernelError(f"version() returned {shown(found)}, not the version of the code that runs")
    return found


def is_installed(module: str) -> bool:
    """Whether a module can be found; does not import it. A mere folder of that name (no origin) does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def fp8_unsupported(shape: MoEShape, hardware: Hardware, whole_blocks: bool = True) -> str | None:
    """Why fp8 weights and activations cannot be computed for this shape here; None if they can, or for other formats.

    whole_blocks: True if the kernel takes only scale blocks of 128, all of them whole. Every kernel needs a hidden size
        that is a multiple of 128: it is never sharded, and the block's side follows from its number of scales.
    """
    if shape.format.element != "e4m3" or not shape.format.rounds:
        return None
    if hardware.fp8_flops is None:
        return f"{hardware.name} has no fp8 units"
    for what in ("hidden_size", "intermediate_size")[: 2 if whole_blocks else 1]:
        if getattr(shape, what) % SCALE_BLOCK:
            return f"{what} {getattr(shape, what)} is not a multiple of the fp8 scale block {SCALE_BLOCK}"
    return None


def why_unsupported(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> str | None:
    """The kernel's reason, or None if it supports the shape. An empty or malformed answer counts as a refusal.

    A kernel is not asked about weights of a format that is not among its `formats`. Raises KernelError if the kernel
    fails to answer.
    """
    if shape.dtype not in kernel.formats:
        return f"takes weights in {' or '.join(kernel.formats)}, not in {shape.dtype}"
    try:
        reason: object = kernel.unsupported(shape, hardware)
    except RampMoEError:
        raise
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(f"kernel {kernel.name} fails to describe itself: {type(e).__name__}: {describe(e)}") from e
    return reason_of(reason, "unsupported")


def reason_of(answer: object, asked: str) -> str | None:
    """Bring the answer of a kernel's unsupported() or unavailable() to one line; None if there is no obstacle."""
    if answer is None:
        return None
    if isinstance(answer, str):
        return " ".join(answer.split()) or f"{asked}, without a reason"
    return f"{asked}() returned {type(answer).__name__}, not a reason or None; correct the kernel"


def layouts_of(kernel: Kernel, shape: MoEShape) -> tuple[str, ...]:
    """The kernel's readable layouts. Raises KernelError if it fails to name any."""
    try:
        found = tuple(kernel.readable_layouts(shape))
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(
            f"kernel {kernel.name} fails to name its weight layouts: {type(e).__name__}: {describe(e)}"
        ) from e
    if not found or not all(isinstance(key, str) for key in found):
        raise KernelError(f"kernel {kernel.name} must name weight layouts, as strings; correct readable_layouts()")
    return found


def most_tokens(kernel: Kernel, config: KernelConfig, shape: MoEShape) -> int | None:
    """The kernel's `max_tokens`. Raises KernelError if that is no number of tokens."""
    most = kernel.max_tokens(config, shape)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise KernelError(f"kernel {kernel.name} takes {most!r} tokens as {config.name}; it must take one or more")
    return most


def usable_configs(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> tuple[KernelConfig, ...]:
    """The kernel's configurations. Raises KernelError, with the reason, if there is none or the kernel is broken."""
    if (reason := why_unsupported(kernel, shape, hardware)) is not None:
        raise KernelError(f"kernel {kernel.name} does not support {shape.title} on {hardware.name}: {reason}")
    try:
        configs = tuple(kernel.configs(shape, hardware))
    except RampMoEError:
        raise
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(f"kernel {kernel.name} fails to describe itself: {type(e).__name__}: {describe(e)}") from e
    if not all(isinstance(c, KernelConfig) for c in configs):
        raise KernelError(f"kernel {kernel.name} lists something that is not a KernelConfig")
    if not configs:
        raise KernelError(f"kernel {kernel.name} has no configuration for {shape.title} on {hardware.name}")
    if len({c.name for c in configs}) != len(configs):
        raise KernelError(f"kernel {kernel.name} names two configurations alike for {shape.label}")
    return configs
