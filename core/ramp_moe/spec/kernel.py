"""The contract between the library and a kernel: names, stages with their grids, weight layouts, reasons."""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from ..errors import KernelError, RampMoEError, describe
from .geometry import GridGeometry
from .hardware import Hardware
from .shapes import SCALE_BLOCK, MoEShape

StageKind = Literal["quantise", "schedule", "zero", "gemm", "activation", "combine"]
STAGE_KINDS: tuple[str, ...] = get_args(StageKind)
PREPARATION: frozenset[str] = frozenset({"quantise", "schedule", "zero"})
"""Kinds of stages before the GEMMs, which paths have much in common. Kernels whose times leave out more than these
(one GEMM of two, an activation that another kernel fuses) cannot be compared."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One launch of a path. Two candidates that share a `key` share the launch: it is measured and fitted once.

    A "gemm" stage has a `geometry`; the others (activation quantisation, schedule for a token block, zeroing,
    activation, combine) work token by token and have none.
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
    """One way to run a kernel: its stages in launch order, and parameters that mean something to the kernel alone."""

    name: str
    stages: tuple[Stage, ...]
    params: tuple[tuple[str, ParamValue], ...] = ()

    @property
    def gemms(self) -> tuple[GridGeometry, ...]:
        return tuple(s.geometry for s in self.stages if s.geometry is not None)


LAYOUTS = ("gate-first", "gate-up-interleaved-8", "up-first")
"""Orders of the rows of the gate and up projections that weights can be held in: all gate rows, then all up rows; 8
gate rows, the same 8 up rows, and so on; all up rows, then all gate rows. `ramp_moe.runtime.relayout` turns one into
another."""


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a kernel wants the experts' weights in memory: one of LAYOUTS, or a format that it makes itself.

    Kernels whose `key` is equal share one copy. `bytes` is the size of all experts' weights and scales in this layout.
    """

    key: str
    bytes: int


class Kernel(ABC):
    """A MoE kernel, described purely by the CTA grids that it launches. Describing one needs no GPU."""

    name: str
    counts_repeats = True
    """Whether an expert that a token names twice takes two of its rows, as the histogram counts it. Of a kernel where
    it does not, batches with such tokens are not profiled: it runs less than their histograms say."""

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        """Why this kernel cannot compute `shape` on `hardware`, for a person to read; None where it can."""
        return None

    def max_tokens(self, config: KernelConfig, shape: MoEShape) -> int | None:
        """The most tokens of a batch that the configuration computes in one launch; None if any number. A layer
        computes longer batches in several."""
        return None

    @abstractmethod
    def configs(self, shape: MoEShape, hardware: Hardware) -> Iterable[KernelConfig]:
        """Every valid configuration for a supported shape, always in the same order, with distinct names."""

    @abstractmethod
    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        """The layout that the kernel wants the weights in."""

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        """Keys of the layouts that the kernel reads without a copy, the one it wants first. By default that alone."""
        return (self.weight_layout(shape).key,)

    def version(self) -> str:
        """Version of the code that runs, for profiles: one of another version is not extended. By default that of the
        distribution which the class is from."""
        return version_of(type(self).__module__.partition(".")[0])


@dataclass(frozen=True, slots=True)
class Built:
    """What a build left in `folder`, by names of configurations: those compiled now and those that were there, `bytes`
    in all, and the `dropped` ones, which cannot be used, each with its reason. `notes` are for a person to read."""

    folder: Path
    compiled: tuple[str, ...]
    reused: tuple[str, ...]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    bytes: int
    seconds: float
    cpu_seconds: float


Progress = Callable[[int, int, str], None]
"""Told how many parts of a build are done, of how many, and which was the last ("" where that says nothing): the
configurations, where each is compiled by itself."""


class BuildableKernel(Kernel):
    """A kernel compiled ahead of time, without a GPU, into a cache on disk; `ramp-moe kernels build` does it."""

    @abstractmethod
    def build(self, shape: MoEShape, hardware: Hardware, report: Progress, jobs: int | None = None) -> Built:
        """Compile what the cache lacks for a supported shape, in `jobs` processes (None: the kernel decides).
        Raises KernelError where something needed is missing, or where the cache cannot be written."""

    @abstractmethod
    def prune(self) -> int:
        """Delete what other versions of the kernel have left in the cache; returns the bytes freed."""


@functools.cache  # finding out reads the list of files of every distribution: most of a second
def version_of(package: str) -> str:
    """Version of the distribution that provides a top-level package, "?" where none does."""
    found = metadata.packages_distributions().get(package)
    if found is None:  # an editable installation lists no packages, but its entry points name one
        entries = (e for e in metadata.entry_points(group="ramp_moe") if e.module.partition(".")[0] == package)
        found = [e.dist.name for e in entries if e.dist]
    return metadata.version(found[0]) if found else "?"


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it; a mere folder of that name (no origin) does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def fp8_unsupported(shape: MoEShape, hardware: Hardware, whole_blocks: bool = True) -> str | None:
    """Why block-scaled fp8 cannot be computed for this shape here; None if it can, or for another dtype.

    whole_blocks: the kernel takes scale blocks of 128 only, all of them whole. A hidden size must be a multiple of 128
    for every kernel: it is never sharded, and its scales tell how large the blocks are."""
    if shape.dtype != "fp8":
        return None
    if hardware.fp8_flops is None:
        return f"{hardware.name} has no fp8 units"
    for what in ("hidden_size", "intermediate_size")[: 2 if whole_blocks else 1]:
        if getattr(shape, what) % SCALE_BLOCK:
            return f"{what} {getattr(shape, what)} is not a multiple of the fp8 scale block {SCALE_BLOCK}"
    return None


def why_unsupported(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> str | None:
    """The kernel's reason, None where it supports the shape; one that says neither counts as a refusal. Raises
    KernelError for a kernel that fails to answer."""
    try:
        reason: object = kernel.unsupported(shape, hardware)
    except RampMoEError:
        raise
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(f"kernel {kernel.name} fails to describe itself: {type(e).__name__}: {describe(e)}") from e
    return reason_of(reason, "unsupported")


def reason_of(answer: object, asked: str) -> str | None:
    """What a kernel's unsupported() or unavailable() answered, as one line; None where nothing is in the way."""
    if answer is None:
        return None
    if isinstance(answer, str):
        return " ".join(answer.split()) or f"{asked}, without a reason"
    return f"{asked}() returned {type(answer).__name__}, not a reason or None; correct the kernel"


def layouts_of(kernel: Kernel, shape: MoEShape) -> tuple[str, ...]:
    """The kernel's readable layouts, or KernelError with the reason why the kernel is broken."""
    try:
        found = tuple(kernel.readable_layouts(shape))
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(
            f"kernel {kernel.name} fails to name its weight layouts: {type(e).__name__}: {describe(e)}"
        ) from e
    if not found or not all(isinstance(key, str) for key in found):
        raise KernelError(f"kernel {kernel.name} names something that is no weight layout that it reads")
    return found


def most_tokens(kernel: Kernel, config: KernelConfig, shape: MoEShape) -> int | None:
    """The kernel's `max_tokens`, or KernelError if that is no number of tokens."""
    most = kernel.max_tokens(config, shape)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise KernelError(f"kernel {kernel.name} takes {most!r} tokens as {config.name}; it must take one or more")
    return most


def usable_configs(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> tuple[KernelConfig, ...]:
    """The kernel's configurations, or KernelError with the reason why there is none, or why the kernel is broken."""
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
